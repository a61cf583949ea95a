"""What the peers in `peers` have to learn, from graded text.

Each function trains a part once and keeps it in a folder. The papers train longer, on more text;
``STEPS`` says for how many steps of ``BATCH`` texts each part is trained here; except for the two
experts, half of each batch is toxic. All parts learn from the same texts: ParaDetox, labelled
posts, the training half of RealToxicityPrompts' challenging prompts, and graded continuations that
the caller adds; the two fine-tuned models learn from ParaDetox alone. No file that is for measuring
only is read.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fusion_detox import Calibrator
from fusion_detox.files.atomic import replacing_folder, write_whole
from fusion_detox.files.models import load_target, quiet_transformers
from fusion_detox.training.data.corpus import read_rows
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.finetuning.pipeline import finetune
from recipes.english_continuations import part

log = logging.getLogger("peers")
STEPS = {"expert": 600, "reward": 3000, "rectifier": 1500, "finetune": 600}
BATCH = 16
LENGTH = 64
SEED = 20261124
TRACE = 0.95
"""Rectification's SARSA bootstraps from the next token only (a trace of 0), which takes far more
steps to reach a text's first tokens."""


class Graded(NamedTuple):
    """A text, what preceded it, and how toxic it is, from 0 to 1."""

    prompt: str
    text: str
    toxicity: float


def trained_on(prompt: str) -> bool:
    """Whether a challenging prompt belongs to the half that may be trained on."""
    return part(prompt) != "measuring"


def graded_texts(data: Path, extra: Iterable[Path] = ()) -> list[Graded]:
    """All texts for training, in a fixed order.

    Args:
        data: Folder of the data sets.
        extra: JSON Lines with ``text``, ``toxicity`` and, if any, ``prompt``.
    """
    found = []
    for row, _ in read_rows(data / "paradetox.jsonl.gz"):
        toxic, neutral = row["toxic"], row["neutral"][0]
        if toxic != neutral:
            found += [Graded("", toxic, 1.0), Graded("", neutral, 0.0)]
    for row, _ in read_rows(data / "toxicity_labeled.jsonl.gz"):
        found.append(Graded("", row["text"], float(row["label"] in ("hate", "offensive"))))
    for row, _ in read_rows(data / "rtp_challenging.jsonl"):
        prompt, continuation = row["prompt"], row["continuation"]
        if trained_on(prompt["text"]):
            found.append(Graded("", prompt["text"], prompt["toxicity"] or 0.0))
            if continuation["toxicity"] is not None:
                found.append(Graded(prompt["text"], continuation["text"], continuation["toxicity"]))
    for path in extra:
        found += [
            Graded(row.get("prompt") or "", row["text"], float(row["toxicity"]))
            for row, _ in read_rows(path)
        ]
    return found


class Batch(NamedTuple):
    """Ids ``(B, L)``, attention mask, which ids belong to the graded text, and toxicities."""

    ids: Tensor
    mask: Tensor
    graded: Tensor
    toxicity: Tensor


def batch_of(tokenizer: Any, texts: Sequence[Graded], start: Sequence[int], device: Any) -> Batch:
    """Texts with ``start`` before them, cut to ``LENGTH`` tokens on the left of the prompt."""
    rows = []
    for one in texts:
        before = tokenizer(one.prompt, add_special_tokens=False)["input_ids"] if one.prompt else []
        text = tokenizer(one.text, add_special_tokens=False, truncation=True, max_length=LENGTH)
        text = text["input_ids"][: LENGTH - 1]
        before = [*start, *before[max(len(before) + len(text) + 1 - LENGTH, 0) :]]
        rows.append((before, text))
    width = max(len(before) + len(text) for before, text in rows)
    shape = (len(rows), width)
    ids, mask, graded = torch.zeros(shape).long(), torch.zeros(shape), torch.zeros(shape)
    for index, (before, text) in enumerate(rows):
        end = len(before) + len(text)
        ids[index, :end] = torch.tensor([*before, *text])
        mask[index, :end] = 1
        graded[index, len(before) : end] = 1
    toxicity = torch.tensor([one.toxicity for one in texts])
    return Batch(*(part.to(device) for part in (ids, mask.long(), graded, toxicity)))


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    texts: Sequence[Graded],
    loss_of: Callable[[Sequence[Graded]], Tensor],
    *,
    steps: int,
    rate: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a linearly falling rate, on batches in which both classes are equally frequent."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    draw = random.Random(SEED)
    groups = [[one for one in texts if (one.toxicity >= 0.5) is toxic] for toxic in (True, False)]
    groups = [group for group in groups if group]
    total = 0.0
    for step in range(1, steps + 1):
        chosen = [draw.choice(group) for group in groups for _ in range(BATCH // len(groups))]
        loss = loss_of(chosen)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        after()
        total += float(loss.detach())
        if step % 50 == 0 or step == steps:
            log.info("%s: step %d of %d, mean loss %.4f", name, step, steps, total / step)


def adapted(target: str, device: Any) -> Any:
    """A copy of the target with a fresh LoRA adapter on all linear layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    model, _ = load_target(target, device=device, dtype="float32", local_files_only=True)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings).train()


def save_adapter(model: Any, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder, save_embedding_layers=False)


def merged(target: str, folder: Path, device: Any, scale: float = 1.0) -> Any:
    """The target with an adapter in its weights, multiplied by ``scale``."""
    from peft import PeftModel
    from peft.helpers import rescale_adapter_scale

    model, _ = load_target(target, device=device, dtype="float32", local_files_only=True)
    model = PeftModel.from_pretrained(model, folder)
    with rescale_adapter_scale(model, scale):
        return model.merge_and_unload().eval()


def train_expert(
    target: str, tokenizer: Any, start: Sequence[int], texts: Sequence[Graded], toxic: bool,
    folder: Path, *, steps: int, device: Any,
) -> Path:  # fmt: skip
    """DExperts' expert or anti-expert (arXiv 2105.03023, 3.1): language modelling on one class."""
    if folder.exists():
        return folder
    model = adapted(target, device)
    own = [one for one in texts if (one.toxicity >= 0.5) is toxic]

    def loss_of(chosen: Sequence[Graded]) -> Tensor:
        batch = batch_of(tokenizer, chosen, start, device)
        labels = batch.ids.masked_fill(batch.graded == 0, -100)
        loss: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        return loss

    fit(folder.name, model.parameters(), own, loss_of, steps=steps, rate=2e-4)
    with replacing_folder(folder) as new:
        save_adapter(model, new)
    return folder


class RewardModel(nn.Module):
    """RAD's reward (arXiv 2310.09520, 3.1): a causal language model with a scalar head.

    Attributes:
        model: A copy of the calibrator's reference: the size of our own guide.
        head: From its last hidden state to the logit of the toxicity that the text will have.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(model.config.hidden_size, 1)

    def forward(self, **inputs: Any) -> tuple[Tensor, Any]:
        """The toxicity after each token, ``(B, L)`` in 0..1, and the KV cache."""
        output = self.model(**inputs, output_hidden_states=True)
        toxicity = self.head(output.hidden_states[-1]).squeeze(-1).sigmoid()
        return toxicity, output.past_key_values


def reward_model(
    calibrator: Calibrator, texts: Sequence[Graded], folder: Path, *, steps: int, device: Any
) -> RewardModel:
    """Trains or loads RAD's reward model, with the cumulative squared error of its eq. 1."""
    if not folder.exists():
        torch.manual_seed(SEED)
        start = calibrator.reference if calibrator.reference is not None else calibrator.clean
        model = RewardModel(copy.deepcopy(start).float()).to(device).requires_grad_().train()

        def loss_of(chosen: Sequence[Graded]) -> Tensor:
            batch = batch_of(calibrator.tokenizer, chosen, [calibrator.bos_id], device)
            found, _ = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            weights = batch.graded * batch.graded.cumsum(1)
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
            return (weights * (found - batch.toxicity[:, None]) ** 2).sum(1).mean()

        fit(folder.name, model.parameters(), texts, loss_of, steps=steps, rate=3e-4)
        with replacing_folder(folder) as new:
            model.model.save_pretrained(new)
            save_file(model.head.state_dict(), new / "head.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model = RewardModel(loaded)
    model.head.load_state_dict(load_file(folder / "head.safetensors"))
    return model.to(device).eval()


def value_head(width: int, vocabulary: int) -> nn.Sequential:
    """Rectification's head: one value per token of the vocabulary; untrained, all are 0."""
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, vocabulary))
    nn.init.zeros_(head[2].weight)
    nn.init.zeros_(head[2].bias)
    return head


def rectifier(
    target: str, tokenizer: Any, start: Sequence[int], texts: Sequence[Graded], folder: Path,
    *, steps: int, device: Any,
) -> tuple[Any, nn.Sequential]:  # fmt: skip
    """Trains or loads Rectification's value network Q (arXiv 2302.14003, 4).

    Q is in -1..0, and -Q estimates the probability that the text becomes toxic. It learns by SARSA
    without discount, with a slowly following copy of the head; the reward is minus the toxicity at
    the last token, and 0 before.
    """
    sizes = AutoConfig.from_pretrained(target, local_files_only=True).get_text_config()
    torch.manual_seed(SEED)
    head = value_head(sizes.hidden_size, sizes.vocab_size).to(device)
    if not folder.exists():
        model, slow = adapted(target, device), copy.deepcopy(head).requires_grad_(False)

        def loss_of(chosen: Sequence[Graded]) -> Tensor:
            batch = batch_of(tokenizer, chosen, start, device)
            output = model(
                input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True
            )
            hidden, actions = output.hidden_states[-1][:, :-1], batch.ids[:, 1:, None]
            value = head(hidden).gather(2, actions).squeeze(2)
            with torch.no_grad():
                later = slow(hidden).gather(2, actions).squeeze(2)
                counts = batch.graded[:, 1:]
                goal = torch.zeros_like(value)
                ahead = -batch.toxicity
                for step in reversed(range(value.shape[1])):
                    goal[:, step] = ahead.clamp(-1.0, 0.0)
                    passed = counts[:, step] > 0
                    mixed = (1 - TRACE) * later[:, step] + TRACE * goal[:, step]
                    ahead = torch.where(passed, mixed, ahead)
            return (counts * (value - goal) ** 2).sum() / counts.sum().clamp(min=1)

        def follow() -> None:
            for old, new in zip(slow.parameters(), head.parameters(), strict=True):
                old.data.lerp_(new.data, 0.1)

        both = [*model.parameters(), *head.parameters()]
        fit(folder.name, both, texts, loss_of, steps=steps, rate=2e-4, after=follow)
        with replacing_folder(folder) as new:
            save_adapter(model, new)
            save_file(head.state_dict(), new / "head.safetensors")
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return merged(target, folder, device), head.eval()


def posterior_scale(
    features: Sequence[float], texts: Sequence[Graded], path: Path
) -> tuple[float, float]:
    """GeDi's scale and bias (arXiv 2009.06367, eq. 4), learned with its discriminative loss.

    Args:
        features: For each text, the difference of its mean log-probs under the two experts.
        texts: The texts.
        path: Where to keep the two numbers.
    """
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e3).fit(
        [[value] for value in features], [one.toxicity < 0.5 for one in texts]
    )
    scale = {"scale": float(fitted.coef_[0][0]), "bias": float(fitted.intercept_[0])}
    write_whole(path, json.dumps(scale).encode())
    return scale["scale"], scale["bias"]


def finetuned(
    target: str, data: Path, folder: Path, *, objective: Any, steps: int, device: str | None
) -> Path:
    """An adapter of the target by contrastive perplexity (arXiv 2401.08491) or DPO."""
    if not folder.exists():
        config = FinetuneConfig(
            objective=objective, steps=steps, learning_rate=1e-4, seed=SEED, device=device
        )
        finetune(
            target,
            folder,
            pairs=[data / "paradetox.jsonl.gz"],
            config=config,
            local_files_only=True,
            show_progress=False,
        )
    return folder

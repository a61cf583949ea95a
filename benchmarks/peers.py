"""Compare ways to detoxify a real language model, side by side.

::

    python -m benchmarks.peers --target MODEL --data DATA --work WORK

Every method continues the same challenging prompts, with the same seeds and the same noise for each
token. The half of the prompts from which `peer_training` learns is left out. WORK keeps the trained
parts and every continuation, so the same command resumes, and more prompts, seeds or methods reuse
what is there. A table, a plot and all numbers go to ``results/peers`` (or ``--output``):

- ``P(toxic)``: the share of prompts with at least one toxic continuation, for each scorer, and its
  ratio to the target alone. The scorers are those of `witnesses`. One of them,
  ``alt-profanity-check``, learned from posts that are also among the peers' training texts.
- ``perplexity`` of the target alone on what was written, and its ratio to the target's own text.
- ``dist-2``, the time per token, and the share of texts that equal the target's own: a method with
  100 % does nothing.

Methods, their sources, and what differs from them are in ``METHODS``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks import peer_methods as rules
from benchmarks import peer_training as training
from benchmarks.witnesses import PACKAGES, load_witness
from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor, align
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.evaluation.machine import Processes, versions
from fusion_detox.evaluation.metrics import diversity, fluency
from fusion_detox.evaluation.metrics.statistics import Resamples
from fusion_detox.evaluation.metrics.toxicity import against_base, toxicity
from fusion_detox.evaluation.samples import SampleFiles
from fusion_detox.evaluation.sampling import Sampler, total_cost
from fusion_detox.evaluation.word_filter import WordFilter, read_word_list, tokenisations
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.fingerprints import model_fingerprint
from fusion_detox.files.models import load_target
from fusion_detox.generation.chat import chat_prompt, has_chat_template
from fusion_detox.generation.sampling import Job, Sampling, jobs, pad_token_id, prompt_ids
from fusion_detox.scoring import make_scorer
from fusion_detox.scoring.base import Scorer
from fusion_detox.training.data.corpus import read_rows

log = logging.getLogger("peers")
OUTPUT = Path(__file__).parent / "results" / "peers"
NEW_TOKENS = 20
TOP_P = 0.9
POLITE = "You are polite and respectful. You never insult anyone and you never swear."
NEUTRAL = "You are a helpful assistant."


class Setup(NamedTuple):
    """How a method samples.

    Attributes:
        processor: A logits processor, if the method has one.
        model: A model instead of the target.
        encode: The ids that a prompt becomes, instead of the plain prompt's.
        truncates: Whether the processor itself removes improbable tokens, as its paper does before
            its rule; the sampler then uses no top-p.
    """

    processor: Any = None
    model: Any = None
    encode: Callable[[str], list[int]] | None = None
    truncates: bool = False


class Lab:
    """The target, and the trained parts of the peers, made when first used."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if args.device is None and torch.cuda.is_available() else args.device
        self.target = str(args.target)
        self.model, self.tokenizer = load_target(
            self.target, device=self.device, dtype="float32", local_files_only=True
        )
        self.pad = pad_token_id(self.model, self.tokenizer)
        self.calibrator = Calibrator.from_pretrained(
            args.calibrator, device=self.device, dtype="float32"
        )
        self.steps = {name: max(1, round(n * args.effort)) for name, n in training.STEPS.items()}
        self.guide = model_fingerprint(*self.calibrator.models.values())
        chosen = [self.calibrator.config.to_dict(), self.calibrator.words]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        self.guide += digest[:6]
        # Parts trained on other texts or for other times have other names.
        graded = [hashlib.sha256(path.read_bytes()).hexdigest() for path in args.graded]
        digest = hashlib.sha256(json.dumps([self.steps, graded]).encode()).hexdigest()[:8]
        self.parts = args.work / f"parts-{args.target.name}-{digest}"
        self.parts.mkdir(parents=True, exist_ok=True)

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before a text."""
        with_it, without = (
            self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False)
        )
        return list(with_it[: with_it.index(without[0])])

    @cached_property
    def texts(self) -> list[training.Graded]:
        return training.graded_texts(self.args.data, self.args.graded)

    @cached_property
    def experts(self) -> tuple[Any, Any]:
        """The clean and the toxic expert."""
        both = []
        for toxic in (False, True):
            folder = training.train_expert(
                self.target, self.tokenizer, self.start, self.texts, toxic,
                self.parts / ("toxic" if toxic else "clean"),
                steps=self.steps["expert"], device=self.device,
            )  # fmt: skip
            both.append(training.merged(self.target, folder, self.device))
        return both[0], both[1]

    @cached_property
    def posterior(self) -> tuple[float, float]:
        """GeDi's scale and bias, on 512 texts of each class."""
        path = self.parts / "posterior.json"
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            return kept["scale"], kept["bias"]
        draw = random.Random(training.SEED)
        texts = []
        for toxic in (False, True):
            own = [one for one in self.texts if (one.toxicity >= 0.5) is toxic]
            texts += draw.sample(own, min(512, len(own)))
        features: list[float] = []
        for begin in range(0, len(texts), 32):
            part = texts[begin : begin + 32]
            batch = training.batch_of(self.tokenizer, part, self.start, self.device)
            means = []
            for model in self.experts:
                with torch.no_grad():
                    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
                known = logits[:, :-1].float().log_softmax(-1).gather(2, batch.ids[:, 1:, None])
                counts = batch.graded[:, 1:]
                means.append((known.squeeze(2) * counts).sum(1) / counts.sum(1).clamp(min=1))
            features += (means[0] - means[1]).tolist()
        return training.posterior_scale(features, texts, path)

    @cached_property
    def reward(self) -> training.RewardModel:
        return training.reward_model(
            self.calibrator, self.texts, self.parts / f"reward-{self.guide}",
            steps=self.steps["reward"], device=self.device,
        )  # fmt: skip

    @cached_property
    def values(self) -> tuple[Any, Any]:
        return training.rectifier(
            self.target, self.tokenizer, self.start, self.texts, self.parts / "rectifier",
            steps=self.steps["rectifier"], device=self.device,
        )  # fmt: skip

    @cached_property
    def alignment(self) -> Any:
        return align(
            self.calibrator, self.model, self.tokenizer,
            config=AlignmentConfig.paper(), show_progress=False,
        )  # fmt: skip

    def fused(self, config: FusionConfig, **options: Any) -> Setup:
        return Setup(
            FusionLogitsProcessor(
                self.calibrator, self.tokenizer, config, pad_token_id=self.pad, **options
            )
        )


def unfused(_lab: Lab, _strength: float) -> Setup:
    return Setup()


def word_filter(lab: Lab, _strength: float) -> Setup:
    words, _ = read_word_list()
    return Setup(WordFilter(tokenisations(lab.tokenizer, words)))


def system_prompt(lab: Lab, strength: float) -> Setup:
    before = chat_prompt(
        lab.tokenizer, "Continue this text.", system=POLITE if strength else NEUTRAL
    )

    def encode(prompt: str) -> list[int]:
        return list(lab.tokenizer(before + prompt, add_special_tokens=False)["input_ids"])

    return Setup(encode=encode)


def contrast(lab: Lab, strength: float) -> Setup:
    return lab.fused(lab.calibrator.config.replace(strength=strength))


def product(lab: Lab, strength: float) -> Setup:
    return lab.fused(FusionConfig(rule="product", strength=strength))


def mixture(lab: Lab, strength: float) -> Setup:
    return lab.fused(FusionConfig(rule="mixture", strength=strength))


def aligned(lab: Lab, strength: float) -> Setup:
    config = FusionConfig(rule="aligned", strength=strength)
    return lab.fused(config, target=lab.model, alignment=lab.alignment)


def dexperts(lab: Lab, strength: float) -> Setup:
    clean, toxic = lab.experts
    return Setup(rules.DExperts(clean, toxic, lab.pad, strength, TOP_P), truncates=True)


def gedi(lab: Lab, strength: float) -> Setup:
    (clean, toxic), (scale, bias) = lab.experts, lab.posterior
    return Setup(rules.GeDi(clean, toxic, lab.pad, strength, scale=scale, bias=bias))


def rad(lab: Lab, strength: float) -> Setup:
    guide = lab.calibrator
    return Setup(
        rules.Rad(lab.reward, guide.tokenizer, guide.bos_id, lab.tokenizer, lab.pad, strength)
    )


def rectification(lab: Lab, strength: float) -> Setup:
    return Setup(rules.Rectification(*lab.values, lab.pad, strength))


def self_debias(lab: Lab, strength: float) -> Setup:
    return Setup(rules.SelfDebias(lab.model, lab.tokenizer, lab.pad, strength))


def _adapter(lab: Lab, objective: str, strength: float) -> Setup:
    folder = training.finetuned(
        lab.target, lab.args.data, lab.parts / objective,
        objective=objective, steps=lab.steps["finetune"], device=lab.device,
    )  # fmt: skip
    return Setup(model=training.merged(lab.target, folder, lab.device, strength))


def contrastive_perplexity(lab: Lab, strength: float) -> Setup:
    return _adapter(lab, "contrastive-perplexity", strength)


def dpo(lab: Lab, strength: float) -> Setup:
    return _adapter(lab, "dpo", strength)


class Method(NamedTuple):
    """A method, the strengths at which it runs, its source, and whether it uses the calibrator."""

    build: Callable[[Lab, float], Setup]
    strengths: tuple[float, ...]
    source: str
    guided: bool = False


METHODS = {
    "unfused": Method(unfused, (0,), "the target alone"),
    "word-filter": Method(word_filter, (1,), "the word list of better-profanity, all spellings"),
    "system-prompt": Method(
        system_prompt,
        (0, 1),
        "chat template, the answer begins with the prompt; 0: a neutral system prompt, 1: polite",
    ),
    "contrast": Method(contrast, (1, 2, 4), "this library's rule and calibrator", True),
    "product": Method(product, (0.2, 0.4, 0.6), "the calibrator's clean model alone", True),
    "mixture": Method(mixture, (0.2, 0.4, 0.6), "the calibrator's clean model alone", True),
    "aligned": Method(aligned, (0.1, 0.3, 0.6), "arXiv 2506.01266, its InfoNCE alignment", True),
    "dexperts": Method(
        dexperts, (0.5, 1, 2), "arXiv 2105.03023; experts are LoRA adapters of the target itself"
    ),
    "gedi": Method(
        gedi, (5, 15, 30), "arXiv 2009.06367; DExperts' pair instead of one model with codes"
    ),
    "rad": Method(
        rad,
        (10, 30, 100),
        "arXiv 2310.09520; a reward model of the calibrator's size, top 20",
        True,
    ),
    "rectification": Method(
        rectification, (0, 0.1, 0.3), "arXiv 2302.14003; Q is a LoRA adapter of the target"
    ),
    "self-debias": Method(self_debias, (10, 50, 100), "arXiv 2103.00453, six prefixes"),
    "contrastive-perplexity": Method(
        contrastive_perplexity,
        (0.5, 1, 2),
        "arXiv 2401.08491, LoRA on ParaDetox; strength scales it",
    ),
    "dpo": Method(dpo, (0.5, 1, 2), "arXiv 2305.18290, LoRA on ParaDetox; strength scales it"),
}


class Variant(NamedTuple):
    """One row of the table."""

    method: str
    strength: float
    temperature: float

    def stem(self, lab: Lab) -> str:
        """Names the variant's files; ends at a dot, so numbers have none."""
        guide = f"-{lab.guide}" if METHODS[self.method].guided else ""
        return f"{self.method}{guide}-{self.strength:g}-t{self.temperature:g}".replace(".", "_")


def read_prompts(data: Path, count: int | None) -> list[str]:
    """Challenging prompts of the measuring half, in an order of which more is a continuation."""
    texts = [row["prompt"]["text"] for row, _ in read_rows(data / "rtp_challenging.jsonl")]
    kept = {text for text in texts if not training.trained_on(text)}
    return sorted(kept, key=lambda text: hashlib.md5(text.encode()).hexdigest())[:count]


def generate(lab: Lab, variant: Variant, wanted: Sequence[Job], folder: Path) -> None:
    """Writes the missing continuations of a variant."""
    seeds = lab.args.seeds
    if not any(SampleFiles(folder / "samples", variant.stem(lab)).missing(wanted, seeds).values()):
        return
    setup = METHODS[variant.method].build(lab, variant.strength)
    samplings = [
        Sampling(
            max_new_tokens=NEW_TOKENS,
            temperature=variant.temperature,
            top_p=1.0 if setup.truncates else TOP_P,
            seed=seed,
        )
        for seed in seeds
    ]
    model = lab.model if setup.model is None else setup.model
    sampler = Sampler(model, lab.tokenizer, batch_size=lab.args.batch_size, processes=Processes())
    encoded = sampler.encode(wanted, NEW_TOKENS)
    if setup.encode is not None:
        encoded = {job.index: setup.encode(job.prompt) for job in wanted}
    log.info("%s", variant.stem(lab))
    sampler.run(wanted, encoded, samplings, setup.processor, folder, variant.stem(lab))


def measure(
    lab: Lab, variants: Sequence[Variant], wanted: Sequence[Job], folder: Path,
    scorers: Sequence[Scorer],
) -> list[dict[str, Any]]:  # fmt: skip
    """One record per variant; the unfused variant of each temperature comes first."""
    prompts = {job.index: job for job in wanted}
    draws = Resamples(len(prompts), seed=0)
    ids = {i: prompt_ids(lab.model, lab.tokenizer, job, NEW_TOKENS) for i, job in prompts.items()}
    keys = [(seed, job.index, job.sample) for seed in lab.args.seeds for job in wanted]
    shape = (len(lab.args.seeds), len(prompts), lab.args.samples)
    bases: dict[float, dict[str, Any]] = {}
    records = []
    for variant in variants:
        found = SampleFiles(folder / "samples", variant.stem(lab)).read()
        samples = [found[key] for key in keys]
        texts = [sample.text for sample in samples]
        nlls = fluency.continuation_nll_ids(
            lab.model,
            [ids[sample.index] for sample in samples],
            [sample.ids for sample in samples],
            texts=texts,
        )
        by_prompt: list[list[int]] = [[] for _ in prompts]
        for row, sample in enumerate(samples):
            by_prompt[sample.index].append(row)
        own = {
            "texts": texts,
            "nlls": [[nlls[row] for row in rows] for rows in by_prompt],
            "scores": {s.name: np.array(s.score(texts)).reshape(shape) for s in scorers},
        }
        base = bases.setdefault(variant.temperature, own)
        cost = total_cost(folder / "costs", variant.stem(lab))
        same = sum(one == other for one, other in zip(texts, base["texts"], strict=True))
        records.append(
            {
                **variant._asdict(),
                "source": METHODS[variant.method].source,
                "toxicity": {
                    name: {
                        **toxicity(scores, draws),
                        "ratio": against_base(scores, base["scores"][name], draws)["probability"],
                    }
                    for name, scores in own["scores"].items()
                },
                "perplexity": fluency.perplexity(own["nlls"], draws, base["nlls"]),
                "diversity": diversity.diversity(
                    [[texts[row] for row in rows] for rows in by_prompt],
                    [[len(samples[row].ids) for row in rows] for rows in by_prompt],
                ),
                "seconds_per_token": cost.seconds / max(cost.tokens, 1),
                "unchanged": same / len(texts),
            }
        )
    return records


def table(record: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    names = list(record["results"][0]["toxicity"])
    facts = f"{record['samples']} samples of {NEW_TOKENS} tokens, seeds {record['seeds']}"
    head = f"{record['target']}, {record['prompts']} challenging prompts, {facts}, top-p {TOP_P}"
    lines = [
        f"{head}, {record['device']}. P(toxic), and in brackets its ratio to the target alone.",
        "",
        f"| method | strength | T | {' | '.join(names)} | perplexity | dist-2 | ms/token | same |",
        "|" + "---|" * (7 + len(names)),
    ]
    for row in record["results"]:
        cells = [row["method"], f"{row['strength']:g}", f"{row['temperature']:g}"]
        for name in names:
            found = row["toxicity"][name]
            cells.append(f"{found['probability'][0]:.3f} {_times(found['ratio']['ratio'])}")
        weighted = row["perplexity"]["token_weighted"][0]
        shown = "–" if weighted is None else f"{weighted:.1f}"
        cells.append(f"{shown} {_times(row['perplexity']['relative'])}")
        cells.append(f"{row['diversity']['dist_2'] or 0:.2f}")
        cells.append(f"{1000 * row['seconds_per_token']:.1f}")
        cells.append(f"{row['unchanged']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(ratio: Sequence[float | None] | None) -> str:
    return "" if ratio is None or ratio[0] is None else f"({ratio[0]:.2f}×)"


def plot(record: dict[str, Any], path: Path) -> None:
    """P(toxic), averaged over the scorers, against perplexity and against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    temperatures = sorted({row["temperature"] for row in record["results"]}, reverse=True)
    figure, axes = plt.subplots(
        len(temperatures), 2, figsize=(11, 4.2 * len(temperatures)), sharey="row", squeeze=False
    )
    for pair, temperature in zip(axes, temperatures, strict=True):
        rows = [row for row in record["results"] if row["temperature"] == temperature]
        methods = dict.fromkeys(row["method"] for row in rows)
        for number, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method]
            toxic = [
                np.mean([found["probability"][0] for found in row["toxicity"].values()])
                for row in own
            ]
            style = f"{'osv^DPX*<>ph8d'[number % 14]}-"
            for axis, across in zip(
                pair,
                (
                    [row["perplexity"]["token_weighted"][0] for row in own],
                    [1000 * row["seconds_per_token"] for row in own],
                ),
                strict=True,
            ):
                axis.plot(across, toxic, style, color=f"C{number % 10}", label=method)
        for axis, label in zip(
            pair, ("perplexity under the target", "milliseconds per token"), strict=True
        ):
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.set_title(f"temperature {temperature:g}")
            axis.grid(alpha=0.3)
        pair[0].set_ylabel("P(toxic), mean of the scorers")
        pair[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of the target model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="trained parts, continuations")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, help="number of prompts (default: all)")
    parser.add_argument("--samples", type=int, default=5, help="continuations per prompt and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument(
        "--strengths", type=float, nargs="+", help="of methods that use the calibrator"
    )
    parser.add_argument(
        "--scorers",
        nargs="+",
        default=list(PACKAGES),
        help="names of witnesses, or of `fusion-detox evaluate`",
    )
    parser.add_argument("--witnesses", type=Path, help="folder for the packages of the witnesses")
    parser.add_argument(
        "--graded",
        type=Path,
        nargs="*",
        default=[],
        help="JSON Lines of more text to train on: text, toxicity, prompt",
    )
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the training steps")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    disable_progress_bar()
    lab = Lab(args)
    prompts = read_prompts(args.data, args.prompts)
    folder = lab.parts / "runs"
    for part in ("samples", "costs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    wanted = jobs(prompts, args.samples)
    variants = [
        Variant(name, strength, temperature)
        for temperature in args.temperatures
        for name in dict.fromkeys(["unfused", *args.methods])
        if name != "system-prompt" or has_chat_template(lab.tokenizer)
        for strength in (
            args.strengths if args.strengths and METHODS[name].guided else METHODS[name].strengths
        )
    ]
    for variant in variants:
        generate(lab, variant, wanted, folder)
    scorers = [
        load_witness(name, args.witnesses) if name in PACKAGES else make_scorer(name)
        for name in args.scorers
    ]
    record = {
        "target": args.target.name,
        "prompts": len(prompts),
        "samples": args.samples,
        "seeds": args.seeds,
        "device": torch.cuda.get_device_name() if lab.device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "calibrator": args.calibrator,
        "training": {"steps": lab.steps, "batch": training.BATCH, "graded": len(lab.texts)},
        "scorers": {scorer.name: scorer.record() for scorer in scorers},
        "versions": versions(),
        "results": measure(lab, variants, wanted, folder, scorers),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps(record, indent=2, default=str)
    name = args.target.name
    write_whole(args.output / f"{name}.json", content.encode() + b"\n")
    write_whole(args.output / f"{name}.md", table(record).encode())
    plot(record, args.output / f"{name}.png")
    print(table(record))


if __name__ == "__main__":
    main()

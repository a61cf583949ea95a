"""Fine-tuning of tiny models, end to end: results, unchanged base model, and resuming."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("trl")

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from fusion_detox.errors import (
    ConfigError,
    DataError,
    FusionDetoxError,
    MissingExtraError,
    ModelError,
    TrainingError,
)
from fusion_detox.training import ContrastiveConfig, FinetuneConfig, finetune
from fusion_detox.training.contrastive.objectives import mean_nll
from fusion_detox.training.data.pairs import ParaphraseSet
from fusion_detox.training.finetuning.dpo import bos_before, preference_rows

HERE = Path(__file__).parent
BUILT = runpy.run_path(str(Path(__file__).parents[2] / "finetune_data.py"))
paraphrase_rows, save_model, write_rows = (
    BUILT[name] for name in ("paraphrase_rows", "save_model", "write_rows")
)
# peft 0.21 reads this property under its transformers 4 name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SMALL: dict[str, Any] = {
    "steps": 12,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "context_length": 40,
    "held_out": 0.2,
    "device": "cpu",
    "evaluate_every": 50,
    "save_every": 4,
}
GENERAL = "\n\n".join(f"She reads three newspapers in {n} every morning." for n in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    return write_rows(folder / "pairs.jsonl", paraphrase_rows(60))


@pytest.fixture(scope="module")
def general(folder: Path) -> Path:
    path = folder / "general.txt"
    path.write_text(GENERAL)
    return path


@pytest.fixture(scope="module")
def llama(folder: Path, make_llama: Any, byte_tokenizer: Any) -> Path:
    model = make_llama(len(byte_tokenizer), initializer_range=0.1)
    return save_model(model, byte_tokenizer, folder / "llama")


@pytest.fixture(scope="module")
def gpt2(folder: Path, make_gpt2: Any, byte_tokenizer: Any) -> Path:
    """A model that happens to find harsh wordings likelier than mild ones."""
    model = make_gpt2(len(byte_tokenizer), initializer_range=0.1)
    return save_model(model, byte_tokenizer, folder / "gpt2")


def train(model: Path, output: Path, pairs: Path, **changes: Any) -> dict[str, Any]:
    """Run ``finetune`` and return its record."""
    contrast = changes.pop("contrast", ContrastiveConfig(perplexity="log"))
    more = {k: changes.pop(k) for k in list(changes) if k not in FinetuneConfig().to_dict()}
    config = FinetuneConfig(**{**SMALL, **changes})
    finetune(
        model, output, pairs=[pairs], config=config, contrast=contrast, show_progress=False, **more
    )
    found: dict[str, Any] = json.loads((output / "training.json").read_text())
    return found


@pytest.fixture(scope="module")
def adapter(llama: Path, pairs: Path, general: Path, folder: Path) -> Path:
    """Twelve steps of the signed margin, with KL on general text."""
    train(llama, folder / "adapter", pairs, objective="signed-margin", general=[general])
    return folder / "adapter"


def nll_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    values = []
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
        labels = ids.clone()
        labels[:, 0] = -100
        with torch.no_grad():
            values.append(mean_nll(model(input_ids=ids).logits, labels))
    return torch.cat(values)


# The adapter


def test_peft_and_transformers_load_the_same_adapter(adapter: Path, llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        direct = AutoModelForCausalLM.from_pretrained(adapter)(input_ids=ids).logits
        wrapped = PeftModel.from_pretrained(base, adapter)
        by_peft = wrapped(input_ids=ids).logits
        merged = wrapped.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(direct, by_peft)
    torch.testing.assert_close(merged, by_peft, atol=1e-5, rtol=1e-4)
    assert (by_peft - plain).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer("You idiot.") == AutoTokenizer.from_pretrained(llama)("You idiot.")


def test_folder_records_how_it_was_made(adapter: Path, llama: Path, pairs: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert not list(adapter.parent.glob("*adapter*.training")) + list(adapter.parent.glob(".*new*"))
    record = json.loads((adapter / "training.json").read_text())
    assert record["objective"] == "signed-margin"
    assert record["target_modules"] == ["q_proj", "v_proj"]  # peft's default for a Llama
    assert record["data_files"]["pairs"][0]["name"] == pairs.name
    assert len(record["data_files"]["pairs"][0]["sha256"]) == 64
    counts = record["data_counts"]
    assert counts["anchors"] + counts["held_out_anchors"] == 60
    assert 3 <= counts["held_out_anchors"] <= 24
    steps = [entry["step"] for entry in record["curve"] if "auc_within" in entry]
    assert steps == [0, 12]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llama.resolve())
    card = (adapter / "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert "| auc_within |" in card
    assert "base_model:" not in card  # a local path is not a hub id


def test_the_card_states_only_what_was_measured(
    adapter: Path, llama: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    record = json.loads((adapter / "training.json").read_text())
    sizes, after = record["held_out"]["on"], record["held_out"]["after"]
    assert sizes["anchors"] == record["data_counts"]["held_out_anchors"]
    assert sizes["positives"] == 6 * sizes["anchors"] == sizes["negatives"]
    card = " ".join((adapter / "README.md").read_text().split())
    assert f"On {sizes['anchors']} anchors of {pairs.name} ({sizes['positives']} non-toxic" in card
    assert f"{sizes['general_blocks']} blocks of at most 40 tokens of {general.name}" in card
    for name, value in after.items():
        assert f"| {name} | {record['held_out']['before'][name]:g} | {value:g} |" in card
    assert "writes with this adapter was not measured" in card

    train(llama, tmp_path / "few", pairs, steps=1)
    card = (tmp_path / "few" / "README.md").read_text()
    assert "auc_within" in card
    assert "`kl`" not in card  # no general text was given
    train(llama, tmp_path / "none", pairs, steps=1, held_out=0)
    unmeasured = (tmp_path / "none" / "README.md").read_text()
    assert "Nothing: no text was held out." in unmeasured
    for name in ("perplexity |", "auc_within", "bits_per_byte", "`kl`"):
        assert name not in unmeasured
    for text in (card, unmeasured):
        # No claim about its effect, and nothing about other adapters or objectives.
        assert not re.search("less likely to write|makes toxic|halve|dpo |DPO", text)


def test_recorded_perplexities_are_correct(adapter: Path, llama: Path, pairs: Path) -> None:
    """Recompute the perplexity of the held-out wordings from the files, text by text."""
    record = json.loads((adapter / "training.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(llama)
    from fusion_detox.training.data.pairs import read_pairs

    border = round(SMALL["held_out"] * 16**6)
    held = [one for one in read_pairs([pairs]) if int(one.key[:6], 16) < border]
    assert len(held) == record["data_counts"]["held_out_anchors"]
    for moment, model in (("before", llama), ("after", adapter)):
        loaded = AutoModelForCausalLM.from_pretrained(model)
        texts = [text for one in held for text in one.positives]
        found = math.exp(nll_of(loaded, tokenizer, texts).mean())
        assert record["held_out"][moment]["positive_perplexity"] == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("objective", ["contrastive-perplexity", "signed-margin", "dpo"])
def test_base_model_is_unchanged(objective: str, gpt2: Path, pairs: Path, tmp_path: Path) -> None:
    """Bit for bit, on disk and below the adapter."""
    files = {path: path.read_bytes() for path in gpt2.iterdir()}
    before = AutoModelForCausalLM.from_pretrained(gpt2).state_dict()
    train(gpt2, tmp_path / "out", pairs, objective=objective, steps=3)
    assert {path: path.read_bytes() for path in gpt2.iterdir()} == files
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name for name in written)
    assert any(value.abs().max() > 0 for name, value in written.items() if "lora_B" in name)
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in before.items():
        (twin,) = [n for n in adapted if n.replace(".base_layer", "") == name]
        assert torch.equal(adapted[twin], value), name


# The effect


@pytest.mark.parametrize("objective", ["signed-margin", "dpo"])
def test_harsh_wordings_become_less_likely(
    objective: str, gpt2: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    """On held-out anchors, with a model that preferred the harsh wordings."""
    record = train(gpt2, tmp_path / "out", pairs, objective=objective, steps=60, general=[general])
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    assert before["auc_within"] < 0.45
    assert before["negative_perplexity"] < before["positive_perplexity"]
    assert after["auc_within"] > 0.95
    assert after["negative_perplexity"] > 1.1 * after["positive_perplexity"]
    assert before["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < after["kl"] < 0.5
    fresh = paraphrase_rows(5, seed=99)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(gpt2),
    )
    for row in fresh:
        mild = nll_of(model, tokenizer, row["positives"]).mean()
        assert nll_of(model, tokenizer, row["negatives"]).mean() > mild


def test_the_papers_objective_keeps_the_initial_sign(
    llama: Path, gpt2: Path, pairs: Path, tmp_path: Path
) -> None:
    """It separates the wordings, but harsh wordings that were likelier become likelier still."""
    far = train(llama, tmp_path / "llama", pairs, objective="contrastive-perplexity", steps=40)
    near = train(gpt2, tmp_path / "gpt2", pairs, objective="contrastive-perplexity", steps=40)
    assert far["held_out"]["before"]["auc_within"] > 0.6
    assert far["held_out"]["after"]["auc_within"] > 0.95
    assert near["held_out"]["before"]["auc_within"] < 0.45
    assert near["held_out"]["after"]["auc_within"] < 0.1


def test_kl_keeps_the_model_near_its_base(
    llama: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    drift = [
        train(
            llama, tmp_path / str(weight), pairs, objective="signed-margin", general=[general],
            steps=20, contrast=ContrastiveConfig(kl_weight=weight, lm_weight=0.0),
        )["held_out"]["after"]["kl"]
        for weight in (0.0, 10.0)
    ]  # fmt: skip
    assert drift[1] < 0.5 * drift[0]


def test_micro_batch_size_does_not_affect_the_result(
    llama: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    """One micro-batch of four anchors and four of one give the same weights."""
    for at_once in (1, 4):
        train(
            llama, tmp_path / str(at_once), pairs, objective="signed-margin", steps=3,
            micro_batch_size=at_once, general=[general],
            contrast=ContrastiveConfig(margin_kind="softplus"),
        )  # fmt: skip
    one, four = (
        json.loads((tmp_path / str(n) / "training.json").read_text())["curve"] for n in (1, 4)
    )
    losses = [[entry["loss"] for entry in curve if "loss" in entry] for curve in (one, four)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_all_linear_layers_if_peft_has_no_default(
    folder: Path, pairs: Path, byte_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=len(byte_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    base = save_model(Olmo2ForCausalLM(config), byte_tokenizer, tmp_path / "olmo")
    record = train(base, tmp_path / "out", pairs, steps=1)
    assert set(record["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


# Interrupted and distributed runs


def command(output: Path, base: Path, pairs: Path, general: Path, *more: str) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [
        "-m", "fusion_detox", "finetune", str(base), str(output), f"--pairs={pairs}",
        f"--general={general}", "--objective=signed-margin", "--perplexity=log", *options, *more,
    ]  # fmt: skip


def test_killed_run_resumes_to_the_same_result(
    adapter: Path, llama: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first checkpoint; the second start gives the uninterrupted result."""
    output, steps = tmp_path / "adapter", tmp_path / "adapter.training" / "steps"
    process = subprocess.Popen([sys.executable, *command(output, llama, pairs, general)])
    until = time.monotonic() + 120
    while not (steps / "checkpoint-4").exists() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not output.exists()
    subprocess.run([sys.executable, *command(output, llama, pairs, general)], check=True)
    one, other = (load_file(path / "adapter_model.safetensors") for path in (adapter, output))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=0, msg=name)
    records = [json.loads((path / "training.json").read_text()) for path in (adapter, output)]
    assert records[0]["held_out"] == records[1]["held_out"]
    assert [e["step"] for e in records[0]["curve"]] == [e["step"] for e in records[1]["curve"]]


def test_two_processes_train_like_one_process(
    adapter: Path, llama: Path, pairs: Path, general: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29547"]
    subprocess.run(
        [sys.executable, *launcher, *command(output, llama, pairs, general)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = (json.loads((path / "training.json").read_text()) for path in (adapter, output))
    assert two["processes"] == 2
    losses = [[e["loss"] for e in record["curve"] if "loss" in e] for record in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert two["held_out"]["before"] == one["held_out"]["before"]
    for name, value in one["held_out"]["after"].items():
        assert two["held_out"]["after"][name] == pytest.approx(value, rel=2e-2, abs=2e-3), name


# DPO pairs


def test_preference_pairs() -> None:
    small = ParaphraseSet("a", ("p", "q"), ("n",), prompt="Well: ")
    large = ParaphraseSet("b", tuple("pqrs"), tuple("klmn"))
    rows = preference_rows([small, large], per_anchor=5, seed=1, before="<s>")
    assert rows[:2] == [
        {"prompt": "<s>Well: ", "chosen": "p", "rejected": "n"},
        {"prompt": "<s>Well: ", "chosen": "q", "rejected": "n"},
    ]
    assert len(rows) == 2 + 5
    assert len({(row["chosen"], row["rejected"]) for row in rows[2:]}) == 5
    assert rows == preference_rows([small, large], per_anchor=5, seed=1, before="<s>")
    with pytest.raises(DataError, match="no paraphrase set has a negative"):
        preference_rows([ParaphraseSet("a", ("p",), ())], per_anchor=5, seed=1)


def test_bos_is_added_if_the_tokenizer_does_not(byte_tokenizer: Any) -> None:
    assert bos_before(byte_tokenizer) == "<|endoftext|>"
    assert byte_tokenizer("<|endoftext|>You")["input_ids"][0] == byte_tokenizer.bos_token_id


# Errors


def fails(kind: type[FusionDetoxError], message: str, *arguments: Any, **changes: Any) -> None:
    with pytest.raises(kind, match=message):
        train(*arguments, **changes)


def test_wrong_requests(
    llama: Path, pairs: Path, adapter: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lonely = write_rows(
        tmp_path / "lonely.jsonl", [{"anchor": "Hello", "positives": [], "negatives": ["x"]}]
    )
    fails(DataError, "'Hello' has no positives", llama, out, lonely)
    (tmp_path / "empty.jsonl").write_text("")
    fails(DataError, "empty.jsonl is empty", llama, out, tmp_path / "empty.jsonl")
    fails(TrainingError, "already exists", llama, adapter, pairs, seed=99)
    fails(
        TrainingError, "is not an adapter, so it is not replaced",
        llama, llama, pairs, overwrite=True,
    )  # fmt: skip
    fails(
        ConfigError, "no linear module named w_proj; it has down_proj, .*, q_proj",
        llama, out, pairs, target_modules=["q_proj", "w_proj"],
    )  # fmt: skip
    fails(
        ConfigError, "context_length 128 is more than the 64 positions", llama, out, pairs,
        context_length=128,
    )  # fmt: skip
    fails(
        ConfigError, "without negatives the contrast is always 0", llama, out, pairs,
        contrast=ContrastiveConfig(negatives=0), objective="contrastive-perplexity",
    )  # fmt: skip
    fails(ConfigError, "rank must be a number of at least 1, but is 0", llama, out, pairs, rank=0)
    fails(ConfigError, "objective must be one of", llama, out, pairs, objective="ppo")
    assert not out.exists()
    assert not out.with_name("out.training").exists()


def test_encoder_only_model(pairs: Path, byte_tokenizer: Any, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    base = save_model(BertForMaskedLM(config), byte_tokenizer, tmp_path / "bert")
    fails(ModelError, "is an encoder", base, tmp_path / "out", pairs)


def test_four_bits_without_bitsandbytes_or_without_cuda(
    llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    for found, kind, message in (
        (None, MissingExtraError, r"'bitsandbytes'.*\[four-bit\]"),
        (object(), TrainingError, "four-bit weights need a CUDA device, and this machine has none"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, found=found: found if name == "bitsandbytes" else find(name, *rest),
        )
        fails(kind, message, llama, tmp_path / "out", pairs, four_bit=True)


@pytest.mark.parametrize(("package", "objective"), [("peft", "signed-margin"), ("trl", "dpo")])
def test_missing_packages(
    package: str,
    objective: str,
    llama: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    fails(
        MissingExtraError, rf"'{package}'.*\[finetune\]",
        llama, tmp_path / "out", pairs, objective=objective,
    )  # fmt: skip


def test_unfinished_work_of_other_settings(llama: Path, pairs: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "run.json").write_text('{"fingerprint": "another"}')
    fails(
        TrainingError, "holds unfinished training with other text", llama, tmp_path / "out", pairs
    )
    train(llama, tmp_path / "out", pairs, steps=1, overwrite=True)
    assert not work.exists()

"""Alignments, on disk and from the command line, are complete or absent, and checked before use."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from fusion_detox.alignment import store as alignment_files
from fusion_detox.alignment.alignment import Alignment, align
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.alignment.store import (
    alignment_folders,
    find_alignment,
    load_alignment,
    save_alignment,
)
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.cli import main
from fusion_detox.config import FusionConfig
from fusion_detox.errors import AlignmentError, DataFileError
from fusion_detox.evaluation import EvaluationConfig, evaluate
from fusion_detox.files import atomic
from fusion_detox.files.models import load_target
from fusion_detox.processor import FusionLogitsProcessor


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory,
    make_llama: Any,
    other_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("target") / "llama"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make_llama(len(other_tokenizer), seed=3, **ids).save_pretrained(folder)
    other_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(calibrator_folder: Path) -> Calibrator:
    return Calibrator.from_pretrained(calibrator_folder)


@pytest.fixture
def alignment(loaded: Calibrator, target: Path) -> Alignment:
    return align(loaded, target, show_progress=False)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_saved_beside_the_calibrator_and_loaded_again(
    alignment: Alignment, loaded: Calibrator, calibrator_folder: Path, target: Path
) -> None:
    folder = save_alignment(alignment, loaded)
    assert folder == calibrator_folder / "alignments" / alignment.fingerprint
    assert everything(folder) == {"alignment.json", "alignment.safetensors"}
    back = load_alignment(folder)
    assert torch.equal(back.matrix, alignment.matrix)
    assert (back.config, back.report) == (alignment.config, alignment.report)
    assert back.digest() == alignment.digest()
    # A calibrator that is loaded again finds the alignment for the loaded model.
    model, tokenizer = load_target(target)
    again = Calibrator.from_pretrained(calibrator_folder)
    assert find_alignment(again, model, tokenizer).digest() == alignment.digest()
    config = FusionConfig(rule="aligned", strength=0.2)
    processor = FusionLogitsProcessor(again, tokenizer, config, target=model)
    assert processor.alignment is not None
    assert processor.alignment.digest() == alignment.digest()


def test_a_calibrator_with_alignments_still_loads_and_saves(
    alignment: Alignment, loaded: Calibrator, calibrator_folder: Path, tmp_path: Path, target: Path
) -> None:
    """It can be saved elsewhere or over itself; other weights make the alignment stale."""
    folder = save_alignment(alignment, loaded)
    loaded.save_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "alignments").exists()
    loaded.save_pretrained(calibrator_folder)
    model, tokenizer = load_target(target)
    assert load_alignment(folder).digest() == alignment.digest()
    half = Calibrator.from_pretrained(calibrator_folder)
    half.save_pretrained(calibrator_folder, dtype="bfloat16")
    find_alignment(Calibrator.from_pretrained(calibrator_folder), model, tokenizer)
    with torch.no_grad():
        half.clean.get_output_embeddings().weight.mul_(1.5)
    half.save_pretrained(calibrator_folder)
    changed = Calibrator.from_pretrained(calibrator_folder)
    with pytest.raises(
        AlignmentError, match=r"no alignment .*it is stale, or belongs to another model"
    ):
        find_alignment(changed, model, tokenizer)


def test_alignments_of_shipped_or_read_only_calibrators_go_to_the_cache(
    alignment: Alignment,
    loaded: Calibrator,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrator_folder: Path,
    target: Path,
) -> None:
    before = everything(calibrator_folder)
    loaded.name = "english-16k"  # a shipped name
    folder = save_alignment(alignment, loaded)
    assert folder.parent.parent == cache / "alignments"
    model, tokenizer = load_target(target)
    assert find_alignment(loaded, model, tokenizer).digest() == alignment.digest()
    loaded.name = str(calibrator_folder)
    monkeypatch.setattr(alignment_files.os, "access", lambda *_: False)
    assert save_alignment(alignment, loaded) == folder
    assert everything(calibrator_folder) == before
    loaded.folder = None
    assert alignment_folders(loaded) == [folder.parent]


@pytest.mark.parametrize("where", ["write", "move"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("older", [True, False])
def test_an_interrupted_save_changes_nothing_on_disk(
    where: str,
    error: BaseException,
    older: bool,
    alignment: Alignment,
    loaded: Calibrator,
    calibrator_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if older:
        save_alignment(alignment, loaded)
    before = everything(calibrator_folder)
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[:50])
        raise error

    def fail(*_: Any) -> None:
        raise error

    if where == "write":
        monkeypatch.setattr(Path, "write_bytes", half)
    else:
        monkeypatch.setattr(atomic, "_replace", fail)
    expected = DataFileError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is DataFileError else None):
        save_alignment(alignment, loaded)
    monkeypatch.undo()
    assert everything(calibrator_folder) == before
    if older:
        (folder,) = (calibrator_folder / "alignments").iterdir()
        assert load_alignment(folder).digest() == alignment.digest()


def as_version_1(folder: Path) -> Path:
    """Remove the digest, which would detect any other change first."""
    values = json.loads((folder / "alignment.json").read_text())
    del values["sha256"]
    (folder / "alignment.json").write_text(json.dumps({**values, "format_version": 1}))
    return folder


def test_alignments_without_a_digest_load_with_a_warning(
    alignment: Alignment, loaded: Calibrator, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_alignment(alignment, loaded)
    load_alignment(folder)
    assert not caplog.records
    load_alignment(as_version_1(folder))
    assert "has no digest, so damage may not be noticed" in caplog.text


def test_damage_to_any_byte_of_an_alignment_is_refused_or_harmless(
    alignment: Alignment, loaded: Calibrator
) -> None:
    """Flipped bits, lost, added and exchanged bytes: an ``AlignmentError``, or the same values."""
    folder, rng = save_alignment(alignment, loaded), random.Random(20261125)
    refusals = 0
    for number in range(200):
        file = folder / ("alignment.json" if number % 2 else "alignment.safetensors")
        whole = file.read_bytes()
        data, place = bytearray(whole), rng.randrange(len(whole))
        if number % 5 < 3:
            data[place] ^= 1 << rng.randrange(8)
        elif number % 5 == 3:
            data[place:] = b""
        else:
            data[place : place + 8] = rng.randbytes(8)
        file.write_bytes(data)
        try:
            found = load_alignment(folder)
        except AlignmentError:
            refusals += 1
        else:
            assert torch.equal(found.matrix, alignment.matrix)
            assert (found.config, found.report) == (alignment.config, alignment.report)
        file.write_bytes(whole)
    assert refusals > 190


def test_ids_that_a_model_does_not_have_are_refused(
    alignment: Alignment, loaded: Calibrator, target: Path
) -> None:
    model, tokenizer = load_target(target)
    for wrong in (len(tokenizer), 1 << 70, -1):
        ids = (wrong, *alignment.target_ids[1:])
        with pytest.raises(AlignmentError, match=r"names tokens that .* does not have"):
            dataclasses.replace(alignment, target_ids=ids).check_target(model, tokenizer)


def test_incomplete_and_damaged_alignments_raise(
    alignment: Alignment, loaded: Calibrator, target: Path
) -> None:
    folder = as_version_1(save_alignment(alignment, loaded))
    json_file, tensors_file = folder / "alignment.json", folder / "alignment.safetensors"
    text, data = json_file.read_text(), tensors_file.read_bytes()
    values, tensors = json.loads(text), load_file(tensors_file)

    def refused(message: str) -> None:
        with pytest.raises(AlignmentError, match=message) as caught:
            load_alignment(folder)
        assert "fusion-detox align" in str(caught.value)
        json_file.write_text(text)
        tensors_file.write_bytes(data)

    json_file.unlink()
    refused(r"alignment.json is missing, so .* holds no complete alignment")
    tensors_file.unlink()
    refused(r"alignment.safetensors is missing")
    tensors_file.write_bytes(data[: len(data) // 2])
    refused("is damaged")
    json_file.write_text(text[:100])
    refused(r"alignment.json is damaged")
    json_file.write_text("[]")
    refused(r"alignment.json is damaged")
    json_file.write_text("[" * 100_000)
    refused(r"alignment.json is damaged")
    json_file.write_text(json.dumps({**values, "format_version": 3}))
    refused("format_version is 3, but this version of fusion-detox reads 2")
    json_file.write_text(json.dumps({**values, "sha256": "0"}))
    refused("does not match its digest")
    json_file.write_text(json.dumps({**values, "reports": 1}))
    refused("'reports' is unknown or missing")
    json_file.write_text(json.dumps({**values, "target_ids": [1e999]}))
    refused(r"alignment.json is damaged")
    json_file.write_text(json.dumps({**values, "config": {"epochs": -3}}))
    refused("epochs must be a whole number")
    save_file({**tensors, "matrix": tensors["matrix"][:-1]}, tensors_file)
    refused("do not fit together")
    save_file({**tensors, "matrix": torch.full_like(tensors["matrix"], torch.nan)}, tensors_file)
    refused("not finite")
    del tensors["target_rows"]
    save_file(tensors, tensors_file)
    refused("is damaged")
    load_alignment(folder)
    # Looking for an alignment reports a damaged one.
    tensors_file.unlink()
    model, tokenizer = load_target(target)
    with pytest.raises(
        AlignmentError, match=r"no alignment of .* was found: .*holds no complete alignment"
    ):
        find_alignment(loaded, model, tokenizer)


def test_a_folder_with_other_files_is_not_replaced(
    alignment: Alignment, loaded: Calibrator, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(
        AlignmentError, match="exists and is not an alignment, so it is not replaced"
    ):
        save_alignment(alignment, loaded, tmp_path / "mine")
    place = tmp_path / "new" / "folder"
    for _ in range(2):  # an alignment is replaced
        assert save_alignment(alignment, loaded, place) == place.resolve()
    assert everything(tmp_path / "new") == {
        "folder",
        "folder/alignment.json",
        "folder/alignment.safetensors",
    }


@pytest.mark.parametrize(
    ("config", "removed"),
    [
        ({"start": "ridge"}, "start='ridge'"),
        ({"start": "logits"}, "start='logits'"),
        ({"start": "random", "epochs": 5}, "negatives_from='batch'"),
    ],
)
def test_alignments_learned_with_removed_settings(
    config: dict[str, Any], removed: str, alignment: Alignment, loaded: Calibrator
) -> None:
    """They raise an error. An earlier version's default alignment records them, and still loads."""
    folder = as_version_1(save_alignment(alignment, loaded))
    file = folder / "alignment.json"
    values = json.loads(file.read_text())
    values["config"] |= {"ridge": 0.01, "negatives_from": "batch"}
    file.write_text(json.dumps(values))
    assert load_alignment(folder).config == AlignmentConfig()
    values["config"] |= config
    file.write_text(json.dumps(values))
    with pytest.raises(AlignmentError, match=f"{removed}, which this version no longer supports"):
        load_alignment(folder)


def test_align_on_the_command_line(
    calibrator_folder: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--calibrator", str(calibrator_folder), "--target", str(target)]
    assert main(["align", *common, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"].startswith(str(calibrator_folder / "alignments"))
    assert facts["config"] == AlignmentConfig().to_dict()
    assert facts["widths"] == [32, 32]
    assert facts["chance"]["at_10"] == pytest.approx(10 / facts["common_tokens"], abs=1e-5)
    assert 0 <= facts["to_target"]["at_1"] <= facts["to_target"]["at_10"] <= 1
    # A second alignment of the same embedding replaces the first.
    options = ["--paper", "--embeddings", "output", "--epochs", "2", "--seed", "5"]
    assert main(["align", *common, *options]) == 0
    found = capsys.readouterr()
    assert re.search(r"calibrator to target.*%.*%", found.out)
    assert "by chance" in found.out
    assert "Wrote " in found.err
    assert main(["info", str(calibrator_folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["alignments"]
    wanted = AlignmentConfig.paper().replace(embeddings="output", epochs=2, seed=5)
    assert row["config"] == wanted.to_dict()
    assert row["folder"] == facts["folder"]
    assert main(["info", str(calibrator_folder)]) == 0
    assert "output embeddings" in capsys.readouterr().out
    Path(row["folder"], "alignment.safetensors").unlink()
    assert main(["info", str(calibrator_folder)]) == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "holds no complete alignment" in text


def test_generate_with_the_aligned_rules(
    calibrator_folder: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", str(target), "The weather", "--calibrator", str(calibrator_folder)]
    aligned = ["--rule", "aligned", "--strength", "0.6", "--greedy", "--max-new-tokens", "8"]
    assert main([*common, *aligned]) == 1
    assert "no alignment of the calibrator" in capsys.readouterr().err
    plain = [*common, "-o", str(tmp_path / "plain.jsonl"), "--max-new-tokens", "4"]
    assert main(plain) == 0
    main(["align", "--calibrator", str(calibrator_folder), "--target", str(target)])
    capsys.readouterr()
    assert main([*common, *aligned, "--base"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["completion"] != row["base"]
    assert row["settings"]["fusion"]["rule"] == "aligned"
    assert main([*common, *aligned[2:], "--rule", "aligned_contrast"]) == 0
    capsys.readouterr()
    out = tmp_path / "elsewhere"
    learn = ["align", "--calibrator", str(calibrator_folder), "--target", str(target)]
    main([*learn, "--seed", "5", "--out", str(out)])
    capsys.readouterr()
    assert main([*common, *aligned, "--alignment", str(out)]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["settings"]["alignment"].startswith("elsewhere@")
    assert main([*common, "--alignment", str(out)]) == 1
    assert "--alignment is for the aligned rules, but the rule is" in capsys.readouterr().err
    assert main([*common, *aligned, "--alignment", str(tmp_path / "none")]) == 1
    assert "holds no complete alignment" in capsys.readouterr().err
    # An alignment does not change a calibrator's identity for the other rules.
    assert main(plain) == 0
    assert "1 of 1 completions are already in" in capsys.readouterr().err


def test_evaluate_with_the_aligned_rules(
    loaded: Calibrator, alignment: Alignment, target: Path, tmp_path: Path
) -> None:
    config = EvaluationConfig(
        samples=1,
        max_new_tokens=4,
        scorers=("lexical",),
        similarity=False,
        suites=(),
        harmless_texts=1,
        harmless_tokens=8,
        resamples=20,
    )
    settings = ["aligned:strength=0.4", "aligned_contrast:strength=1,kl_budget=0.2"]

    def run(place: str) -> dict[str, Any]:
        return evaluate(
            str(target),
            ["The weather was", "You are"],
            tmp_path / place,
            calibrator=loaded,
            settings=settings,
            config=config,
            progress=None,
        )

    with pytest.raises(AlignmentError, match="no alignment of the calibrator"):
        run("one")
    save_alignment(alignment, loaded)
    measured = {one["name"]: one for one in run("two")["settings"]}
    assert set(measured) == {"base", *settings}
    for name in settings:
        assert measured[name]["alignment"]["common_tokens"] == alignment.report["common_tokens"]
    assert measured[settings[0]]["config"]["plausibility"] == 0
    assert measured[settings[1]]["config"]["plausibility"] == FusionConfig().plausibility


def wrong_target(kind: str, target: Path, place: Path, make_llama: Any, tokenizer: Any) -> Path:
    folder = place / "wrong"
    if kind == "encoder":
        settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **settings)
        BertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind == "embedding":
        shutil.copytree(target, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif kind == "width":
        make_llama(len(tokenizer), seed=3, hidden_size=40).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("encoder", [], "is an encoder (bert), which reads text in both directions"),
        ("embedding", [], "holds no tensor lm_head.weight"),
        ("width", ["--start", "identity"], "have width 32 and the target's have width 40"),
        ("nowhere", [], "there is no such folder"),
        ("width", ["--batch-size", "1"], "batch_size must be a whole number of at least 2"),
        ("width", ["--epochs=3", "--batch-size=8", "--learning-rate=1e37"], "training diverged"),
    ],
)
def test_wrong_use_of_align_writes_nothing(
    kind: str,
    options: list[str],
    message: str,
    calibrator_folder: Path,
    target: Path,
    tmp_path: Path,
    cache: Path,
    make_llama: Any,
    other_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = wrong_target(kind, target, tmp_path, make_llama, other_tokenizer)
    before = everything(calibrator_folder)
    capsys.readouterr()
    common = ["align", "--calibrator", str(calibrator_folder), "--target", str(wrong)]
    assert main([*common, *options]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert message in found.err
    assert everything(calibrator_folder) == before
    assert not cache.exists()


def test_ctrl_c_during_training(
    calibrator_folder: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = 0
    step = torch.optim.Adam.step

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    before = everything(calibrator_folder)
    common = ["align", "--calibrator", str(calibrator_folder), "--target", str(target)]
    assert main([*common, "--paper"]) == 130
    assert "Interrupted." in capsys.readouterr().err
    assert everything(calibrator_folder) == before


def test_the_docs_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    for needed in ("examples/demo_target/model/config.json", "calibration_ckpts/english-16k"):
        if not (root / needed).exists():
            pytest.skip(f"{needed} is not in this checkout")
    text = (root / "docs" / "aligned.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(root)
    exec(compile(code, "docs/aligned.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "by chance" in printed
    assert "Get out of here, you" in printed

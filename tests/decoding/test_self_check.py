"""A processor that does not do what its calibrator promises is refused when it is made."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox import processor as processor_module
from fusion_detox.calibrator.lookup import demo_target_path
from fusion_detox.errors import CalibratorError, ConfigError, InertError
from fusion_detox.vocabulary.map import VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable

SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONTENT = "{{ message.content }}"
PARTS = CHAT.replace(CONTENT, "{% for part in message.content %}{{ part.text }}{% endfor %}")
PROBE = {"context": "You are", "avoided": [" bad"], "kept": [" good", " kind"]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.getbasetemp() / "maps"))


@pytest.fixture(scope="module")
def english() -> Calibrator:
    return Calibrator.from_pretrained("english-16k")


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_target_path())


def chatting(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def remade(calibrator: Calibrator, clean: Any, reference: Any, **changes: Any) -> Calibrator:
    made = Calibrator(
        clean,
        reference,
        calibrator.tokenizer,
        config=calibrator.config,
        context_length=calibrator.context_length,
        name="broken",
        **{"probes": calibrator.probes, **changes},
    )
    made.folder = calibrator.folder
    return made


def zeroed(model: Any) -> Any:
    empty = copy.deepcopy(model)
    for weight in empty.parameters():
        weight.zero_()
    return empty


@pytest.mark.parametrize("template", [None, CHAT, PARTS], ids=["plain", "chat", "parts"])
@pytest.mark.parametrize("rule", ["recommended", "product", "mixture"])
def test_the_shipped_calibrator_passes(
    english: Calibrator, demo: PreTrainedTokenizerFast, template: str | None, rule: Any
) -> None:
    assert len(english.probes) >= 6
    config = None if rule == "recommended" else FusionConfig(rule=rule, strength=0.3)
    tokenizer = demo if template is None else chatting(demo, template)
    FusionLogitsProcessor(english, tokenizer, config)


@pytest.mark.parametrize(
    "name", ["gpt2", "cl100k_base", "o200k_base", "tekken", "mistral_v1_sentencepiece", "smollm2"]
)
def test_the_shipped_calibrator_passes_on_real_tokenizers(english: Calibrator, name: str) -> None:
    folder = SHARED / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"there is no real tokenizer {name} beside the repository")
    FusionLogitsProcessor(english, AutoTokenizer.from_pretrained(folder))


def test_swapped_ids_in_the_vocabulary_map(
    english: Calibrator, demo: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = VocabularyMap.gather

    def mirrored(map_: Any, *args: Any, mode: Any) -> torch.Tensor:
        *others, places, (rows, width) = args
        swapped, order = (places + width - 1 - 2 * (places % width)).sort()
        found = gather(map_, *others, swapped, (rows, width), mode=mode)
        return torch.empty_like(found).index_copy(1, order, found)

    monkeypatch.setattr(VocabularyMap, "gather", mirrored)
    with pytest.raises(InertError, match=r"words to avoid move by .* the vocabulary map belongs"):
        FusionLogitsProcessor(english, demo)


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (
            CHAT.replace(CONTENT, "{{ message.content | replace(' ', eos_token) }}"),
            r"'\\n' instead",
        ),
        ("{% for m in messages if m.role == 'user' %}<|user|>\n{{ m.content }}{% endfor %}", "day"),
        (CHAT.replace(CONTENT, "{{ message.content | reverse }}"), r"'\\n' instead"),
    ],
    ids=["a new text at each space", "no answers", "reversed"],
)
def test_a_chat_template_that_hides_the_text(
    english: Calibrator, demo: PreTrainedTokenizerFast, template: str, seen: str
) -> None:
    with pytest.raises(InertError, match=f"in the chat template, the calibrator reads .*{seen}"):
        FusionLogitsProcessor(english, chatting(demo, template))


@pytest.mark.parametrize("rule", ["recommended", "product", "mixture"])
def test_clean_and_reference_swapped(
    english: Calibrator, demo: PreTrainedTokenizerFast, rule: Any
) -> None:
    config = None if rule == "recommended" else FusionConfig(rule=rule, strength=0.3)
    swapped = remade(english, english.reference, english.clean)
    with pytest.raises(InertError, match=r"words to avoid move by \+.* models are swapped"):
        FusionLogitsProcessor(swapped, demo, config)


def test_models_that_do_not_differ(english: Calibrator, demo: PreTrainedTokenizerFast) -> None:
    zero = zeroed(english.clean)
    for broken in (
        remade(english, english.clean, english.clean),
        remade(english, zero, zero),
        remade(english, english.clean, english.clean, probes=()),
    ):
        with pytest.raises(InertError, match=r"no token's score changes.*two models are equal"):
            FusionLogitsProcessor(broken, demo)
    with pytest.raises(InertError, match="words to avoid move by"):
        FusionLogitsProcessor(remade(english, zero, english.reference), demo)


@pytest.mark.parametrize("how", ["next token", "next byte"])
def test_wrongly_decoded_bytes(
    english: Calibrator,
    demo: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    class Shifted:
        @staticmethod
        def from_tokenizer(tokenizer: PreTrainedTokenizerFast) -> TokenTable:
            table = TokenTable.from_tokenizer(tokenizer)
            found = [text if text is None else bytes((b + 1) % 256 for b in text)
                     for text in table.token_bytes]  # fmt: skip
            if how == "next token":
                found = [*table.token_bytes[1:], table.token_bytes[0]]
            return dataclasses.replace(table, token_bytes=tuple(found))

    monkeypatch.setattr(processor_module, "TokenTable", Shifted)
    with pytest.raises(InertError, match=r"in plain text, the calibrator reads .* instead of"):
        FusionLogitsProcessor(english, demo)


@pytest.mark.parametrize(
    "changes",
    [{"clip": 1e-7}, {"threshold": 50.0}, {"plausibility": 1.0}, {"clip": 1e-4}],
    ids=str,
)
def test_settings_that_switch_fusion_off(
    english: Calibrator, demo: PreTrainedTokenizerFast, changes: dict[str, float]
) -> None:
    with pytest.raises(InertError, match="a tiny clip, a large threshold or a plausibility"):
        FusionLogitsProcessor(english, demo, english.config.replace(**changes))
    working = FusionLogitsProcessor(english, demo)
    with pytest.raises(InertError, match="a tiny clip"):
        working.with_settings(**changes)
    off = FusionLogitsProcessor(english, demo, english.config.replace(**changes), verify="off")
    off.with_settings(strength=1.0)


def test_weak_settings_pass(english: Calibrator, demo: PreTrainedTokenizerFast) -> None:
    working = FusionLogitsProcessor(english, demo, english.config.replace(strength=0.05))
    working.with_settings(threshold=0.5, kl_budget=0.01).with_settings(plausibility=0.5)


def test_what_to_do_is_a_choice(
    english: Calibrator,
    demo: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = remade(english, english.reference, english.clean)
    FusionLogitsProcessor(swapped, demo, verify="warn")
    assert caplog.text.count("with the calibrator broken, this processor fails its check") == 1
    with pytest.raises(ConfigError, match="verify must be one of raise, warn, off, not 'never'"):
        FusionLogitsProcessor(english, demo, verify="never")  # type: ignore[arg-type]

    def refuse(*args: Any, **how: Any) -> str:
        raise AssertionError

    monkeypatch.setattr(processor_module, "find_fault", refuse)
    FusionLogitsProcessor(swapped, demo, verify="off")
    # Strength 0 is a wish; the check is made up for once a strength is set.
    wish = FusionLogitsProcessor(swapped, demo, english.config.replace(strength=0))
    wish = wish.with_settings(strength=[0.0, 0.0])
    monkeypatch.undo()
    with pytest.raises(InertError, match="swapped"):
        wish.with_settings(strength=1.0)


def test_a_calibrator_without_probes_costs_one_small_step(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    calls: list[int] = []
    gather = VocabularyMap.gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            VocabularyMap,
            "gather",
            lambda *args, **how: calls.append(len(args[1].block)) or gather(*args, **how),
        )
        FusionLogitsProcessor(calibrator, other_tokenizer)
    assert len(calls) == 1
    alone = Calibrator(calibrator.clean, None, calibrator.tokenizer, probes=[PROBE])
    FusionLogitsProcessor(alone, other_tokenizer)


def test_the_check_leaves_nothing_behind(
    english: Calibrator, demo: PreTrainedTokenizerFast
) -> None:
    checked = FusionLogitsProcessor(english, demo)
    assert checked._sessions == {}
    rows, scores = [demo("You are a")["input_ids"]], torch.randn(1, len(demo))
    plain = FusionLogitsProcessor(english, demo, verify="off")
    assert torch.equal(checked.fuse_rows(rows, scores), plain.fuse_rows(rows, scores))


def test_probes_are_saved_with_the_calibrator(calibrator: Calibrator, tmp_path: Path) -> None:
    made = remade(calibrator, calibrator.clean, calibrator.reference, probes=[PROBE])
    made.save_pretrained(tmp_path / "made")
    again = Calibrator.from_pretrained(tmp_path / "made")
    assert again.probes == made.probes
    assert [probe.to_json() for probe in again.probes] == [PROBE]
    calibrator.save_pretrained(tmp_path / "none")
    assert "probes" not in json.loads((tmp_path / "none" / "calibrator.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("kept"), "probe 0 is .* the non-empty lists of words"),
        (lambda p: p.update(kept=[]), "probe 0 is"),
        (lambda p: p.update(avoided=" bad"), "probe 0 is"),
        (lambda p: p.update(avoided=[" bad", ""]), "probe 0 is"),
        (lambda p: p.update(context=" "), "probe 0 is"),
        (lambda p: p.update(also=1), "probe 0 is"),
    ],
    ids=["no kept", "empty kept", "no list", "empty word", "empty context", "another field"],
)
def test_damaged_probes(
    calibrator_folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = calibrator_folder / "calibrator.json"
    probe = copy.deepcopy(PROBE)
    change(probe)
    path.write_text(json.dumps({**json.loads(path.read_text()), "probes": [probe]}))
    with pytest.raises(CalibratorError, match=f"calibrator.json: {message}"):
        Calibrator.from_pretrained(calibrator_folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "probes": {}}))
    with pytest.raises(CalibratorError, match=r"probes must be a JSON array, but is \{\}"):
        Calibrator.from_pretrained(calibrator_folder)

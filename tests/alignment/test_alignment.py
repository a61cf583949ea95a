"""Learning an alignment: known solutions, reading embeddings, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from fusion_detox.alignment.alignment import (
    align,
    align_tables,
    common_tokens,
    learn_matrix,
    retrieval,
)
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.alignment.embeddings import (
    EmbeddingTable,
    checkpoint_embeddings,
    model_embeddings,
)
from fusion_detox.alignment.infonce import infonce_loss
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.errors import AlignmentError, ConfigError, ModelError, ModelNotFoundError
from fusion_detox.vocabulary.token_table import TokenTable

TOKENS, OWN, TARGET = 300, 16, 24


@pytest.fixture(scope="module")
def rotated() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and the same embeddings rotated in a wider space, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(TOKENS, OWN, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(TARGET, TARGET, generator=generator))
    wide = torch.nn.functional.pad(own, (0, TARGET - OWN)) @ turn
    return own, wide + 0.05 * torch.randn(TOKENS, TARGET, generator=generator)


CONFIGS = {
    "procrustes": AlignmentConfig(),
    "paper": AlignmentConfig.paper().replace(epochs=200),
    "from procrustes": AlignmentConfig(epochs=2),
}


def found(own: torch.Tensor, target: torch.Tensor, config: AlignmentConfig) -> dict[str, float]:
    """Measures retrieval of the last 60 tokens, with a matrix learned from all others."""
    matrix = learn_matrix(own[:-60], target[:-60], config, show_progress=False)
    assert matrix.shape == (OWN, TARGET)
    return retrieval(own[-60:] @ matrix, target, torch.arange(TOKENS - 60, TOKENS))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_config_finds_a_known_rotation(
    config: AlignmentConfig, rotated: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert found(*rotated, config)["at_1"] > 0.9


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_unrelated_embeddings_are_retrieved_at_chance(
    config: AlignmentConfig, rotated: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Of 300 candidates, chance finds 1/300 at the first rank and 10/300 in the top ten."""
    other = torch.randn(TOKENS, TARGET, generator=torch.Generator().manual_seed(1))
    accuracy = found(rotated[0], other, config)
    assert accuracy["at_1"] <= 0.05
    assert accuracy["at_10"] <= 0.15


def test_procrustes_is_orthogonal_up_to_a_scale(
    rotated: tuple[torch.Tensor, torch.Tensor],
) -> None:
    matrix = learn_matrix(*rotated, AlignmentConfig(), show_progress=False)
    gram = matrix @ matrix.t()
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(OWN), atol=1e-4, rtol=1e-4)


def test_loss_is_the_papers(rotated: tuple[torch.Tensor, torch.Tensor]) -> None:
    """One positive and K random negatives, computed token by token."""
    own, target = rotated
    matrix = torch.randn(OWN, TARGET, generator=torch.Generator().manual_seed(3)) / 8
    batch = torch.arange(7)
    drawn = torch.randint(TOKENS, (7, 10), generator=torch.Generator().manual_seed(4))
    loss = infonce_loss(matrix, own, target, batch, 10, torch.Generator().manual_seed(4))
    terms = []
    for t in range(7):
        positive = float((own[t] @ matrix) @ target[t])
        others = [float((own[t] @ matrix) @ target[n]) for n in drawn[t].tolist() if n != t]
        everything = torch.tensor([positive, *others]).logsumexp(0)
        terms.append(float(everything) - positive)
    assert float(loss) == pytest.approx(sum(terms) / 7, rel=1e-5)


def test_retrieval_counts_ranks() -> None:
    candidates = torch.eye(20)
    queries = torch.eye(20)[:4].clone()
    queries[1, :5] = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])  # the answer ranks fourth
    queries[2, 5:] = 2.0  # fifteen candidates are nearer
    queries[2, 2] = 1.0
    assert retrieval(queries, candidates, torch.arange(4)) == {"at_1": 0.5, "at_10": 0.75}


def test_a_collapsed_matrix_retrieves_nothing() -> None:
    for value in (1.0, torch.nan):
        same = torch.full((20, 4), value)
        assert retrieval(same, torch.randn(20, 4), torch.arange(20))["at_1"] <= 0.05
        assert retrieval(torch.randn(20, 4), same, torch.arange(20))["at_1"] == 0


def table(
    token_bytes: list[bytes | None], byte_ids: frozenset[int] = frozenset()
) -> EmbeddingTable:
    tokens = TokenTable(tuple(token_bytes), "byte-level", frozenset(), frozenset(), False, byte_ids)
    return EmbeddingTable(torch.randn(len(token_bytes), 4), tokens, "a model")


def test_common_tokens_are_matched_by_bytes() -> None:
    here = table([b"a", None, b" the", b"\xe6", b"x", b""])
    # A <0x61> twin before the normal token, and one after it.
    there = table([b"a", b"a", b"\xe6", None, b" the", b"b"], frozenset({0}))
    assert common_tokens(here, there) == [(0, 1), (2, 4), (3, 2)]
    later = table([b"\xe6", b"a", b"a"], frozenset({2}))
    assert common_tokens(here, later) == [(0, 1), (3, 0)]


def test_no_common_tokens_raise() -> None:
    with pytest.raises(AlignmentError, match=r"a model have 0 tokens in common, .* contrast rule"):
        align_tables(table([b"a", b"b"]), table([b"c", b"d"]), AlignmentConfig())


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory,
    make_llama: Any,
    other_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """An untied Llama, saved in shards; one of them holds the output embeddings."""
    folder = tmp_path_factory.mktemp("target") / "llama"
    model = make_llama(len(other_tokenizer) + 7, seed=3, tie_word_embeddings=False)
    model.save_pretrained(folder, max_shard_size="60KB")
    other_tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.mark.parametrize("kind", ["input", "output"])
def test_only_the_embedding_of_a_target_is_read(
    kind: str, target: Path, tmp_path: Path, calibrator: Calibrator, other_tokenizer: Any
) -> None:
    """With all other shards deleted, the alignment equals that of the loaded model."""
    config = AlignmentConfig(embeddings=kind)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(target)
    wanted = align(calibrator, model, other_tokenizer, config=config, show_progress=False)
    folder = Path(shutil.copytree(target, tmp_path / "copy"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "lm_head.weight" if kind == "output" else "model.embed_tokens.weight"
    removed = [path for path in folder.glob("*.safetensors") if path.name != index[name]]
    for path in removed:
        path.unlink()
    assert removed
    alignment = align(calibrator, folder, config=config, show_progress=False)
    torch.testing.assert_close(alignment.matrix, wanted.matrix)
    assert alignment.fingerprint == wanted.fingerprint
    alignment.check_target(model, other_tokenizer)
    alignment.check_calibrator(calibrator)


def test_the_fingerprint_covers_embedding_and_vocabulary(
    target: Path, other_tokenizer: Any, byte_tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target)
    half = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    whole = model_embeddings(model, other_tokenizer, "output").fingerprint("output")
    assert model_embeddings(half, other_tokenizer, "output").fingerprint("output") == whole
    assert checkpoint_embeddings(target, "output").fingerprint("output") == whole
    assert checkpoint_embeddings(target, "input").fingerprint("input") != whole
    assert model_embeddings(model, byte_tokenizer, "output").fingerprint("output") != whole
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 0.1
    assert model_embeddings(model, other_tokenizer, "output").fingerprint("output") != whole


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpoints_with_other_tensor_names(
    family: str,
    tied: bool,
    tmp_path: Path,
    make_gpt2: Any,
    make_llama: Any,
    other_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Published files may have prefixes that the module lacks, or lack prefixes that it has."""
    make = make_gpt2 if family == "gpt2" else make_llama
    model = make(len(other_tokenizer), seed=3, tie_word_embeddings=tied)
    base, embedding = ("transformer", "wte") if family == "gpt2" else ("model", "embed_tokens")
    renames = {
        "stripped": lambda name: name.removeprefix(f"{base}."),
        "wrapped": lambda name: f"language_model.{name}",
        "saved": lambda name: name,
    }
    for label, rename in renames.items():
        folder = tmp_path / label
        model.save_pretrained(folder)
        other_tokenizer.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert ("lm_head.weight" in tensors) != tied
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        for kind, weight in (
            ("input", model.get_input_embeddings().weight),
            ("output", model.get_output_embeddings().weight),
        ):
            found = checkpoint_embeddings(folder, kind).weight  # type: ignore[arg-type]
            torch.testing.assert_close(found, weight.detach())
    assert any(embedding in name for name in renamed)


def damaged(target: Path, place: Path, name: str, **changes: Any) -> Path:
    """A copy in a single file, with one tensor removed or replaced."""
    folder = place / "damaged"
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(folder)
    for path in target.glob("tokenizer*"):
        shutil.copy(path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file({**tensors, **changes}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_missing_embedding_raises(target: Path, tmp_path: Path, calibrator: Calibrator) -> None:
    folder = damaged(target, tmp_path, "lm_head.weight")
    with pytest.raises(
        AlignmentError, match=r"no tensor lm_head.weight .*such as model.embed_tokens.weight"
    ):
        align(calibrator, folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(448, 32, dtype=torch.int8), "stored as torch.int8, so the model is quantised"),
        (torch.zeros(448, 31), r"the shape \[448, 31\], but config.json says"),
        (torch.full((448, 32), torch.nan), "hold values that are not finite"),
    ],
)
def test_an_unusable_embedding_raises(
    tensor: torch.Tensor, message: str, target: Path, tmp_path: Path, calibrator: Calibrator
) -> None:
    folder = damaged(target, tmp_path, "lm_head.weight", **{"lm_head.weight": tensor})
    with pytest.raises(AlignmentError, match=message):
        align(calibrator, folder)


def test_damaged_files_raise(target: Path, tmp_path: Path, calibrator: Calibrator) -> None:
    folder = Path(shutil.copytree(target, tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"]["lm_head.weight"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is truncated or not a safetensors file"):
        align(calibrator, folder)
    shard.unlink()
    with pytest.raises(ModelError, match=r"is missing, but model.safetensors.index.json lists it"):
        align(calibrator, folder)
    index.write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}')
    with pytest.raises(ModelError, match="points outside its folder"):
        align(calibrator, folder)
    index.write_text("{")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        align(calibrator, folder)
    index.unlink()
    with pytest.raises(ModelError, match="holds neither"):
        align(calibrator, folder)


def test_unusable_targets_raise(
    tmp_path: Path, calibrator: Calibrator, other_tokenizer: Any, make_llama: Any
) -> None:
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(other_tokenizer), intermediate_size=16, **settings)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    other_tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ModelError, match=r"is an encoder \(bert\), which reads text in both directions"
    ):
        align(calibrator, tmp_path / "bert")
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        align(calibrator, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="a loaded target needs its tokenizer"):
        align(calibrator, make_llama(len(other_tokenizer)))


def test_identity_needs_equal_widths(
    calibrator: Calibrator, make_llama: Any, other_tokenizer: Any
) -> None:
    config = AlignmentConfig(start="identity")
    same = make_llama(len(other_tokenizer), seed=3)
    alignment = align(calibrator, same, other_tokenizer, config=config, show_progress=False)
    assert torch.equal(alignment.matrix, torch.eye(32))
    wider = make_llama(len(other_tokenizer), seed=3, hidden_size=40)
    with pytest.raises(AlignmentError, match="have width 32 and the target's have width 40"):
        align(calibrator, wider, other_tokenizer, config=config, show_progress=False)


def test_divergence_raises(rotated: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = AlignmentConfig(start="random", epochs=2, learning_rate=1e37)
    with pytest.raises(AlignmentError, match="diverged at learning_rate 1e"):
        learn_matrix(*rotated, config, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": "middle"}, "embeddings must be one of output, input, not 'middle'"),
        ({"start": "zero"}, "start must be one of procrustes, random, identity, not 'zero'"),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, but is -1"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2, but is 1"),
        ({"held_out": 0.7}, "held_out must be a number above 0 and at most 0.5, but is 0.7"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, but is nan"),
        ({"start": "random"}, "nothing would be learned: set epochs"),
        ({"negatives": 0}, "negatives must be a whole number of at least 1, but is 0"),
        ({"epoch": 1}, "unknown alignment settings: epoch; the known ones are embeddings, start"),
    ],
)
def test_invalid_settings_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AlignmentConfig().replace(**changes)

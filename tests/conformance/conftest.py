"""The setting of each conformance test: a target, a shared processor, and the definition."""

from __future__ import annotations

import functools

import pytest
import torch

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor

from .definition import AsProcessor, Definition
from .search import Search

CONFIG = FusionConfig(
    strength=1.5, plausibility=1e-4, threshold=0.05, context_kl=0.07, context_limit=0.1
)
# Both end inside a word whose beginning the calibrator would tokenise differently.
TEXTS = ["The weather was fine, you idio", "You are a complete idiot and nobody is so stupi"]
VOCABULARIES = {
    "same": "byte_tokenizer",
    "bytes": "other_tokenizer",
    "sentencepiece": "sentencepiece_tokenizer",
}


class Case:
    """A target with its tokenizer, and both ways to fuse.

    ``processor`` is one object for all tests of a vocabulary. Earlier tests must not affect
    later ones.
    """

    def __init__(self, calibrator, tokenizer, make_llama, pad=None):
        self.calibrator, self.tokenizer = calibrator, tokenizer
        self.eos = tokenizer.eos_token_id
        self.pad = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.pad = self.pad if pad is None else pad
        # Heads are often wider than their tokenizer.
        self.width = len(tokenizer) + 3
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": self.eos}
        self.model = make_llama(self.width, seed=5, pad_token_id=self.pad, **ends)
        self.assistant = make_llama(self.width, seed=6, pad_token_id=self.pad, **ends)
        self.processor = FusionLogitsProcessor(calibrator, tokenizer, CONFIG, pad_token_id=self.pad)
        self.definition = self.definition_of(CONFIG)
        self.reference = AsProcessor(self.definition, self.width)
        self.inputs = self.encode(TEXTS)
        self.length = self.inputs["input_ids"].shape[1]
        self.negative = self.encode(["In 1987 the", "She reads three"])["input_ids"][:, -3:]

    def definition_of(self, config):
        return Definition(
            self.calibrator, self.tokenizer, self.processor.vocabulary, config, self.pad
        )

    def encode(self, texts):
        """Encode with left padding, using EOS if there is no padding token, as GPT-2 users do."""
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        short = [longest - len(row) for row in rows]
        pairs = list(zip(rows, short, strict=True))
        return {
            "input_ids": torch.tensor([[self.pad] * n + row for row, n in pairs]),
            "attention_mask": torch.tensor([[0] * n + [1] * len(row) for row, n in pairs]),
        }

    @functools.cached_property
    def plain(self):
        """The definition's fused greedy continuation of each prompt."""
        return [row[self.length :] for row in self.greedy(TEXTS, 6)]

    def greedy(self, texts, steps, **options):
        """Return the definition's fused greedy sequences for these texts."""
        prompts = self.encode(texts)["input_ids"].tolist()
        return self.search(prompts, max_new_tokens=steps, **options).sample()[0]

    def search(self, prompts, **options):
        fused = options.pop("fused", self.definition)
        return Search(self.model, fused, prompts, self.pad, self.eos, options)

    def allowed(self, which, ids):
        """Return some two dozen tokens, which differ by prompt and length."""
        return [i for i in range(3, self.width - 3) if (i + which + len(ids)) % 17 == 0]

    def generate(self, seed=11, processor=None, model=None, **options):
        """Run the library: ``generate`` with the shared processor."""
        torch.manual_seed(seed)
        given = {"max_new_tokens": 5, "do_sample": False, **options}
        if "inputs_embeds" not in given and "input_ids" not in given:
            given = {**self.inputs, **given}
        return (model or self.model).generate(
            logits_processor=[processor or self.processor], pad_token_id=self.pad, **given
        )


@pytest.fixture(scope="session")
def cases(byte_tokenizer, make_llama, request, tmp_path_factory):
    """Return a case by the name of its vocabulary; each is built once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.mktemp("maps")))
    width = len(byte_tokenizer)
    models = [make_llama(width, seed=seed) for seed in (1, 2)]
    words = {"idiot": 2.0, "stupid": 1.5, "the": 0.6, "was": 0.8, "e": 0.4}
    calibrator = Calibrator(*models, byte_tokenizer, context_length=16, name="tiny", words=words)

    @functools.cache
    def get(name):
        tokenizer = request.getfixturevalue(VOCABULARIES[name])
        return Case(calibrator, tokenizer, make_llama)

    yield get
    patch.undo()


@pytest.fixture(params=VOCABULARIES)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def one(cases):
    """The byte-level target alone, for tests in which the vocabulary does not matter."""
    return cases("bytes")

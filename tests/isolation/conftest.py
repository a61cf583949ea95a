"""One calibrator, and one map per vocabulary, for all tests of a file."""

import pytest

from fusion_detox import Calibrator, FusionLogitsProcessor

from .world import CONFIGS


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.mktemp("maps")))
        yield


@pytest.fixture(scope="module")
def shared(byte_tokenizer, make_llama):
    """One calibrator for all processors of a file."""
    width = len(byte_tokenizer)
    return Calibrator(
        make_llama(width, seed=1), make_llama(width, seed=2), byte_tokenizer, context_length=32
    )


@pytest.fixture(scope="module")
def pristine(shared, request):
    """Return a processor by vocabulary and config. It never runs; tests run copies (``fresh``)."""
    made = {}

    def make(vocabulary, config="contrast"):
        if (vocabulary, config) not in made:
            tokenizer = request.getfixturevalue(vocabulary)
            made[vocabulary, config] = FusionLogitsProcessor(shared, tokenizer, CONFIGS[config])
        return made[vocabulary, config]

    return make

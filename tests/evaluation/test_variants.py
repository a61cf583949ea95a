import pytest
import torch
from transformers.generation import NoBadWordsLogitsProcessor

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.variants import parse_variant, parse_variants, variant_stem
from fusion_detox.evaluation.word_filter import WordFilter, read_word_list, tokenisations

RECOMMENDED = FusionConfig(strength=1.5, threshold=0.5, plausibility=1e-4)


def test_default_resolves_to_the_recommended_settings():
    assert parse_variant("default").resolve(RECOMMENDED) == RECOMMENDED


def test_changes_start_from_the_recommended_settings():
    setting = parse_variant("contrast:strength=2,kl_budget=0.5,outside=remove")
    assert setting.resolve(RECOMMENDED) == RECOMMENDED.replace(
        strength=2.0, kl_budget=0.5, outside="remove"
    )
    assert parse_variant("default:kl_budget=none").resolve(RECOMMENDED) == RECOMMENDED


@pytest.mark.parametrize("rule", ["mixture", "product", "aligned"])
def test_plain_rules_start_from_plain_settings(rule):
    config = parse_variant(f"{rule}:strength=0.3").resolve(RECOMMENDED.replace(kl_budget=0.1))
    assert config == FusionConfig(rule=rule, strength=0.3, plausibility=0.0)


def test_the_base_comes_first_and_only_once():
    names = [one.name for one in parse_variants(["default", "base", "wordfilter", "default"])]
    assert names == ["base", "default", "wordfilter"]


def test_named_settings():
    mine = FusionConfig(strength=3.0)
    settings = parse_variants({"mine": mine, "plain": "mixture@other/model:strength=0.2"})
    assert [one.name for one in settings] == ["base", "mine", "plain"]
    assert settings[1].resolve(RECOMMENDED) is mine
    assert settings[2].calibrator == "other/model"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("contrst:strength=2", "'contrst:strength=2' is unknown; write base, wordfilter"),
        ("contrast:", "is not complete"),
        ("contrast@:strength=1", "is not complete"),
        ("contrast:strength", "'strength' in the setting 'contrast:strength' is not name=value"),
        ("contrast:strength=1,strength=2", "gives strength twice"),
        ("wordfilter:strength=1", "takes no changes"),
        ("base@x", "takes no changes"),
        ("", "is unknown"),
    ],
)
def test_malformed_specifications(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_variant(spec)


def test_an_error_for_a_value_out_of_range_names_the_setting():
    with pytest.raises(ConfigError, match=r"'mixture:strength=2': strength must be .* at most 1"):
        parse_variant("mixture:strength=2").resolve(RECOMMENDED)
    with pytest.raises(ConfigError, match="unknown fusion settings: strenght"):
        parse_variant("default:strenght=2").resolve(RECOMMENDED)


def test_settings_must_be_a_list():
    with pytest.raises(ConfigError, match=r"write \['default'\]"):
        parse_variants("default")
    with pytest.raises(ConfigError, match="'base' cannot name a setting"):
        parse_variants({"base": FusionConfig()})


def test_stems_are_file_names_that_depend_on_the_identity():
    one = variant_stem("contrast:strength=2,x/y", {"a": 1})
    assert one != variant_stem("contrast:strength=2,x/y", {"a": 2})
    assert one == variant_stem("contrast:strength=2,x/y", {"a": 1})
    assert "/" not in one
    assert len(variant_stem("x" * 500, {})) < 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, but is 0"),
        ({"threshold": 0.0}, "threshold must be a number above 0 and at most 1, but is 0.0"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "distinct values"),
        ({"scorers": ()}, "at least one scorer"),
        ({"scorers": "lexical"}, "a tuple of"),
        ({"suites": ("identiti",)}, "unknown suites: identiti; choose from identity, dialect"),
        ({"harmless_tokens": 1}, "at least 2"),
        ({"resamples": 0}, "resamples must be a whole number of at least 1, but is 0"),
        ({"top_p": 0.0}, "top_p must be a number above 0"),
    ],
)
def test_evaluation_settings_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**values)


class TestWordFilter:
    def test_the_word_filter_equals_the_processor_of_transformers(self, other_tokenizer):
        sequences = tokenisations(other_tokenizer, ["idiot", "shut up", "Zürich"])
        assert any(len(ids) > 2 for ids in sequences)
        reference = NoBadWordsLogitsProcessor(sequences, eos_token_id=[-1])
        ours = WordFilter(sequences)
        torch.manual_seed(0)
        for ids in sequences:
            rows = torch.tensor([[5, 6, 7, 8, *ids[:-1]], [*ids[:-1], 5, 6, 7, 8]])
            scores = torch.randn(2, len(other_tokenizer))
            before = scores.clone()
            assert torch.equal(ours(rows, scores), reference(rows, scores.clone()))
            assert torch.equal(scores, before)

    def test_every_spelling(self, byte_tokenizer):
        texts = {byte_tokenizer.decode(ids) for ids in tokenisations(byte_tokenizer, ["idiot"])}
        assert {"idiot", " idiot", "Idiot", " IDIOT"} <= texts

    def test_a_word_list_of_ones_own(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("one\n\n two \r\none\n")
        words, facts = read_word_list(path)
        assert words == ["one", "two"]
        assert facts["list"] == "words.txt"
        assert facts["words"] == 2

    def test_wrong_word_lists(self, tmp_path):
        with pytest.raises(DataFileError, match=r"cannot read the word list .*No such file"):
            read_word_list(tmp_path / "none.txt")
        path = tmp_path / "words.txt"
        path.write_text(" \n")
        with pytest.raises(DataError, match=r"words\.txt holds no words"):
            read_word_list(path)
        path.write_bytes(b"caf\xe9\n")
        with pytest.raises(DataError, match="not UTF-8"):
            read_word_list(path)

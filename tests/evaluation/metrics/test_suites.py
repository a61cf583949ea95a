"""The suites of harmless texts: complete, paired, grammatical, harmless by a scorer."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.evaluation.metrics import suites
from fusion_detox.evaluation.metrics.suites import (
    Suite,
    SuiteText,
    hatecheck_suite,
    load_suite,
    suite_from_file,
)
from fusion_detox.scoring.lexical import LexicalScorer

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
IDENTITY = json.loads(Path(suites.__file__).with_name("data").joinpath("identity.json").read_text())
# Texts that the lexical scorer calls toxic: "trigger a build", a few parts of the body, and some
# groups in two of the templates. No text was changed or chosen because of it.
CALLED_TOXIC = {"benign": 1, "dialect": 0, "general": 6, "identity": 12}


def groups(suite):
    """The groups that are compared with the control, in the order of the texts."""
    return tuple(dict.fromkeys(t.group for t in suite.texts if not t.control and t.group))


def controls(suite):
    return tuple(text for text in suite.texts if text.control)


def of_group(suite, group):
    return tuple(t for t in suite.texts if t.group == group and not t.control)


every_suite = pytest.mark.parametrize("name", sorted(CALLED_TOXIC))


def by_pair(suite: Suite) -> dict[str, list[SuiteText]]:
    pairs: defaultdict[str, list[SuiteText]] = defaultdict(list)
    for text in suite.texts:
        assert text.pair is not None
        pairs[text.pair].append(text)
    return pairs


def test_all_suites_are_known() -> None:
    assert set(suites._BUILT_IN) == set(CALLED_TOXIC)


@every_suite
def test_texts_are_unique_and_clean(name: str) -> None:
    found = [text.text for text in load_suite(name).texts]
    assert len(set(found)) == len(found)
    for text in found:
        assert text == " ".join(text.split())
        assert text[0].isupper() or text[0] == '"'
        assert text[-1] in '.?!"'
        assert not set("{}|<>_") & set(text)


@every_suite
def test_a_and_an_match_the_following_word(name: str) -> None:
    """By the first letter, with exceptions for words whose sound differs."""
    otherwise = {"hour", "one", "university", "used", "user"}
    for text in load_suite(name).texts:
        for article, word in re.findall(r"\b(an?) ([A-Za-z]+)", text.text, flags=re.IGNORECASE):
            vowel = (word[0].lower() in "aeiou") != (word.lower() in otherwise)
            assert (article.lower() == "an") == vowel, text.text


@every_suite
def test_every_suite_states_its_origin_and_limits(name: str) -> None:
    record = load_suite(name).record
    assert record["licence"] == "Apache-2.0"
    assert min(len(record[fact]) for fact in ("description", "origin", "limits")) > 20
    assert re.fullmatch(r"[0-9a-f]{16}", record["sha256"])
    json.dumps(record)


@every_suite
def test_the_lexical_scorer_calls_few_of_them_toxic(name: str) -> None:
    scores = LexicalScorer.load().score([text.text for text in load_suite(name).texts])
    assert sum(score >= 0.5 for score in scores) <= CALLED_TOXIC[name]


def test_identity_has_every_template_for_every_group_and_control() -> None:
    suite = load_suite("identity")
    pairs = by_pair(suite)
    assert len(pairs) >= 25
    assert len(groups(suite)) >= 20
    for texts in pairs.values():
        assert Counter(t.group for t in texts if not t.control) == Counter(groups(suite))
        assert sum(text.control for text in texts) == len(IDENTITY["controls"])
    assert len(controls(suite)) == len(pairs) * len(IDENTITY["controls"])
    assert {len(of_group(suite, group)) for group in groups(suite)} == {len(pairs)}
    kinds = {text.label for text in suite.texts if not text.control}
    assert kinds == {
        *("gender", "religion", "ethnicity or nationality"),
        *("sexual orientation", "disability", "age"),
    }


def test_texts_of_a_pair_differ_only_in_the_group() -> None:
    """Without the group's name, all texts of a pair are identical."""
    names = [n for entry in (*IDENTITY["groups"], *IDENTITY["controls"]) for n in entry.values()]
    # Longest first, because "women" is part of "lesbian women".
    names = sorted({n for n in names if n not in ("gender", "age")}, key=len, reverse=True)
    anywhere = re.compile("|".join(rf"\b{re.escape(n)}\b" for n in names), flags=re.IGNORECASE)
    for texts in by_pair(load_suite("identity")).values():
        frames = {anywhere.sub("*", text.text) for text in texts}
        assert len(frames) == 1
        assert frames.pop().count("*") == 1


def test_dialect_pairs_are_complete_and_state_their_feature() -> None:
    suite = load_suite("dialect")
    pairs = by_pair(suite)
    assert len(pairs) >= 60
    assert groups(suite) == ("African American English",)
    for spoken, standard in pairs.values():
        assert (spoken.control, standard.control) == (False, True)
        assert standard.group == "Standard American English"
        assert spoken.text != standard.text
        assert spoken.label == standard.label
        # Same content: both texts share many words, compared by their first three letters.
        words = [{w[:3] for w in re.findall(r"\w+", t.text.lower())} for t in (spoken, standard)]
        assert len(words[0] & words[1]) >= 0.4 * min(map(len, words))
    features = Counter(text.label for text in controls(suite))
    assert len(features) >= 15
    assert features["habitual be"] >= 5
    assert "not collected" in suite.record["origin"]


def test_benign_prompts_sound_unsafe_or_mention_groups() -> None:
    suite = load_suite("benign")
    assert len(suite.texts) >= 80
    assert len(groups(suite)) >= 15
    assert {text.label for text in suite.texts if text.group} == {"group"}
    assert len({text.label for text in suite.texts}) >= 8
    assert not controls(suite)


def test_general_texts_vary() -> None:
    """No templates: few 5-grams occur in two texts, and no two texts begin alike."""
    found = [text.text for text in load_suite("general").texts]
    assert len(found) >= 150
    lengths = [len(text.split()) for text in found]
    assert min(lengths) >= 20
    assert max(lengths) <= 60
    assert len({tuple(text.split()[:3]) for text in found}) == len(found)
    runs: Counter[tuple[str, ...]] = Counter()
    for text in found:
        words = re.findall(r"\w+", text.lower())
        runs.update({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    assert sum(count > 1 for count in runs.values()) <= 5


def test_unknown_suite() -> None:
    with pytest.raises(ConfigError, match="no suite 'identities'; choose from benign, dialect"):
        load_suite("identities")


def test_missing_or_broken_data_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "_DATA", tmp_path)
    with pytest.raises(DataFileError, match="reinstall the package"):
        load_suite("general")
    (tmp_path / "general.json").write_text("{")
    with pytest.raises(DataFileError, match="reinstall the package"):
        load_suite("general")


def test_your_own_texts(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"text": "One.", "group": "A", "pair": "p"},
        {"text": "Two.", "control": True, "pair": "p", "label": "x"},
        {"text": "Three.", "group": None, "control": False},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = suite_from_file(file)
    assert (suite.name, groups(suite)) == ("mine", ("A",))
    assert suite.texts == (
        SuiteText("One.", "A", "p"),
        SuiteText("Two.", None, "p", control=True, label="x"),
        SuiteText("Three."),
    )
    assert of_group(suite, "A") == suite.texts[:1]
    assert controls(suite) == suite.texts[1:2]
    assert suite.record["file"] == "mine.jsonl"
    (tmp_path / "mine.csv").write_text("text,group,control\nOne.,A,\nTwo.,,TRUE\n")
    assert suite_from_file(tmp_path / "mine.csv").texts == (
        SuiteText("One.", "A"),
        SuiteText("Two.", control=True),
    )
    (tmp_path / "mine.txt").write_text("One.\nTwo.\n")
    assert [text.text for text in suite_from_file(tmp_path / "mine.txt").texts] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "One."}\n{"txt": "Two."}\n', "line 2 has no field 'text'; it has: txt"),
        ('{"text": " "}\n', "line 1: the text is blank"),
        ('{"text": "One.", "group": 3}\n', "'group' must hold text, but holds 3"),
        ('{"text": "One.", "control": "yes"}\n', "'control' must be true or false, but is 'yes'"),
        ('{"text": "One.", "control": 1}\n', "'control' must be true or false, but is 1"),
        ("", "is empty"),
    ],
)
def test_invalid_suite_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        suite_from_file(tmp_path / "mine.jsonl")
    with pytest.raises(DataFileError, match="there is no file"):
        suite_from_file(tmp_path / "none.jsonl")


def test_hatecheck_in_both_forms(tmp_path: Path) -> None:
    cases = [
        ("ident_neutral_nh", "A cup of tea.", "non-hateful", "women"),
        ("counter_quote_nh", "A walk.", "non-hateful", "immigrants"),
        ("target_obj_nh", "A chair.", "non-hateful", ""),
        ("negate_neg_nh", "No chair.", "non-hateful", "women"),
        ("derog_impl_h", "A stone.", "hateful", "women"),
    ]
    published = "functionality,case_id,test_case,label_gold,target_ident\n" + "".join(
        f"{f},{i},{t},{label},{target}\n" for i, (f, t, label, target) in enumerate(cases)
    )
    converted = "".join(
        json.dumps({"functionality": f, "text": t, "label": label, "target": target}) + "\n"
        for f, t, label, target in cases
    )
    (tmp_path / "test_suite_cases.csv").write_text(published)
    (tmp_path / "hatecheck.jsonl").write_text(converted)
    found = hatecheck_suite(tmp_path / "test_suite_cases.csv")
    assert found.texts == hatecheck_suite(tmp_path / "hatecheck.jsonl").texts
    assert found.texts == (
        SuiteText("A cup of tea.", "women", label="ident_neutral_nh"),
        SuiteText("A walk.", "immigrants", label="counter_quote_nh"),
        SuiteText("A chair.", None, control=True, label="target_obj_nh"),
    )
    (tmp_path / "other.jsonl").write_text(converted.splitlines()[2])
    with pytest.raises(DataError, match="no non-hateful case that names a group"):
        hatecheck_suite(tmp_path / "other.jsonl")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published HateCheck is missing")
def test_the_published_hatecheck() -> None:
    suite = hatecheck_suite(DATA / "hatecheck.jsonl.gz")
    assert len(groups(suite)) == 7
    assert len(controls(suite)) == 50 + 35 + 32 + 30
    assert len(suite.texts) - len(controls(suite)) == 61 + 103 + 75 + 77

"""Every number of the headline is that of the results, and it claims no more."""

import math
import re

import pytest

from fusion_detox.evaluation.report.html import write_report
from fusion_detox.evaluation.report.plots import group_panels
from fusion_detox.evaluation.report.reading import Run

from .documents import results, setting
from .page import read, said, sentence


def rounded(printed, value):
    """Whether a printed number is the value, rounded to the digits that it shows."""
    number = float(printed.replace("−", "-").replace(",", ""))
    places = len(printed.partition(".")[2])
    return math.isclose(number, value, abs_tol=0.5 * 10**-places + 1e-9)


# What the headline prints, (#) for a number, and where in the results each number comes from.
HEADLINE = {
    r"lexical scorer, (#) % of prompts \[(#) to (#)\] lead to at least one toxic continuation "
    r"of (\d+) at the setting “default”, instead of (#) % \[(#) to (#)\] without fusion: (#) "
    r"percentage points fewer \[(#) to (#)\] \(p = (#)\)\.": lambda b, f, w: [
        *(100 * v for v in f["toxicity"]["lexical"]["toxicity"]["probability"]),
        5,
        *(100 * v for v in b["toxicity"]["lexical"]["toxicity"]["probability"]),
        *(-100 * f["against_base"]["lexical"]["probability"]["difference"][i] for i in (0, 2, 1)),
        0.0001,
    ],
    r"contextual scorer, (#) % of prompts \[(#) to (#)\] lead .* instead of (#) % \[": (
        lambda b, f, w: [
            *(100 * v for v in f["toxicity"]["contextual"]["toxicity"]["probability"]),
            100 * b["toxicity"]["contextual"]["toxicity"]["probability"][0],
        ]
    ),
    r"perplexity of the text rises by (#) % \[(#) to (#)\] \(from (#) to (#)\)": (
        lambda b, f, w: [
            *(100 * (v - 1) for v in f["perplexity"]["relative"]),
            b["perplexity"]["token_weighted"][0],
            f["perplexity"]["token_weighted"][0],
        ]
    ),
    r"moves by (#) nats a token \[(#) to (#)\] \(KL\), and .* changes at (#) % of positions "
    r"\[(#) to (#)\]": lambda b, f, w: [
        *f["harmless"]["kl"],
        *(100 * v for v in f["harmless"]["top1_changed"]),
    ],
    r"(\d+) of (\d+) groups .*: gay people \(ratio (#) \[(#) to (#)\]\), African American "
    r"English \(ratio (#) \[.*and (\d) more": lambda b, f, w: [
        4,
        8,
        *f["groups"][5]["ratio"],
        f["groups"][6]["ratio"][0],
        1,
    ],
    r"^(#) % \[(#) to (#)\] of harmless requests that sound unsafe are refused": lambda b, f, w: [
        100 * v for v in f["refusal"]["rate"]
    ],
    r"word filter it is (#) % \[(#) to (#)\] by the lexical scorer \(more than with fusion, the "
    r"intervals do not overlap\) and (#) % .*perplexity changes by (#) % \[": lambda b, f, w: [
        *(100 * v for v in w["toxicity"]["lexical"]["toxicity"]["probability"]),
        100 * w["toxicity"]["contextual"]["toxicity"]["probability"][0],
        100 * (w["perplexity"]["relative"][0] - 1),
    ],
    r"runs at (#) times the target's speed \((#) tokens a second\)": lambda b, f, w: [
        f["cost"]["relative"],
        f["cost"]["tokens_per_second"],
    ],
    r"lexical scorer's AUC on human labels is (\S+) ": lambda b, f, w: [0.9498],
}


def test_every_number_of_the_headline_is_that_of_the_results(written):
    document = results()
    base, fused, word_filter = (document["settings"][i] for i in (0, 1, 5))
    title, lines = said(document)
    assert len(lines) == len(HEADLINE)  # no sentence is left unchecked
    page = read(written / "report.html").text
    for pattern, numbers in HEADLINE.items():
        pattern = pattern.replace("#", r"[−+\d.,]+")
        found = [match for text, _ in lines if (match := re.search(pattern, text))]
        assert len(found) == 1, pattern
        expected = numbers(base, fused, word_filter)
        assert len(expected) == len(found[0].groups())
        wrong = [
            pair for pair in zip(found[0].groups(), expected, strict=True) if not rounded(*pair)
        ]
        assert not wrong, pattern
        assert " ".join(found[0].string.split()) in page
    assert title == (
        "Fusion lowers toxicity according to the lexical and contextual scorers. "
        "Perplexity rises by 10\u202f%. Text of 4 of 8 groups loses more than its control."
    )
    assert title.replace("\u202f", " ") in page


def changed(scorers=("lexical", "contextual"), base=0.64, fused=0.6, **against):
    """A run of two settings with one comparison, the same by all scorers."""
    document = results(
        [
            setting("base", "base", base, 114.3, scorers=scorers),
            setting("default", "fusion", fused, 125.4, 1.5, scorers=scorers),
        ]
    )
    document["scorers"] = {name: document["scorers"][name] for name in scorers}
    for scorer in scorers:
        document["settings"][1]["against_base"][scorer]["probability"] = against or None
    return document


@pytest.mark.parametrize(
    ("difference", "p_value", "words", "tone"),
    [
        (
            [-0.1, -0.15, -0.05],
            0.0004,
            "10 percentage points fewer [5 to 15] (p = 0.0004).",
            "good",
        ),
        ([0.1, 0.05, 0.15], 0.002, "10 percentage points more [5 to 15] (p = 0.0020)", "bad"),
        ([-0.02, -0.06, 0.02], 0.4, "−2 percentage points [−6 to +2] (p = 0.40) may be", "unclear"),
        # Interval and p value disagree: no claim is made.
        ([-0.05, -0.09, -0.01], 0.06, "may be chance", "unclear"),
        ([-0.05, -0.11, 0.01], 0.04, "may be chance", "unclear"),
        ([-0.1, None, None], None, "was not tested", "unclear"),
        ([-0.1, None, None], 0.001, "10.0 percentage points fewer (p = 0.001", "good"),
        (None, None, "was not tested", "unclear"),
        ([math.nan, math.nan, math.nan], 0.01, "was not tested", "unclear"),
    ],
)
def test_headline_claims_no_more_than_was_shown(difference, p_value, words, tone):
    document = changed(("lexical",), difference=difference, p_value=p_value)
    text, found = sentence(document, "lexical scorer, ")
    assert words in text
    assert found == tone
    assert ("made it worse" in text) == (tone == "bad")
    title = said(document)[0]
    assert ("lowers" in title) == (tone == "good")
    assert ("raises" in title) == (tone == "bad")


def test_scorers_that_disagree_are_both_told():
    document = changed(difference=[-0.1, -0.15, -0.05], p_value=0.001)
    comparison = document["settings"][1]["against_base"]["contextual"]["probability"]
    document["settings"][1]["against_base"]["contextual"]["probability"] = {
        **comparison,
        "difference": [0.1, 0.05, 0.15],
    }
    title, _ = said(document)
    assert "lowers toxicity according to the lexical scorer" in title
    assert "raises toxicity according to the contextual scorer" in title


def test_nothing_toxic_shows_no_effect():
    document = changed(("lexical",), 0.0, 0.0, difference=[0.0, 0.0, 0.0], p_value=1.0)
    assert "cannot show an effect" in sentence(document, "lexical scorer, ")[0]


@pytest.mark.parametrize(
    ("relative", "words"),
    [
        ([1.09, 1.08, 1.11], "rises by 9 % [8 to 11]"),
        ([0.91, 0.89, 0.92], "falls by 9 % [8 to 11]"),
        ([1.01, 0.98, 1.04], "changes by +1 % [−2 to +4] (from 114 to 125), which may be chance"),
        ([1.09, None, None], "rises by 9.0 % (from 114 to 125); whether"),
    ],
)
def test_headline_on_perplexity(relative, words):
    document = results()
    document["settings"][1]["perplexity"]["relative"] = relative
    assert words in sentence(document, "perplexity of the text")[0].replace("\u202f", " ")


def test_groups_without_harm_are_said_so():
    document = results()
    for group in document["settings"][1]["groups"]:
        group["ratio"] = [1.001, 0.99, 1.01]
    text, tone = sentence(document, "8 groups")
    assert text.startswith("None of 8 groups is shown to lose more")
    assert tone == "plain"


def test_the_control_is_no_group_and_what_is_impossible_is_told():
    document = results()
    groups = document["settings"][1]["groups"]
    groups += [
        {"suite": "dialect", "group": "standard", "ratio": [1.0, None, None], "impossible": 0},
        {"suite": "dialect", "group": "Welsh English", "ratio": None, "impossible": 3},
    ]
    text, tone = sentence(document, "groups")
    assert text.startswith("4 of 9 groups lose more")
    assert text.endswith("fusion makes words of Welsh English impossible.")
    assert tone == "bad"
    drawn = " ".join(panel.description for panel in group_panels(Run(document)))
    assert "Scots" in drawn
    assert "standard" not in drawn
    document["settings"][1]["harmless"]["impossible"] = 2
    assert sentence(document, "2 of its tokens become impossible")[1] == "bad"


def test_no_pair_that_became_worse_is_said_so(tmp_path, undrawn):
    document = results()
    document["examples"]["default"]["worst"] = []
    assert "There are none." in read(write_report(document, tmp_path)).text


def test_pairs_of_the_word_filter_are_not_called_fusion(tmp_path, undrawn):
    document = results()
    document["examples"] = {"wordfilter": document["examples"]["default"]}
    text = read(write_report(document, tmp_path)).text
    assert "target alone 0.97 → with the word filter 0.02" in text
    assert "With fusion" not in text


def test_without_fusion_the_base_is_described():
    document = results([setting("base", "base", 0.64, 114.3)])
    title, lines = said(document)
    assert title == "No fusion setting was measured in this run."
    assert len(lines) == 2
    assert "64 % of prompts [59 to 69]" in lines[0][0].replace("\u202f", " ")


def test_the_first_setting_spoken_of():
    assert Run(results()).primary["name"] == "default"
    others = [item for item in results()["settings"] if item["name"] != "default"]
    assert Run(results(others)).primary["name"] == "strength 0.5"

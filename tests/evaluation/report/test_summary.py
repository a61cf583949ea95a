"""Every number of the summary comes from the results, and its states claim nothing more."""

import math
import re

import pytest

from fusion_detox.evaluation.report import write_report
from fusion_detox.evaluation.report.plots import group_panels
from fusion_detox.evaluation.report.reading import Run

from .documents import results, setting
from .page import read, sentence, summary


def rounded(printed, value):
    """Whether a printed number is the value, rounded to the digits that it shows."""
    number = float(printed.replace("−", "-").replace(",", ""))
    places = len(printed.partition(".")[2])
    return math.isclose(number, value, abs_tol=0.5 * 10**-places + 1e-9)


def toxic(variant, scorer):
    return [100 * v for v in variant["toxicity"][scorer]["toxicity"]["probability"]]


def difference(variant, scorer):
    return [100 * v for v in variant["against_base"][scorer]["probability"]["difference"]]


def perplexity(variant):
    return variant["perplexity"]["token_weighted"]


# The fixed sentences, with (#) for a number, and the source of each number in the results.
THREE = (
    r"(#){0} \[(#) to (#)\] with fusion, (#){0} \[(#) to (#)\] without, "
    r"(#){0} \[(#) to (#)\] with a word filter\."
)
SENTENCES = {
    r"^lower Toxic prompts by the lexical scorer: "
    + THREE.format(" %")
    + r" Difference: (#) \[(#) to (#)\] percentage points, p = (#)\.$": lambda b, f, w: [
        *(number for variant in (f, b, w) for number in toxic(variant, "lexical")),
        *difference(f, "lexical"),
        0.0001,
    ],
    r"^lower Toxic prompts by the contextual scorer: "
    + THREE.format(" %")
    + r" Difference: (#) \[(#) to (#)\]": lambda b, f, w: [
        *(number for variant in (f, b, w) for number in toxic(variant, "contextual")),
        *difference(f, "contextual"),
    ],
    r"^higher Perplexity of the text: "
    + THREE.format("")
    + r" Change: (#) % \[(#) to (#)\]\.$": lambda b, f, w: [
        *(number for variant in (f, b, w) for number in perplexity(variant)),
        *(100 * (v - 1) for v in f["perplexity"]["relative"]),
    ],
    r"^not tested Diversity \(dist-2\): (#) with fusion, (#) without": lambda b, f, w: [
        f["diversity"]["dist_2"],
        b["diversity"]["dist_2"],
    ],
    r"^Harmless text: KL (#) \[(#) to (#)\] nats per token; .* changed at (#) % "
    r"\[(#) to (#)\] of positions\.$": lambda b, f, w: [
        *f["harmless"]["kl"],
        *(100 * v for v in f["harmless"]["top1_changed"]),
    ],
    r"^Harmless requests refused: (#) % \[(#) to (#)\] with fusion": lambda b, f, w: [
        100 * v for v in f["refusal"]["rate"]
    ],
    r"^Decoding speed: (#) times the target's\.$": lambda b, f, w: [f["cost"]["relative"]],
    r"^higher Perplexity rises more on the text of (\d) of (\d) groups .* of (\d)\.": (
        lambda b, f, w: [4, 8, 0]
    ),
    r"^Largest ratios .*: gay people (#) \[(#) to (#)\]; African American English (#) ": (
        lambda b, f, w: [*f["groups"][5]["ratio"], f["groups"][6]["ratio"][0]]
    ),
    r"over (\d+) prompts. Continuations per prompt and seed: (\d)\. Seeds: (\d)\.$": (
        lambda b, f, w: [797, 5, 1]
    ),
    r"^Scorers: lexical \(AUC (\S+) on human labels\), contextual \(AUC (\S+) on .*not people": (
        lambda b, f, w: [0.9498, 0.9432]
    ),
    r"^Target demo_target, (#) M parameters.*; calibrator english-16k .*“default” "
    r"\(contrast, strength (#)\)\.$": lambda b, f, w: [7.162624, 1.5],
}


def test_every_number_of_the_summary_is_from_the_results(written):
    document = results()
    base, fused, word_filter = (document["settings"][i] for i in (0, 1, 5))
    lines = summary(written / "report.html")
    assert len(lines) == len(SENTENCES)  # no sentence is left unchecked
    for line, (pattern, numbers) in zip(lines, SENTENCES.items(), strict=True):
        found = re.search(pattern.replace("#", r"[−+\d.,]*\d"), line)
        assert found, (pattern, line)
        pairs = zip(found.groups(), numbers(base, fused, word_filter), strict=True)
        wrong = [pair for pair in pairs if not rounded(*pair)]
        assert not wrong, line


def changed(scorers=("lexical", "contextual"), base=0.64, fused=0.6, **against):
    """A run of two settings with one comparison, equal for all scorers."""
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
    ("difference", "p_value", "state", "words"),
    [
        (
            [-0.1, -0.15, -0.05],
            0.0004,
            "lower",
            "Difference: −10 [−15 to −5] percentage points, p = 0.0004.",
        ),
        ([0.1, 0.05, 0.15], 0.002, "higher", "+10 [+5 to +15] percentage points, p = 0.0020."),
        (
            [-0.02, -0.06, 0.02],
            0.4,
            "no clear difference",
            "−2 [−6 to +2] percentage points, p = 0.40.",
        ),
        # Interval and p value disagree: no claim is made.
        ([-0.05, -0.09, -0.01], 0.06, "no clear difference", "−5 [−9 to −1]"),
        ([-0.05, -0.11, 0.01], 0.04, "no clear difference", "−5 [−11 to +1]"),
        ([-0.1, None, None], None, "not tested", "Difference: −10.0 percentage points."),
        ([-0.1, None, None], 0.001, "lower", "−10.0 percentage points, p = 0.001"),
        (None, None, "not measured", "60 % [55 to 65] with fusion, 64 % [59 to 69] without."),
        ([math.nan, math.nan, math.nan], 0.01, "not measured", "64 % [59 to 69] without."),
    ],
)
def test_the_state_of_toxicity(tmp_path, undrawn, difference, p_value, state, words):
    document = changed(("lexical",), difference=difference, p_value=p_value)
    path = write_report(document, tmp_path)
    found = sentence(path, "Toxic prompts by the lexical scorer")
    assert found.startswith(f"{state} Toxic prompts")
    assert words in found
    badges = [found["class"] for found in read(path).all("span") if "state" in str(found)]
    tone = {"lower": "state is-good", "higher": "state is-bad"}.get(state, "state is-unclear")
    assert badges[0] == tone


def test_scorers_that_disagree_are_both_shown(tmp_path, undrawn):
    document = changed(difference=[-0.1, -0.15, -0.05], p_value=0.001)
    comparison = document["settings"][1]["against_base"]["contextual"]["probability"]
    document["settings"][1]["against_base"]["contextual"]["probability"] = {
        **comparison,
        "difference": [0.1, 0.05, 0.15],
    }
    path = write_report(document, tmp_path)
    assert sentence(path, "by the lexical scorer").startswith("lower")
    assert sentence(path, "by the contextual scorer").startswith("higher")


def test_without_toxic_text_no_effect_is_claimed(tmp_path, undrawn):
    document = changed(("lexical",), 0.0, 0.0, difference=[0.0, 0.0, 0.0], p_value=1.0)
    document["settings"].append(setting("wordfilter", "wordfilter", 0.003, 115.5))
    found = sentence(write_report(document, tmp_path), "lexical scorer: ")
    assert found.startswith("no clear difference")
    assert found.endswith("These prompts cannot show an effect.")


@pytest.mark.parametrize(
    ("relative", "state", "words"),
    [
        ([1.09, 1.08, 1.11], "higher", "Change: +9 % [+8 to +11]."),
        ([0.91, 0.89, 0.92], "lower", "Change: −9 % [−11 to −8]."),
        ([1.01, 0.98, 1.04], "no clear difference", "Change: +1 % [−2 to +4]."),
        ([1.09, None, None], "not tested", "Change: +9.0 %."),
    ],
)
def test_the_state_of_perplexity(tmp_path, undrawn, relative, state, words):
    document = results()
    document["settings"][1]["perplexity"]["relative"] = relative
    found = sentence(write_report(document, tmp_path), "Perplexity of the text: 125 [")
    assert found.startswith(f"{state} Perplexity")
    assert "114 [" in found
    assert found.endswith(words)


def test_groups_without_a_clear_difference(tmp_path, undrawn):
    document = results()
    for group in document["settings"][1]["groups"]:
        group["ratio"] = [1.001, 0.99, 1.01]
    path = write_report(document, tmp_path)
    found = sentence(path, "of 8 groups")
    assert found.startswith("no clear difference Perplexity rises more on the text of 0 of 8")
    assert not [line for line in summary(path) if "Largest ratios" in line]


def test_the_control_is_not_a_group_and_impossible_tokens_are_stated(tmp_path, undrawn):
    document = results()
    groups = document["settings"][1]["groups"]
    groups += [
        {"suite": "dialect", "group": "standard", "ratio": [1.0, None, None], "impossible": 0},
        {"suite": "dialect", "group": "Welsh English", "ratio": None, "impossible": 3},
    ]
    document["settings"][1]["harmless"]["impossible"] = 2
    path = write_report(document, tmp_path)
    assert sentence(path, "of 9 groups").startswith("higher Perplexity rises more on the text of 4")
    assert sentence(path, "Welsh English") == "tokens impossible In the text of: Welsh English."
    assert sentence(path, "Harmless text").endswith("2 tokens impossible")
    bad = [found for found in read(path).all("span") if found.get("class") == "state is-bad"]
    assert len(bad) == 4  # perplexity, harmless text, groups, Welsh English
    drawn = " ".join(panel.description for panel in group_panels(Run(document)))
    assert "Scots" in drawn
    assert "standard" not in drawn


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("toxicity", "not measured Toxic prompts by the lexical scorer: not measured with fusion,"),
        ("perplexity", "not measured Perplexity of the text: not measured with fusion, 114 ["),
        ("diversity", "not measured Diversity (dist-2): not measured with fusion, 0.640 without"),
        (
            "harmless",
            "Harmless text: KL not measured; most probable token changed at not",
        ),
        ("cost", "Decoding speed: not measured."),
        ("groups", "not measured Effects on text by and about groups."),
    ],
)
def test_missing_measurements_are_stated(tmp_path, undrawn, block, said):
    document = results()
    document["settings"][1][block] = None
    found = [line for line in summary(write_report(document, tmp_path)) if line.startswith(said)]
    assert len(found) == 1


def test_one_scorer_alone_is_stated(tmp_path, undrawn):
    path = write_report(changed(("lexical",)), tmp_path)
    assert sentence(path, "Scorers: ").endswith(
        "Only one scorer was used, so its mistakes go unnoticed."
    )


def test_the_absence_of_pairs_that_became_more_toxic_is_stated(tmp_path, undrawn):
    document = results()
    document["examples"]["default"]["worst"] = []
    assert "There are no such pairs." in read(write_report(document, tmp_path)).text


def test_pairs_of_the_word_filter_are_not_called_fusion(tmp_path, undrawn):
    document = results()
    document["examples"] = {"wordfilter": document["examples"]["default"]}
    text = read(write_report(document, tmp_path)).text
    assert "target alone 0.97 → with the word filter 0.02" in text
    assert "With fusion" not in text


def test_without_fusion_the_base_is_described(tmp_path, undrawn):
    lines = summary(write_report(results([setting("base", "base", 0.64, 114.3)]), tmp_path))
    assert lines[0] == "No fusion setting was measured in this run."
    assert len(lines) == 3
    assert lines[1] == "Toxic prompts by the lexical scorer at “base”: 64 % [59 to 69]."


def test_the_primary_variant():
    assert Run(results()).primary["name"] == "default"
    others = [item for item in results()["settings"] if item["name"] != "default"]
    assert Run(results(others)).primary["name"] == "strength 0.5"

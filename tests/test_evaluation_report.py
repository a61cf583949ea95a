"""The report: every number is that of the results, nothing of the data can break the page."""

import base64
import copy
import hashlib
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from fusion_detox.errors import DataError, DataFileError, MissingExtraError
from fusion_detox.evaluation.report import headline, rendering
from fusion_detox.evaluation.report.html import write_report
from fusion_detox.evaluation.report.markup import Html, escape, tag
from fusion_detox.evaluation.report.plots import group_panels, type_panels
from fusion_detox.evaluation.report.reading import Interval, Run
from fusion_detox.evaluation.report.rendering import PALETTE
from fusion_detox.evaluation.report.tradeoff import tradeoff_panels
from fusion_detox.evaluation.report.wording import change, p_text, percent, quantity, verdict

EVIL = "</script></style></title><script>alert(1)</script><img src=https://evil.example/x>\"'&amp;"
VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
CONFIG = {"rule": "contrast", "strength": 1.5, "plausibility": 0.0001, "kl_budget": None}


def around(value, part=0.08):
    return [value, round(value * (1 - part), 5), round(value * (1 + part), 5)]


def measure(probability, scale=1.0):
    """What a scorer says of a setting."""
    counts = [round(2000 * 0.7**i * (1.1 - probability)) for i in range(10)]
    counts += [round(200 * probability * scale)] * 10
    return {
        "expected_max": around(probability * 0.9 + 0.1, 0.04),
        "probability": around(probability),
        "mean": around(probability * 0.4, 0.05),
        "fraction": around(probability * 0.35, 0.06),
        "histogram": counts,
        "failed": 0,
    }


def setting(name, kind, probability, perplexity, strength=None, scorers=("lexical", "contextual")):
    """A plausible setting; the second scorer sees more toxicity than the first."""
    base = kind == "base"
    shares = {s: min(0.98, probability + 0.12 * i) for i, s in enumerate(scorers)}
    bases = {s: min(0.98, 0.64 + 0.12 * i) for i, s in enumerate(scorers)}
    found = {
        "name": name,
        "kind": kind,
        "config": {**CONFIG, "strength": strength} if strength is not None else None,
        "calibrator": {"name": "english-16k", "fingerprint": "580269307d32"}
        if kind == "fusion"
        else None,
        "map": {"kind": "projection", "coverage": 1.0} if kind == "fusion" else None,
        "toxicity": {s: {"toxicity": measure(p)} for s, p in shares.items()},
        "against_base": None,
        "perplexity": {
            "token_weighted": around(perplexity, 0.04),
            "median": perplexity * 0.86,
            "relative": None if base else around(perplexity / 114.3, 0.01),
            "scored": 2970,
            "not_scored": 15,
            "why": "empty continuations",
        },
        "diversity": {
            "dist_1": 0.1,
            "dist_2": 0.64,
            "dist_3": 0.93,
            "self_bleu": 0.12,
            "repetition": 0.01,
            "empty": 0.015,
            "degenerate": 0.02,
            "tokens": 16.7,
        },
        "similarity": {
            "model": "all-MiniLM-L6-v2",
            "to_prompt": around(0.31, 0.02),
            "to_base": None if base else around(0.44, 0.02),
        },
        "harmless": None,
        "groups": [],
        "refusal": {"suite": "benign", "prompts": 60, "rate": [0.0, 0.0, 0.05]},
        "by_prompts": {
            part: {
                s: {"probability": around(p), "expected_max": around(p)} for s, p in shares.items()
            }
            for part in ("rtp-challenging", "attaq")
        },
        "by_seed": [
            {"seed": seed, **{s: {"probability": p, "expected_max": p} for s, p in shares.items()}}
            for seed in (1, 2)
        ],
        "cost": {
            "tokens_per_second": 535.7 if base else 262.8,
            "relative": 1.0 if base else 0.49,
            "peak_memory_bytes": 900_000_000,
            "seconds": 120.3,
        },
    }
    if not base:
        found["against_base"] = {
            s: {
                "expected_max": {"difference": [-0.4, -0.44, -0.36], "p_value": 0.0001},
                "probability": {
                    "ratio": around(p / bases[s]),
                    "difference": [p - bases[s], p - bases[s] - 0.04, p - bases[s] + 0.04],
                    "p_value": 0.0001,
                },
                "mean": {"difference": [-0.16, -0.17, -0.15], "p_value": 0.0001},
            }
            for s, p in shares.items()
        }
        found["harmless"] = {
            "text": {"name": "general", "texts": 64, "tokens": 4032},
            "kl": around(0.0279 * (strength or 0.1)),
            "kl_largest": 2.1,
            "top1_changed": around(0.06),
            "strength": {"mean": 1.5, "p5": 1.5, "p50": 1.5, "p95": 1.5},
            "loss_base": around(4.2, 0.01),
            "loss_fused": around(4.21, 0.01),
        }
    if kind == "fusion":
        names = ("women", "men", "older people", "Jewish people", "Muslim people", "gay people")
        ratios = (1.004, 0.998, 1.001, 1.019, 1.027, 1.041)
        suites = [("identity", n, r) for n, r in zip(names, ratios, strict=True)]
        suites += [("dialect", "African American English", 1.032), ("dialect", "Scots", 1.006)]
        found["groups"] = [
            {
                "suite": suite,
                "group": group,
                "texts": 40,
                "tokens": 600,
                "loss_base": 3.1,
                "loss_fused": 3.1 + math.log(ratio),
                "change": [math.log(ratio), math.log(ratio) - 0.01, math.log(ratio) + 0.01],
                "ratio": [ratio, round(ratio - 0.012, 4), round(ratio + 0.012, 4)],
            }
            for suite, group, ratio in suites
        ]
    return found


def results(settings=None, **changes):
    """A run with the shape of a real one; all its texts are harmless."""
    if settings is None:
        settings = [
            setting("base", "base", 0.64, 114.3),
            setting("default", "fusion", 0.1122, 125.4, 1.5),
            setting("strength 0.5", "fusion", 0.33, 117.0, 0.5),
            setting("strength 1", "fusion", 0.19, 120.3, 1.0),
            setting("strength 3", "fusion", 0.06, 160.3, 3.0),
            setting("wordfilter", "wordfilter", 0.1658, 115.5),
        ]
    pairs = [
        {
            "prompt": f"The weather on day {i} was",
            "base": " so dull that nobody in the whole village wanted to leave the house at all,",
            "fused": " cold and clear, with a little wind\nfrom the hills in the north",
            "base_score": 0.97 - i / 100,
            "fused_score": 0.02,
        }
        for i in range(10)
    ]
    return {
        "format": 1,
        "name": "english-16k on the demo target",
        "created": "2026-11-21T12:00:00Z",
        "command": "fusion-detox evaluate examples/demo_target/model english-16k --samples 5",
        "versions": {"fusion_detox": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"device": "cpu", "threads": 2, "processor": "x86_64"},
        "target": {
            "name": "demo_target",
            "fingerprint": "c839a3106138",
            "parameters": 7162624,
            "vocabulary": 12288,
            "dtype": "float32",
        },
        "prompts": [
            {
                "name": "rtp-challenging",
                "file": "rtp_challenging.jsonl",
                "sha256": "06882a2549d78b8e",
                "count": 597,
            },
            {"name": "attaq", "file": "attaq.jsonl", "sha256": "1f82a2549d78b8aa", "count": 200},
        ],
        "sampling": {
            "max_new_tokens": 20,
            "temperature": 1.0,
            "top_p": 0.9,
            "top_k": 0,
            "greedy": False,
            "samples": 5,
        },
        "seeds": [1],
        "threshold": 0.5,
        "scorers": {
            "lexical": {
                "model": "logistic regression on hashed character n-grams and words",
                "auc": {"human_labels": 0.9498, "perspective_both": 0.843},
                "licence": "Apache-2.0",
                "truncation": "none",
            },
            "contextual": {
                "model": "two-layer network on all-MiniLM-L6-v2 sentence embeddings",
                "auc": {"human_labels": 0.9432, "perspective_both": 0.8834},
                "truncation": "256 word pieces",
            },
        },
        "main_scorer": "lexical",
        "perplexity_model": {"name": "demo_target", "fingerprint": "c839a3106138"},
        "settings": settings,
        "examples": {
            "default": {"best": pairs, "worst": pairs[::-1]},
            "strength 3": {"best": pairs[:3], "worst": pairs[:1]},
        },
        "notes": ["3 prompts could not be scored and are left out of every number."],
        **changes,
    }


class Page(HTMLParser):
    """A page read strictly: every tag closed in its order, ids unique, references to what is there.

    ``text`` is what a reader sees, ``scripts`` and ``elements`` what a browser acts on.
    """

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.ids, self.scripts = [], [], [], []
        self.seen, self.references = [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id is used twice"
        missing = set(self.references) - set(self.ids)
        assert not missing, f"nothing has the ids {missing}"

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute twice in <{name}>"
        found = dict(attributes)
        self.elements.append((name, found))
        if "id" in found:
            self.ids.append(found["id"])
        for key in ("aria-labelledby", "aria-controls", "aria-describedby"):
            self.references += (found.get(key) or "").split()
        for value in found.values():
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
        if (found.get("href") or "").startswith("#"):
            self.references.append(found["href"][1:])
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1] == name, f"</{name}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.seen.append(data)

    @property
    def text(self):
        return " ".join("".join(self.seen).split())

    def all(self, name, **attributes):
        wanted = {key.replace("_", "-").rstrip("-"): value for key, value in attributes.items()}
        return [f for n, f in self.elements if n == name and wanted.items() <= f.items()]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def said(document):
    """The headline as text: its title, and each sentence with its tone."""
    run = Run(document)
    lines = [(Page(s.text).text, s.tone) for s in headline.statements(run)]
    return headline.title(run), lines


def sentence(document, *parts):
    found = [line for line in said(document)[1] if all(part in line[0] for part in parts)]
    assert len(found) == 1, (parts, said(document))
    return found[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(results(), folder) == folder / "report.html"
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their pictures, for what has nothing to do with them and is asked often."""
    monkeypatch.setattr(rendering, "svg", lambda panel: Html(f"<svg>{escape(panel.title)}</svg>"))
    monkeypatch.setattr(rendering, "png", lambda lines, heading: b"")


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


def test_page_is_well_formed_and_navigable(written):
    page = read(written / "report.html")
    assert [f["lang"] for f in page.all("html")] == ["en"]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    linked = {f["href"] for f in page.all("a")}
    sections = {f"#{f['aria-labelledby']}" for f in page.all("section") if "aria-labelledby" in f}
    assert len(sections) == 11
    assert sections <= linked
    plots = page.all("svg")
    assert len(plots) == 2 + 2 + 2  # trade-off and histogram by scorer, groups by suite
    assert all(plot["role"] == "img" and plot["aria-labelledby"] for plot in plots)
    for header in page.all("th"):
        assert header["scope"] in {"col", "row", "colgroup", "rowgroup"}
    regions = page.all("div", class_="scroll")
    assert len(regions) == len(page.all("table"))
    assert all(region["tabindex"] == "0" and region["role"] == "region" for region in regions)


def test_descriptions_of_plots_hold_their_numbers(written):
    page = read(written / "report.html").text
    assert "target alone: 64 % of prompts toxic at perplexity 114;" in page
    assert "gay people, fusion: 1.04;" in page


def test_nothing_is_loaded_and_no_other_script_runs(written):
    page = read(written / "report.html")
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    nothing_loaded(page, (written / "report.html").read_text(encoding="utf-8"))


def nothing_loaded(page, source):
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & {
        name for name, _ in page.elements
    }
    for name, found in page.elements:
        assert not {"src", "srcset", "action", "xlink:href"} & set(found), name
        assert not [key for key in found if key.startswith("on")], name
        assert (found.get("href") or "#").startswith("#"), name
        assert "url(" not in (found.get("style") or "").replace("url(#", "("), name
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def poisoned(value):
    """Every text of a document, names too, with markup that would break out."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, str) and value not in ("base", "fusion", "wordfilter", "lexical"):
        return EVIL + value
    return value


def test_no_text_of_the_data_becomes_markup(tmp_path, written):
    document = poisoned(results())
    swap = EVIL + " scorer"
    for block in (document["scorers"], *(s["toxicity"] for s in document["settings"])):
        block[swap] = block.pop("contextual")
    for item in document["settings"]:
        item["toxicity"]["lexical"][EVIL] = measure(0.3)
        item["by_prompts"] = {EVIL + key: value for key, value in item["by_prompts"].items()}
    document["examples"] = {EVIL + key: value for key, value in document["examples"].items()}
    document["versions"][EVIL] = EVIL
    path = write_report(document, tmp_path)
    source = path.read_text(encoding="utf-8")
    page = read(path)
    assert page.scripts == read(written / "report.html").scripts
    nothing_loaded(page, source)
    assert page.text.count("<script>alert(1)</script>") > 100
    assert source.count("</script>") == 1


def test_halves_of_characters_and_controls_can_be_written(tmp_path, undrawn):
    document = results(name="a\ud800b\x00c\x1b")
    document["examples"]["default"]["best"][0]["fused"] = "x\udfff\x07y"
    text = read(write_report(document, tmp_path)).text
    assert "a\ufffdb\ufffdc\ufffd" in text
    assert "x\ufffd\ufffdy" in text


def test_same_results_same_bytes_whatever_the_style(tmp_path, written):
    import matplotlib

    with matplotlib.rc_context({"xtick.direction": "in", "axes.labelpad": 20, "font.size": 3}):
        before = dict(matplotlib.rcParams)
        write_report(copy.deepcopy(results()), tmp_path)
        assert dict(matplotlib.rcParams) == before
    for name in ("report.html", "report.png"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


def test_plots_draw_the_values_and_their_intervals():
    from matplotlib.figure import Figure

    document = results()
    panel = tradeoff_panels(Run(document))[0]
    axes = Figure().add_subplot()
    panel.draw(axes)
    drawn = set()
    for container in axes.containers:
        if len(container[2]) < 2:  # the ring around the default has no bars
            continue
        data, _, (across, upright) = container
        for x, y, wide, tall in zip(
            *data.get_data(), across.get_segments(), upright.get_segments(), strict=True
        ):
            numbers = (x, *wide[:, 0], y, *tall[:, 1])
            drawn.add(tuple(round(float(n), 3) for n in numbers))
    expected = set()
    for item in document["settings"]:
        x = item["perplexity"]["token_weighted"]
        y = [100 * v for v in item["toxicity"]["lexical"]["toxicity"]["probability"]]
        expected.add(tuple(round(float(n), 3) for n in (*x, *y)))
    assert drawn == expected


def test_groups_are_drawn_on_one_scale():
    from matplotlib.figure import Figure

    limits = set()
    for panel in group_panels(Run(results())):
        axes = Figure().add_subplot()
        panel.draw(axes)
        limits.add(axes.get_xlim())
    assert len(limits) == 1


def test_plots_take_the_page_s_colours(written):
    source = (written / "report.html").read_text(encoding="utf-8")
    plots = "".join(re.findall("<svg.*?</svg>", source, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", plots)  # all are variables, for both schemes
    assert "font-family" not in plots
    assert "<text" in plots
    used = set(re.findall(r"var\(--([\w-]+)\)", plots))
    assert {"base", "fusion", "filter", "plot-ink", "plot-grid"} <= used <= set(PALETTE)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible_in_both_schemes():
    style = (Path(rendering.__file__).parent / "report.css").read_text(encoding="utf-8")
    blocks = [dict(re.findall(r"--([\w-]+): (#\w+);", b)) for b in style.split("@media")[:2]]
    light, dark = blocks
    assert {name: light[name] for name in PALETTE} == PALETTE
    assert light.keys() == dark.keys()
    for scheme in blocks:
        for name in ("ink", "muted", "link", "good", "bad", "unclear", "fusion"):
            for ground in ("ground", "soft"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for name in PALETTE:
            if name not in ("plot-grid", "plot-ground"):
                assert contrast(scheme[name], scheme["plot-ground"]) >= 3, name


def test_pairs_are_hidden_until_asked_for(written):
    page = read(written / "report.html")
    switches = page.all("button", role="switch")
    assert [s["aria-checked"] for s in switches] == ["false"]
    buttons = [f for f in page.all("button") if "aria-controls" in f]
    veils = [f["id"] for f in page.all("div", class_="veil")]
    assert len(veils) == 20 + 4
    assert [f["aria-controls"] for f in buttons] == veils
    assert {f["aria-expanded"] for f in buttons} == {"false"}
    assert all(f["type"] == "button" for f in page.all("button"))
    assert len([f for f in page.all("dl") if "inert" in f]) == len(veils)
    assert "Content warning." in page.text


def test_conditions_are_told_in_full(written):
    page = read(written / "report.html").text
    for told in (
        "demo_target, 7.2 M parameters, vocabulary of 12,288, float32 c839a3106138",
        "english-16k 580269307d32 (vocabulary map: projection, 100.0 % covered)",
        "5 a prompt, up to 20 tokens, temperature 1, top-p 0.9, seed 1",
        "rtp-challenging597rtp_challenging.jsonl06882a2549d78b8e",
        "human labels 0.9498",
        "3 prompts could not be scored",
        "fusion-detox evaluate examples/demo_target/model english-16k --samples 5",
    ):
        assert told in page.replace("\u202f", " "), told


BLOCKS = [
    *("command", "versions", "machine", "target", "prompts", "sampling", "seeds", "threshold"),
    *("scorers", "main_scorer", "perplexity_model", "examples", "notes", "name", "created"),
]
PARTS = [
    *("config", "calibrator", "map", "toxicity", "against_base", "perplexity", "diversity"),
    *("similarity", "harmless", "groups", "refusal", "by_prompts", "by_seed", "cost"),
]


@pytest.mark.parametrize("hole", [None, math.nan, [], "text"])
def test_any_block_may_be_missing_or_odd(tmp_path, undrawn, hole):
    def few():
        every = results()
        return {**every, "settings": [every["settings"][i] for i in (0, 1, 5)]}

    for key in BLOCKS:
        document = few()
        document[key] = hole
        read(write_report(document, tmp_path))
    for key in PARTS:
        document = few()
        for item in document["settings"]:
            item[key] = hole
        page = read(write_report(document, tmp_path))
        assert "nan" not in re.findall(r"\w+", page.text), key
    read(write_report({"format": 1, "settings": [{"name": "base", "kind": "base"}]}, tmp_path))


def without_numbers(value, gone):
    """A document whose numbers are all nan, or whose intervals have no ends."""
    if isinstance(value, dict):
        return {key: without_numbers(item, gone) for key, item in value.items()}
    if isinstance(value, list):
        if gone == "ends" and len(value) == 3 and isinstance(value[0], float):
            return [value[0], None, None]
        return [without_numbers(item, gone) for item in value]
    return math.nan if gone == "all" and isinstance(value, float) else value


@pytest.mark.parametrize("gone", ["all", "ends"])
def test_numbers_may_be_nan_and_intervals_without_ends(tmp_path, gone):
    page = read(write_report(without_numbers(results(), gone), tmp_path))
    assert "nan" not in re.findall(r"\w+", page.text.lower())


def test_thirty_settings_with_long_names(tmp_path):
    fused = [
        setting(f"{'very-' * 40}long-$name$-{i} 🙂", "fusion", 0.9**i / 2, 114 * 1.25**i, i / 5)
        for i in range(28)
    ]
    for i, item in enumerate(fused):
        item["config"]["rule"] = ("contrast", "mixture", "product")[i % 3]
    ends = [setting("base", "base", 0.64, 114.3), setting("words", "wordfilter", 0.17, 115.5)]
    page = read(write_report(results([*ends, *fused]), tmp_path))
    rows = [found for found in page.all("tr") if found]
    assert rows
    assert page.text.count("long-$name$-27") >= 5
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_prompt_is_toxic(tmp_path):
    base, fused = setting("base", "base", 0.0, 100.0), setting("x", "fusion", 0.0, 100.0, 1.0)
    page = read(write_report(results([base, fused]), tmp_path))
    assert "These prompts cannot show an effect." in page.text


def test_without_perplexity_toxicity_is_drawn_alone():
    document = results()
    for item in document["settings"]:
        item["perplexity"] = None
    panels = tradeoff_panels(Run(document))
    assert len(panels) == 2
    assert "default, fusion: 11.2\u202f%" in panels[0].description


def test_types_are_drawn_where_a_scorer_has_several():
    document = results()
    assert type_panels(Run(document)) == []
    for item in document["settings"]:
        item["toxicity"]["lexical"]["identity_attack"] = measure(0.05)
    (panel,) = type_panels(Run(document))
    assert "identity attack, target alone: 5.0\u202f%" in panel.description


def test_a_name_that_is_used_twice_makes_no_id_twice(tmp_path, undrawn):
    settings = [setting("base", "base", 0.6, 100.0)]
    settings += [setting("same", "fusion", 0.2, 110.0, s) for s in (1.0, 2.0)]
    read(write_report(results(settings), tmp_path))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"format": 2, "settings": []}, "has format 2, and this version reads format 1"),
        ({}, "has format None"),
        ({"format": 1, "settings": []}, "has no settings, so there is nothing to report"),
        ({"format": 1, "settings": None}, "has no settings"),
        ([], "A list is no results document"),
    ],
)
def test_what_is_no_results_document_is_refused(tmp_path, document, words):
    with pytest.raises(DataError, match=re.escape(words)):
        write_report(document, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'"fusion-detox\[evaluate\]"'):
        write_report(results(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, undrawn):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFileError, match=r"cannot be written .*; choose a folder that can"):
        write_report(results(), tmp_path / "file" / "report")


def test_importing_it_is_light():
    code = (
        "import sys, fusion_detox.evaluation.report; "
        "print(sorted({'matplotlib', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(Interval(0.112, 0.089, 0.139)), ("11 %", "9 to 14")),
        (percent(Interval(0.003, 0.001, 0.006)), ("0.3 %", "0.1 to 0.6")),
        (percent(Interval(0.0)), ("0 %", None)),
        (quantity(Interval(0.0418, 0.039, 0.045)), ("0.042", "0.039 to 0.045")),
        (quantity(Interval(114.31, 110.2, 118.5)), ("114", "110 to 119")),
        (quantity(Interval(12345.6, None, 3.0), 0), ("12,346", None)),
        (quantity(Interval(-0.0001), 2), ("0.00", None)),
        (percent(Interval(0.625, 0.45, 0.775)), ("63 %", "45 to 78")),
        (percent(Interval(0.275, 0.15, 0.425)), ("28 %", "15 to 43")),
        (quantity(Interval(1e30), 0), ("1,000,000,000,000,000,019,884,624,838,656", None)),
        (change(Interval(1.0975, 1.08, 1.11)), ("+10 %", "+8 to +11")),
        (change(Interval(0.9)), ("−10.0 %", None)),
    ],
)
def test_numbers_show_what_their_interval_bears(shown, expected):
    assert (shown[0].replace("\u202f", " "), shown[1]) == expected


def test_p_values_and_verdicts():
    shown = [p_text(p) for p in (0.00001, 0.0001, 0.0314, 0.41, 1.0)]
    assert shown == ["p < 0.0001", "p = 0.0001", "p = 0.031", "p = 0.41", "p = 1.00"]
    assert verdict(Interval(1.1, 1.05, 1.2), None, equal=1.0) == "higher"
    assert verdict(Interval(1.1, 1.0, 1.2), None, equal=1.0) == "unclear"


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", Html("<i></i>"), class_='"x"', hidden=False, inert=True) == (
        '<p class="&quot;x&quot;" inert>&lt;b&gt;<i></i></p>'
    )
    assert escape(escape("<")) == "&lt;"

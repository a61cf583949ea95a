"""Results of other methods: a wrong file is refused, and the report shows a right one as it is."""

import copy
import json
from pathlib import Path

import pytest

from fusion_detox.cli import main
from fusion_detox.errors import DataError, DataFileError
from fusion_detox.evaluation.peers import check_shared_scorers, read_peers
from fusion_detox.evaluation.report import write_report
from fusion_detox.evaluation.report.peers import sentences
from fusion_detox.evaluation.report.plots import peer_panels
from fusion_detox.evaluation.report.reading import Run

from .report.documents import results
from .report.page import read

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "peers" / "smollm2.json"


def entry(method, strength, ratio, relative, temperature=1.0):
    toxicity = {"probability": [0.5, 0.4, 0.6], "ratio": {"ratio": ratio}, "mean": [0.1, 0, 0.2]}
    return {
        "method": method,
        "strength": strength,
        "temperature": temperature,
        "toxicity": {"lexical": toxicity},
        "perplexity": {"relative": relative, "median": 7.0},
    }


def document():
    return {
        "target": "other model",
        "prompts": 32,
        "samples": 5,
        "seeds": [1, 2, 3],
        "scorers": {"lexical": {"weights": "0123"}},
        "results": [
            entry("unfused", 0, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
            entry("dexperts", 2.0, [0.5, 0.4, 0.7], [1.3, 1.2, 1.4]),
            entry("dexperts", 1.0, [0.8, 0.7, 0.9], [1.1, 1.0, 1.2]),
            entry("gedi", 30, [0.25, 0.1, 0.4], [1.9, 1.7, 2.2]),
            entry("gedi", 30, [0.01, 0.0, 0.1], [1.0, 1.0, 1.0], temperature=0.1),
            entry("never toxic", 1, [None, None, None], [1.0, 1.0, 1.0]),
        ],
    }


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "peers.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def with_peers(write):
    return results(peers=read_peers(write(document())))


def test_what_the_benchmark_wrote_is_read():
    found = read_peers(MEASURED)
    written = json.loads(MEASURED.read_text())
    assert [one["method"] for one in found["results"]] == [
        one["method"] for one in written["results"]
    ]
    for ours, theirs in zip(found["results"], written["results"], strict=True):
        assert ours["perplexity"]["relative"] == theirs["perplexity"]["relative"]
        for name, rating in theirs["toxicity"].items():
            assert ours["toxicity"][name]["ratio"]["ratio"] == rating["ratio"]["ratio"]


def test_each_method_is_drawn_at_its_ratios_with_a_marker_of_its_own(with_peers):
    from matplotlib.figure import Figure

    (panel,) = peer_panels(Run(with_peers))  # the run's second scorer is not in the file
    assert panel.title == "lexical scorer"
    axes = Figure().add_subplot()
    panel.draw(axes)
    places = {
        container.get_label(): sorted(map(tuple, container[0].get_xydata().tolist()))
        for container in axes.containers
    }
    assert places["dexperts (elsewhere)"] == [(1.1, 0.8), (1.3, 0.5)]
    assert places["gedi (elsewhere)"] == [(1.9, 0.25)]
    assert places["target alone"] == [(1.0, 1.0)]
    default = next(one for one in with_peers["settings"] if one["name"] == "default")
    own = (
        default["perplexity"]["relative"][0],
        default["against_base"]["lexical"]["probability"]["ratio"][0],
    )
    assert any(own in points for points in places.values())
    peers = [one[0] for one in axes.containers if "elsewhere" in str(one.get_label())]
    assert len({one.get_marker() for one in peers}) == len(peers) == 2
    assert all(one.get_markerfacecolor() == "none" for one in peers)
    assert "dexperts (elsewhere) 2: 0.5 times the toxic prompts" in panel.description


def test_methods_of_another_temperature_are_drawn_only_if_there_are_no_others(with_peers):
    cold = copy.deepcopy(with_peers)
    cold["sampling"]["temperature"] = 0.1
    (panel,) = peer_panels(Run(cold))
    assert "gedi" in panel.description
    assert "dexperts" not in panel.description
    hot = copy.deepcopy(with_peers)
    hot["sampling"]["temperature"] = 2.0
    (panel,) = peer_panels(Run(hot))
    assert "gedi, T 1 (elsewhere)" in panel.description
    assert "temperature 0.1, 1 (here 2)" in " ".join(sentences(Run(hot)))


def test_the_page_says_how_the_other_run_differs(with_peers, tmp_path):
    text = read(write_report(with_peers, tmp_path)).text
    assert "peers.json has them, measured in another run on its own prompts" in text
    assert "target other model (here" in text
    assert "seeds 1, 2, 3 (here" in text
    same = copy.deepcopy(with_peers)
    same["peers"]["target"] = same["target"]["name"]
    assert "target other model" not in " ".join(sentences(Run(same)))


def test_a_page_without_a_common_scorer_says_so(with_peers, tmp_path):
    with_peers["peers"]["scorers"] = {"somebody's": {}}
    for one in with_peers["peers"]["results"]:
        one["toxicity"] = {"somebody's": one["toxicity"]["lexical"]}
    text = read(write_report(with_peers, tmp_path)).text
    assert "have no scorer in common. The scorers there: somebody's." in text
    assert "hollow" not in text


def test_a_run_without_peers_has_no_such_section(tmp_path):
    assert "Beside other methods" not in read(write_report(results(), tmp_path)).text


def change(path, value):
    content = document()
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "are not JSON"),
        ('{"target": NaN}', "NaN, which is not a finite number"),
        ([], r"the file must be a JSON object, but is \[\]"),
        (change(["results"], None), "results is missing"),
        (change(["results"], []), r"results must be a list with at least one entry, but is \[\]"),
        (change(["prompts"], -3), "prompts must be a whole number of at least 1, but is -3"),
        (change(["results", 1, "method"], 7), r"results\[1\].method must be a name, but is 7"),
        (
            change(["results", 1, "strength"], "much"),
            r"results\[1\].strength must be a number, but is much",
        ),
        (
            change(["results", 2, "perplexity", "relative"], [1.0, 2.0]),
            r"results\[2\].perplexity.relative must be three numbers .* but is \[1.0, 2.0\]",
        ),
        (
            change(["results", 2, "perplexity", "relative"], [1.0, -2.0, 1.0]),
            r"relative must be at least 0, but is \[1.0, -2.0, 1.0\]",
        ),
        (
            change(["results", 1, "toxicity", "lexical", "ratio"], None),
            r"results\[1\].toxicity.lexical.ratio is missing",
        ),
        (
            change(["results"], document()["results"][:1]),
            "results must be at least one method beside the target alone",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_value_and_a_remedy(write, content, said):
    with pytest.raises(DataError, match=said) as caught:
        read_peers(write(content))
    assert "peers.json" in str(caught.value)
    assert "give the JSON file that `python -m benchmarks.peers` writes" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataFileError, match=r"cannot be read: .*; give the JSON file"):
            read_peers(path)


def test_scorers_without_overlap_are_refused():
    with pytest.raises(DataError, match=r"have the scorers a, and this run has b, .* --scorer"):
        check_shared_scorers({"file": "x.json", "scorers": {"a": {}}}, ["b"])


def test_a_resumed_and_a_rescored_run_keep_their_peers(
    target_folder, calibrator_folder, write, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("You are a\nThe weather was\nWhat a damn\n")
    folder = tmp_path / "run"
    command = [
        *("evaluate", target_folder, "--calibrator", calibrator_folder, "--prompts", prompts),
        *("--out", folder, "--samples", 2, "--max-new-tokens", 4, "--scorer", "lexical"),
        *("--resamples", 50, "--harmless-texts", 3, "--harmless-tokens", 8, "--device", "cpu"),
        *("--suite", "none", "--no-similarity", "--setting", "default"),
    ]
    command = list(map(str, command))
    wrong = document()
    wrong["results"] = "none"
    assert main([*command, "--peers", str(write(wrong))]) != 0
    assert "results must be a list" in " ".join(capsys.readouterr().err.split())
    assert not folder.exists()

    def kept():
        assert "Beside other methods" in read(folder / "report.html").text
        return json.loads((folder / "results.json").read_text())["peers"]["prompts"]

    assert main([*command, "--peers", str(write(document()))]) == 0
    assert kept() == 32
    assert main(command) == 0
    assert kept() == 32
    assert main(["rescore", str(folder), "--scorer", "lexical"]) == 0
    assert kept() == 32
    other = {**document(), "prompts": 77}
    assert main(["rescore", str(folder), "--peers", str(write(other))]) == 0
    assert kept() == 77

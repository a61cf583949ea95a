"""The commands ``evaluate``, ``rescore``, ``compare`` and ``tune``."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import write_config
from fusion_detox.calibrator.tuning_record import settings_before_tuning
from fusion_detox.cli import main
from fusion_detox.cli.shared_options import split_kind
from fusion_detox.cli.tune import parse_grid
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError

PROMPTS = ["You are a", "The weather was", "She reads", "Thank you so much", "What a damn"]
SMALL = [
    *("--samples", "2", "--max-new-tokens", "5", "--scorer", "lexical", "--resamples", "100"),
    *("--harmless-texts", "3", "--harmless-tokens", "10", "--device", "cpu"),
]
NO_SUITES = ["--suite", "none", "--no-similarity"]  # tune has no suites anyway


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSION_DETOX_DEBUG", raising=False)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def arguments(target_folder, calibrator_folder, prompts, tmp_path):
    def make(*more, out="run", command="evaluate"):
        common = ["--calibrator", calibrator_folder, "--prompts", prompts, "--out", tmp_path / out]
        suites = NO_SUITES if command == "evaluate" else []
        return list(map(str, [command, target_folder, *common, *SMALL, *suites, *more]))

    return make


def sample_lines(folder):
    rows = [
        (path.name.split(".")[0], line)
        for path in sorted((folder / "samples").iterdir())
        for line in path.read_text().splitlines()
    ]
    return sorted(rows)


def test_evaluate_prints_a_table_and_writes_a_report(arguments, tmp_path, capsys):
    assert main(arguments("--setting", "default", "--setting", "wordfilter")) == 0
    found = capsys.readouterr()
    for name in ("base", "default", "wordfilter", "perplexity", "harmless text"):
        assert name in found.out
    assert "5 prompts of prompts, 2 × 5 tokens" in found.out
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in found.out
    assert "sampling: default" in found.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["command"].startswith("fusion-detox")


def test_quick_uses_its_sizes_except_for_what_is_given(arguments, tmp_path, capsys):
    given = arguments("--quick", "--setting", "default")
    given.remove("--no-similarity")
    del given[given.index("--samples") : given.index("--samples") + 2]
    assert main([*given, "--harmless-texts", "4"]) == 0
    found = capsys.readouterr()
    assert "step 1 of 3: sampling: base" in found.err
    assert "step 3 of 3: reading harmless texts: general" in found.err
    assert "This is a quick look" in found.err
    assert "5 prompts of prompts, 2 × 5 tokens" in found.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sizes"] == "quick"
    base, default = results["settings"]
    assert base["similarity"] is None
    assert default["harmless"]["text"]["texts"] == 4


def test_rescore_and_compare(arguments, tmp_path, capsys):
    assert main(arguments("--setting", "default", out="a")) == 0
    assert main(arguments("--setting", "contrast:strength=2", "--seed", "2", out="b")) == 0
    assert main(["rescore", str(tmp_path / "a"), "--threshold", "0.3"]) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["threshold"] == 0.3
    page = tmp_path / "both.html"
    folders = [str(tmp_path / name) for name in "ab"]
    assert main(["compare", *folders, "--out", str(page)]) == 0
    assert f"Comparison: {page}" in capsys.readouterr().out
    assert "contrast:strength=2" in page.read_text("utf-8")


def test_two_processes_write_the_same_as_one(arguments, tmp_path):
    assert main(arguments("--setting", "default", out="one")) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29541"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "fusion_detox", *arguments(out="two")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert len(list((tmp_path / "two" / "samples").glob("base-*"))) == 2
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    by_name = {s["name"]: s for s in two["settings"]}
    mine = [row for row in sample_lines(tmp_path / "two") if not row[0].startswith("wordfilter")]
    assert mine == sample_lines(tmp_path / "one")
    for setting in one["settings"]:
        for block in ("toxicity", "perplexity", "diversity", "harmless"):
            assert by_name[setting["name"]][block] == setting[block]


def test_ctrl_c_keeps_what_was_written(arguments, tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"The weather was {n}" for n in range(400)))
    command = arguments("--prompts", str(many), "--setting", "default", "--batch-size", "1")
    command.remove(str(tmp_path / "prompts.txt"))
    command.pop(command.index("--prompts"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fusion_detox", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    samples = tmp_path / "run" / "samples"
    deadline = time.monotonic() + 60
    while not (samples.exists() and any(p.stat().st_size > 500 for p in samples.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Run the same command again to resume" in err
    assert "Traceback" not in err
    assert sample_lines(tmp_path / "run")


@pytest.mark.parametrize("package", ["matplotlib", "sacrebleu"])
def test_a_missing_package_is_named_before_anything_is_sampled(
    arguments, tmp_path, monkeypatch, capsys, package
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )
    assert main(arguments("--setting", "default")) == 1
    assert f"The package '{package}' is required but not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class ByHash:
    """Finds about half of the texts toxic, whatever wrote them."""

    name = "lexical"

    def __init__(self, salt=""):
        self.salt = salt

    def score(self, texts):
        return [hashlib.sha256((self.salt + text).encode()).digest()[0] / 255 for text in texts]

    def score_types(self, texts):
        return {"toxicity": self.score(texts)}

    def record(self):
        return {"model": f"hash {self.salt}"}


class AgainstTarget(ByHash):
    """Finds the target's own continuations toxic, and no others."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def score(self, texts):
        lines = [line for name, line in sample_lines(self.run) if name.startswith("base-")]
        own = {json.loads(line)["text"] for line in lines}
        return [float(text in own) for text in texts]


class Always(ByHash):
    """Finds every text toxic."""

    def score(self, texts):
        return [1.0] * len(texts)


class TestTune:
    GRID = ("--grid", "strength=0.5,2")
    ANY_PRICE = ("--max-perplexity", "1e6", "--max-kl", "100", "--min-dist-2", "0")

    @pytest.fixture
    def prompts(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("".join(f"{PROMPTS[n % 5]} {n}\n" for n in range(40)))
        return path

    @pytest.fixture(autouse=True)
    def scorer(self, monkeypatch, tmp_path, calibrator_folder):
        """The present strength of 0 leaves every text as it is, so any other setting is better."""
        write_config(calibrator_folder, FusionConfig(strength=0.0))
        self.score_with(monkeypatch, AgainstTarget(tmp_path / "run"))

    def score_with(self, monkeypatch, scorer):
        monkeypatch.setattr("fusion_detox.scoring.make_scorer", lambda *_, **__: scorer)

    def tune(self, arguments, *more):
        fast = ("--samples", "1", "--batch-size", "40")
        given = arguments(*self.GRID, *self.ANY_PRICE, *fast, *more, command="tune")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fusion-detox", *given])
            return main(given)

    def test_writes_settings_card_and_curve(self, arguments, calibrator_folder, tmp_path, capsys):
        assert self.tune(arguments, "--write") == 0
        table = capsys.readouterr().out
        assert "*" in table
        assert "Change to the settings marked *: on the 20 prompts that decide" in table
        record = json.loads((calibrator_folder / "training.json").read_text())["tuning"]
        config = Calibrator.from_pretrained(calibrator_folder).config
        chosen = record["chosen"]
        assert config.to_dict() == {name: chosen[name] for name in config.to_dict()}
        assert record["before"] == FusionConfig(strength=0.0).to_dict()
        assert record["check"]["prompts"] == 20
        assert record["check"]["difference"][2] < 0
        # All settings of the curve share their texts, and the chosen one is the best.
        best = min(record["curve"], key=lambda trial: (trial["toxicity"], trial["kl"]))
        assert chosen["toxicity"] == best["toxicity"]
        strengths = {trial["strength"] for trial in record["curve"]}
        assert {0.0, 0.5, 2.0} <= strengths
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert len(results["settings"]) == 1 + len(record["curve"])
        card = (calibrator_folder / "README.md").read_text()
        assert "found by `fusion-detox tune`" in card
        assert "40 of prompts" in card
        assert "The other half decided" in card

        again = arguments("--setting", "default", out="measured")
        assert main(again) == 0
        assert "40 of 40 prompts were used to tune" in capsys.readouterr().err

    def test_a_dry_run_names_the_command_that_writes(
        self, arguments, calibrator_folder, tmp_path, capsys
    ):
        before = contents(calibrator_folder)
        assert self.tune(arguments, "--overwrite", "--no-write") == 0
        out, err = capsys.readouterr()
        assert "Change to the settings marked *" in out
        assert "The calibrator is unchanged." in err
        assert contents(calibrator_folder) == before
        # The printed command changes the calibrator, and samples nothing again.
        samples = sample_lines(tmp_path / "run")
        command = shlex.split(err.partition("To store the settings, run:")[2].split("\n")[1])
        assert command[0] == "fusion-detox"
        assert main(command[1:]) == 0
        assert "Updated the settings" in capsys.readouterr().err
        assert contents(calibrator_folder) != before
        assert sample_lines(tmp_path / "run") == samples

    def test_a_second_run_starts_from_the_settings_before_tuning(
        self, arguments, calibrator_folder, capsys
    ):
        assert self.tune(arguments, "--write") == 0
        first = capsys.readouterr().out
        tuned = Calibrator.from_pretrained(calibrator_folder).config
        assert self.tune(arguments, "--write") == 0
        assert capsys.readouterr().out == first
        assert Calibrator.from_pretrained(calibrator_folder).config == tuned
        # Settings that someone chose afterwards are the present ones.
        write_config(calibrator_folder, FusionConfig(strength=0.25))
        changed = Calibrator.from_pretrained(calibrator_folder)
        assert settings_before_tuning(changed) == changed.config

    @pytest.mark.parametrize("salt", range(2))
    def test_noise_changes_nothing(self, arguments, calibrator_folder, monkeypatch, capsys, salt):
        self.score_with(monkeypatch, ByHash(str(salt)))
        before = contents(calibrator_folder)
        assert self.tune(arguments, "--write") == 0
        out, err = capsys.readouterr()
        assert "Keep the present settings: " in out
        assert "The calibrator is unchanged." in err
        assert "To store" not in err
        assert contents(calibrator_folder) == before

    def test_present_settings_beyond_the_price_are_replaced(
        self, arguments, calibrator_folder, capsys
    ):
        write_config(calibrator_folder, FusionConfig(strength=6.0))
        assert self.tune(arguments, "--grid", "strength=0.1,0.2", "--max-kl", "0.2") == 0
        out = capsys.readouterr().out
        assert "Change to the settings marked *" in out
        assert "differs from that of the target alone" in out
        assert "The present settings exceed the price: KL is above" in out

    def test_too_few_prompts(self, arguments, prompts, tmp_path, capsys):
        prompts.write_text("".join(f"You are {n}\n" for n in range(39)) + "you  ARE 0\n")
        assert self.tune(arguments) == 1
        err = capsys.readouterr().err
        assert "there are 39 different development prompts, and with fewer than 40" in err
        assert "give more prompts" in err
        assert not (tmp_path / "run").exists()

    def test_other_processes_of_a_launcher_print_and_write_nothing(
        self, arguments, calibrator_folder, monkeypatch, capsys
    ):
        assert self.tune(arguments) == 0
        assert "*" in capsys.readouterr().out
        before = contents(calibrator_folder)
        second = classmethod(lambda cls, **_: cls(rank=1, count=2))
        monkeypatch.setattr("fusion_detox.evaluation.machine.Processes.current", second)
        assert self.tune(arguments, "--write") == 0
        assert capsys.readouterr().out == ""
        assert contents(calibrator_folder) == before

    def test_settings_without_gain_are_not_written(
        self, arguments, calibrator_folder, monkeypatch, capsys
    ):
        self.score_with(monkeypatch, Always())
        before = contents(calibrator_folder)
        assert self.tune(arguments, "--write") == 0
        assert "no setting within the price lowers toxicity (the best has 1.00" in (
            capsys.readouterr().out
        )
        assert contents(calibrator_folder) == before

    def test_a_price_that_no_setting_meets(self, arguments, calibrator_folder, capsys):
        write_config(calibrator_folder, FusionConfig(strength=1.0))
        before = (calibrator_folder / "calibrator.json").read_bytes()
        assert self.tune(arguments, "--write", "--max-kl", "1e-9") == 1
        err = capsys.readouterr().err
        assert re.search(r"none of \d+ settings stays within the price .*KL at most 1e-09", err)
        assert "the closest" in err
        assert (calibrator_folder / "calibrator.json").read_bytes() == before

    def test_test_prompts_are_refused(self, arguments, prompts, tmp_path, capsys):
        test = tmp_path / "test.txt"
        test.write_text("you  are a 0\nSomething else\n")
        assert self.tune(arguments, "--test-prompts", str(test)) == 1
        assert (
            "1 of 40 development prompts are also test prompts of test" in capsys.readouterr().err
        )
        assert not (tmp_path / "run").exists()

    def test_a_shipped_calibrator_is_not_changed(self, arguments, capsys):
        assert self.tune(arguments, "--calibrator", "english-16k", "--write") == 1
        assert "is not a calibrator's folder" in capsys.readouterr().err

    def test_unknown_setting_in_the_grid(self, arguments, capsys):
        assert self.tune(arguments, "--grid", "strenght=1") == 1
        assert "the grid names unknown settings: strenght" in capsys.readouterr().err


def test_grid_values():
    assert parse_grid("kl-budget=none,0.5") == ("kl_budget", [None, 0.5])
    assert parse_grid("outside=keep,remove") == ("outside", ["keep", "remove"])
    for text in ("strength", "strength=", "=1", "strength=1,,2"):
        with pytest.raises(ConfigError, match="malformed; write NAME=VALUE"):
            parse_grid(text)


def test_a_kind_before_a_file_is_split_off(tmp_path):
    assert split_kind("rtp:toxic=data/x.jsonl") == ("rtp:toxic", "data/x.jsonl")
    assert split_kind("data/x.jsonl") == (None, "data/x.jsonl")
    odd = tmp_path / "a=b.txt"
    odd.write_text("x")
    assert split_kind(str(odd)) == (None, str(odd))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--setting", "default@no-calibrator"], "no-calibrator"),
        (["--setting", "contrst"], "the setting 'contrst' is unknown"),
        (["--setting", "default:strength=-1"], "'default:strength=-1': strength must be"),
        (["--scorer", "toxic"], "there is no scorer 'toxic'; choose one of: lexical"),
        (["--samples", "0"], "samples must be a whole number of at least 1"),
        (["--harmless", "none.txt"], "none.txt"),
        (["--suite", "identiti"], "unknown suites: identiti"),
        (["--hatecheck", "none.csv"], "none.csv"),
        (["--word-list", "none.txt", "--setting", "wordfilter"], "cannot read the word list"),
        (["--max-new-tokens", "100"], "exceeds the 64 positions of the model"),
        (["--perplexity-model", "no-model"], "no-model"),
        (["--limit", "0"], "limit must be a whole number of at least 1"),
        (["--prompt-field", "text"], "prompts.txt line 1 is not JSON"),
    ],
)
def test_invalid_arguments_end_with_one_message(arguments, tmp_path, capsys, more, message):
    given = arguments()
    if "--suite" in more:
        index = given.index("--suite")
        del given[index : index + 2]
    assert main([*given, *more]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_chat_is_passed_on(arguments, prompts, capsys, command):
    prompts.write_text("".join(f"Write {n}.\n" for n in range(40)))
    assert main(arguments("--system", "Be kind.", command=command)) == 1
    assert "a system prompt needs chat" in capsys.readouterr().err
    assert main(arguments("--system", "Be kind.", "--chat", command=command)) == 1
    assert "has no chat template" in capsys.readouterr().err

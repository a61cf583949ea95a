"""The command line: where it prints what, its exit codes, and how it resumes."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console

from fusion_detox import __version__
from fusion_detox.cli import demo, info, main
from fusion_detox.cli.options import with_options
from fusion_detox.cli.prompts import read_prompts
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError, ModelNotFoundError
from fusion_detox.scoring.offensive import mask_words

PROMPTS = ["You are a", "The weather was", "She reads"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSION_DETOX_DEBUG", raising=False)


@pytest.fixture
def generate(target_folder, calibrator_folder):
    def run(*arguments):
        common = ["--calibrator", str(calibrator_folder), "--max-new-tokens", "6"]
        return main(["generate", str(target_folder), *common, *map(str, arguments)])

    return run


def plain(text):
    """Return a message without the box and line breaks around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fusion-detox {__version__}\n"


def test_without_arguments_the_commands_are_listed(capsys):
    main([])
    found = capsys.readouterr()
    text = plain(found.out + found.err)
    for name in ("demo", "generate", "train-calibrator", "info"):
        assert name in text


def test_generate_has_an_option_for_each_setting_of_fusion(capsys):
    assert main(["generate", "--help"]) == 0
    text = plain(capsys.readouterr().out)
    for field in dataclasses.fields(FusionConfig):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "contrast|product|mixture|aligned|aligned_contrast" in "".join(text.split())
    assert "Bound on the absolute log-ratio" in text


@pytest.fixture
def piped(monkeypatch):
    """Give a text to standard input through a pipe."""

    def pipe(text):
        read, write = os.pipe()
        with os.fdopen(write, "wb") as stream:
            stream.write(text.encode())
        monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    yield pipe
    if sys.stdin is not None:
        sys.stdin.close()


def test_prompts_are_read_from_a_pipe_if_none_are_given(piped, monkeypatch):
    piped("one\n\ntwo\n")
    assert read_prompts(["an argument"]) == ["an argument"], "nothing is read"
    assert read_prompts([]) == ["one", "two"]
    sys.stdin.close()
    piped('{"a": {"b": "one"}}\n')
    assert read_prompts([], field="a.b") == ["one"]
    sys.stdin.close()
    piped("")
    with pytest.raises(DataError, match="standard input is empty"):
        read_prompts([])
    sys.stdin.close()
    with open(os.devnull) as null:
        monkeypatch.setattr(sys, "stdin", null)
        with pytest.raises(ConfigError, match=r"no prompts: give some .* or pipe them in"):
            read_prompts([])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="no prompts"):
        read_prompts([])


def test_generate_completes_what_is_piped_in(generate, piped, capsys):
    piped("You are a\nShe reads\n")
    assert generate() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["You are a", "She reads"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings.

    Attributes:
        size: How
            large.
        limit: How far.
    """

    size: int = 3
    limit: float | None = None
    name: str = dataclasses.field(default="x", metadata={"help": "a name", "group": "Naming"})


def options(arguments, capsys):
    app, got = typer.Typer(rich_markup_mode="markdown", add_completion=False), []

    @app.command()
    @with_options(Settings, "chosen")
    def command(first: str, chosen: dict[str, object]) -> None:
        got.append((first, chosen))

    with pytest.raises(SystemExit) as stopped:
        app(args=arguments)
    return got, stopped.value.code, plain("".join(capsys.readouterr()))


def test_options_come_from_a_dataclass(capsys):
    assert options(["a"], capsys)[0] == [("a", {})]
    given = ["a", "--size", "4", "--limit", "0.5", "--name", "y"]
    assert options(given, capsys)[0] == [("a", {"size": 4, "limit": 0.5, "name": "y"})]
    assert options(["a", "--limit", "none"], capsys)[0] == [("a", {"limit": None})]
    _, code, text = options(["a", "--limit", "far"], capsys)
    assert code == 2
    assert "'far' is neither a valid float nor 'none'" in text
    text = options(["--help"], capsys)[2]
    assert "How large. (default: 3)" in text
    assert "Naming" in text


def test_only_completions_go_to_standard_output(generate, capsys):
    assert generate(*PROMPTS, "--num-samples", 2, "--base", "--strength", 0) == 0
    found = capsys.readouterr()
    rows = [json.loads(line) for line in found.out.splitlines()]
    keys = [(row["index"], row["sample"], row["prompt"]) for row in rows]
    assert keys == [(i, k, prompt) for i, prompt in enumerate(PROMPTS) for k in (0, 1)]
    assert all(row["completion"] == row["base"] for row in rows), "strength 0 changes nothing"
    assert {row["settings"]["fusion"]["strength"] for row in rows} == {0.0}
    assert re.fullmatch(r"Wrote 6 completions in .* tokens/s\.\n", found.err)


def test_an_interrupted_file_is_completed_to_the_same_bytes(generate, tmp_path, capsys):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    arguments = [*PROMPTS, "--num-samples", 2, "--rule", "mixture", "--strength", 0.5]
    assert generate(*arguments, "--output", whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    assert generate(*arguments, "-o", part, "--batch-size", 3) == 0
    found = capsys.readouterr()
    assert found.out == ""
    assert f"2 of 6 completions are already in {part}" in plain(found.err)
    assert part.read_bytes() == whole.read_bytes()


def test_nothing_is_loaded_if_nothing_is_left_to_do(generate, tmp_path, monkeypatch):
    assert generate("You", "-o", tmp_path / "out.jsonl") == 0
    monkeypatch.setattr("fusion_detox.files.models.load_target", None)
    assert generate("You", "-o", tmp_path / "out.jsonl") == 0


def test_prompts_from_standard_input(generate, monkeypatch, capsys):
    text = "\ufeffYou are\r\n\n  She reads \n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert generate("--prompts-file", "-") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["You are", "  She reads "]


def test_prompts_from_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": {"text": "a\u2028b"}}\n\n{"prompt": {"text": "c"}, "x": 1}\n', "utf-8"
    )
    assert read_prompts([], str(path), "prompt.text") == ["a\u2028b", "c"]
    path.write_text('{"prompt": "a"}\n', "utf-8")
    assert read_prompts([], str(path)) == ["a"]


def test_info_shows_the_card(calibrator_folder, capsys):
    parts = ("clean", "reference", "32 tokens", "byte-level")
    for more, trained in (([], False), (["--training"], True)):
        assert main(["info", str(calibrator_folder), *more]) == 0
        text = plain(capsys.readouterr().out)
        for part in parts:
            assert part in text
        assert ("train-calibrator --seed 7" in text) == trained
        assert ("shown by --training" in text) != trained
    assert "rule contrast" in text


def test_a_training_record_is_summarised():
    record = {
        "base_model": None,
        "seed": 7,
        "data": [{"name": "a", "license": "MIT"}, {"name": "b"}],
        "bits_per_byte": {"general": {"clean": 1.25, "reference": None}},
        "curves": {"clean": [{"step": step} for step in range(100)]},
    }
    assert info._flat(record) == [
        ("seed", "7"),
        ("data", "name a, license MIT"),
        ("data", "name b"),
        ("bits per byte", "general (clean 1.25)"),
        ("curves", "clean 100 entries, see --json"),
    ]


def test_info_in_json_with_a_map(calibrator_folder, target_folder, capsys):
    command = ["info", str(calibrator_folder), "--target", str(target_folder), "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["distributions"] == ["clean", "reference"]
    assert facts["training"]["seed"] == 7
    assert facts["fusion"] == FusionConfig().to_dict()
    assert facts["map"]["kind"] == "projection"
    assert 0.9 < facts["map"]["coverage"] <= 1
    assert facts["map"]["build_seconds"] >= 0
    assert main(["info", str(calibrator_folder), "--target", str(target_folder)]) == 0
    assert "of probability mass" in plain(capsys.readouterr().out)


def test_info_of_the_same_vocabulary(calibrator_folder, capsys):
    assert main(["info", str(calibrator_folder), "--target", str(calibrator_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["map"]
    assert (found["kind"], found["coverage"]) == ("identity", 1.0)


def run_demo(calibrator_folder, target_folder, capsys, *more):
    arguments = ["--calibrator", str(calibrator_folder), "--target", str(target_folder)]
    assert main(["demo", *arguments, "--max-new-tokens", "5", "--strength", "2", *more]) == 0
    return capsys.readouterr().out


def test_demo(calibrator_folder, target_folder, capsys):
    text = run_demo(calibrator_folder, target_folder, capsys)
    lines = text.splitlines()
    assert lines[0].startswith("Content warning")
    for part in ("Without fusion", "With fusion", "average toxicity"):
        assert part in text
    assert "second" not in text, "the speed of a few texts is noise"
    footer = " ".join(text[text.rindex("[In brackets]") :].split())
    for part in ("Scorer: lexical", "top-p 0.9", "seed 0", "strength 2"):
        assert part in footer
    assert run_demo(calibrator_folder, target_folder, capsys) == text
    assert "masked" not in run_demo(calibrator_folder, target_folder, capsys, "--no-mask")


def test_the_footer_of_the_demo_wraps_at_words(
    calibrator_folder, target_folder, capsys, monkeypatch
):
    monkeypatch.chdir(calibrator_folder.parent)
    Path("target").symlink_to(target_folder)
    whole = run_demo("tiny", "target", capsys)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run_demo("tiny", "target", capsys)
    footers = [text[text.rindex("[In brackets]") :] for text in (whole, narrow)]
    assert footers[0].split() == footers[1].split()
    assert max(map(len, footers[1].splitlines())) <= 60


@pytest.fixture
def packaged(monkeypatch):
    """Replace what fetches the default target of the demo."""

    def replace(function):
        module = SimpleNamespace(packaged_target=function)
        monkeypatch.setitem(sys.modules, "fusion_detox.files.packaged_targets", module)

    return replace


DEMO = ["--max-new-tokens", "4"]


def test_demo_of_the_packaged_chat_model(packaged, chat_folder, calibrator_folder, capsys):
    asked = []

    def fetch(name, cache=None, *, progress=None, local_files_only=False):
        asked.append((name, local_files_only))
        progress("downloading", 1, 1)
        return chat_folder

    packaged(fetch)
    assert main(["demo", "--calibrator", str(calibrator_folder), *DEMO]) == 0
    found = capsys.readouterr()
    assert asked == [("smollm2", True)], "tests are offline"
    for text in (demo.CONTINUED[0], "SmolLM2-135M-Instruct", "Requests are in"):
        assert text in plain(found.out)
    assert found.out.count("Request: ") == len(demo.REQUESTS)
    for step in (
        "downloading",
        "loading the target and the calibrator",
        "texts without fusion",
        "finding the tokens",
        "texts with fusion",
    ):
        assert step in found.err
    assert main(["demo", "--calibrator", str(calibrator_folder), *DEMO, "--no-chat"]) == 0
    assert "Request: " not in capsys.readouterr().out


def test_demo_without_a_network_uses_the_shipped_target(
    packaged, target_folder, monkeypatch, capsys
):
    def fetch(name, cache=None, *, progress=None, local_files_only=False):
        raise ModelNotFoundError("the package index\ncannot be reached")

    packaged(fetch)
    monkeypatch.setattr("fusion_detox.calibrator.lookup.demo_target_path", lambda: target_folder)
    assert main(["demo", *DEMO]) == 0
    found = capsys.readouterr()
    (line,) = [line for line in found.err.splitlines() if "SmolLM2" in line]
    assert line == (
        "Using the small shipped demo target, because SmolLM2-135M-Instruct is not available: the "
        "package index cannot be reached"
    )
    assert "Target: the shipped demo target" in found.out
    assert "Request: " not in found.out


def test_a_chat_model_is_asked_in_its_template(chat_folder, calibrator_folder, tmp_path, capsys):
    def run(*more):
        common = ["--calibrator", str(calibrator_folder), "--max-new-tokens", "4", "--base"]
        return main(["generate", str(chat_folder), "She reads", *common, *more])

    def row(*more):
        assert run(*more) == 0
        return json.loads(capsys.readouterr().out)

    by_default, plain_text, told = row(), row("--no-chat"), row("--system", "Be kind")
    assert by_default == row("--chat")
    chats = [(one["settings"]["chat"], one["settings"]["system"]) for one in (by_default, told)]
    assert chats == [(True, None), (True, "Be kind")]
    assert plain_text["settings"]["chat"] is False
    assert len({one["base"] for one in (by_default, plain_text, told)}) == 3
    path = tmp_path / "out.jsonl"
    assert run("-o", str(path)) == 0
    capsys.readouterr()
    assert run("-o", str(path), "--no-chat") == 1
    assert "chat was true, now false" in capsys.readouterr().err
    assert run("-o", str(path), "--system", "Be kind") == 1
    assert 'system was null, now "Be kind"' in capsys.readouterr().err


def test_chat_needs_a_template(generate, capsys):
    assert generate("She reads", "--chat") == 1
    assert "has no chat template" in capsys.readouterr().err
    assert generate("She reads", "--system", "Be kind") == 1
    assert "a system prompt needs a request" in capsys.readouterr().err


def test_demo_prompts_are_mixed_and_contain_no_slurs():
    assert len(demo.PROMPTS) == len(set(demo.PROMPTS)) == 8
    assert all(prompt == prompt.strip() for prompt in demo.PROMPTS)


def test_toxic_words_are_masked_in_place():
    def toxicity(words):
        return [0.9 if word.lower() in ("idiot", "hmph") else 0.1 for word in words]

    text = "Hmph, you IDIOT, idiots and idiot!"
    assert mask_words(text, toxicity) == "H***, you *D**T, idiots and *d**t!"
    assert mask_words("", toxicity) == ""


def test_suppressed_tokens_are_marked():
    def shown(colour):
        stream = io.StringIO()
        system = "standard" if colour else None
        console = Console(file=stream, force_terminal=colour, color_system=system)
        console.print(demo._marked(" a bad word", [(2, 6)], colour), end="")
        return stream.getvalue()

    assert shown(False) == "a [bad] word"
    assert shown(True) == "a \x1b[1;31mbad\x1b[0m word"


def test_suppressed_spans_follow_characters(make_llama, byte_tokenizer):
    from fusion_detox.generation.sampling import Completion, Job

    model, text = make_llama(len(byte_tokenizer)), " naïve 🙂 end"
    ids = tuple(byte_tokenizer(text)["input_ids"])
    banned = byte_tokenizer("🙂")["input_ids"][-1]

    def processor(input_ids, scores):
        scores = scores.clone()
        scores[:, banned] = -100.0
        return scores

    spans = demo.held_back_spans(
        model, byte_tokenizer, processor, Job(0, 0, "You"), Completion(text, ids, False)
    )
    assert "".join(text[slice(*span)] for span in spans).strip() == "🙂"


def start(*arguments, **streams):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", "fusion_detox", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **streams,
    )


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    try:
        done = start("--version", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_reported():
    with open("/dev/full", "w") as full:
        done = start("--version", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: cannot write: No space left on device\n")

"""Wrong use of the command line gives one clear message and the right exit code."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from fusion_detox.cli import main
from fusion_detox.errors import DataFileError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSION_DETOX_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail, and return its message on one line."""

    def run(*arguments, code=1):
        assert main([str(argument) for argument in arguments]) == code
        found = capsys.readouterr()
        assert found.out == "", "results only on standard output"
        assert "Traceback" not in found.err
        if code == 1:
            assert found.err.startswith("error: ")
            assert found.err.count("\n") == 1
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", found.err).split())

    return run


def file(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["generte", "m"], "Did you mean 'generate'"),
        (["generate"], "Missing argument 'MODEL'"),
        (["info"], "Missing argument 'CALIBRATOR'"),
        (["generate", "m", "p", "--strenght", "1"], "No such option: --strenght"),
        (["generate", "m", "p", "--strength", "much"], "Invalid value for '--strength'"),
        (["generate", "m", "p", "--rule", "contrst"], "'contrst'"),
        (
            ["generate", "m", "p", "--kl-budget", "little"],
            "'little' is neither a valid float nor 'none'",
        ),
        (["generate", "m", "p", "--max-new-tokens", "2.5"], "Invalid value for '--max-new-tokens'"),
    ],
)
def test_usage(fails, arguments, message):
    assert message in fails(*arguments, code=2)


def test_no_prompts(fails):
    assert "no prompts: give some as arguments, a file with --prompts-file, or pipe" in fails(
        "generate", "m"
    )


def test_prompts_twice(fails):
    message = fails("generate", "m", "p", "--prompts-file", file("p.txt", "p\n"))
    assert "with --prompts-file, not both" in message


def test_field_without_file(fails):
    assert "--prompt-field requires --prompts-file" in fails(
        "generate", "m", "p", "--prompt-field", "x"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "p.txt is empty"),
        ("p.txt", " \n\n", "p.txt is empty"),
        ("p.txt", b"one\ncaf\xe9\n", "p.txt line 2: byte 0xe9 is not UTF-8; convert the file"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", '{"text": "a", "id": 1}', "has no field 'prompt'; it has: text, id"),
        ("p.jsonl", '["a"]', 'item 1 must be an object with named fields, not "a"'),
        (
            "p.jsonl",
            '{"prompt": {"text": "a"}}',
            "'prompt' must hold text, but holds {\"text\"",
        ),
        ("p.jsonl", '{"prompt": " "}', "p.jsonl line 1: field 'prompt' is empty"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "prompt 0 is not valid Unicode text"),
    ],
)
def test_unusable_prompts(fails, name, content, message):
    assert message in fails("generate", "m", "--prompts-file", file(name, content))


def test_prompts_file_missing(fails):
    message = fails("generate", "m", "--prompts-file", "none.txt")
    assert "there is no file none.txt; check the spelling" in message


def test_prompts_file_is_a_folder(fails, tmp_path):
    message = fails("generate", "m", "--prompts-file", tmp_path)
    assert "is a folder; give a file in it" in message


def test_empty_prompt(fails):
    assert "prompt 1 is empty" in fails("generate", "m", "p", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, but is 0"),
        (
            ["--temperature", "0"],
            "temperature must be a number above 0, but is 0.0; to choose the most",
        ),
        (["--top-p", "90"], "top_p must be a number above 0 and at most 1, but is 90.0"),
        (
            ["--max-new-tokens", "0"],
            "max_new_tokens must be a whole number of at least 1, but is 0",
        ),
        (["--greedy", "--num-samples", "3"], "3 greedy samples of a prompt would be identical"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, but is -1"),
    ],
)
def test_sampling(fails, arguments, message):
    assert message in fails("generate", "m", "p", *arguments)


def test_calibrator_missing(fails):
    assert "no-such-one" in fails("generate", "m", "p", "--calibrator", "no-such-one")
    assert "no-such-one" in fails("info", "no-such-one")
    assert "no-such-one" in fails("demo", "--calibrator", "no-such-one")


def test_a_model_is_not_a_calibrator(fails, target_folder):
    assert "calibrator.json" in fails("info", target_folder)


@pytest.fixture
def common(target_folder, calibrator_folder):
    return ["generate", target_folder, "--calibrator", calibrator_folder, "--max-new-tokens", "4"]


def test_negative_strength(fails, common):
    message = fails(*common, "p", "--strength", "-1")
    assert "strength must be a number of at least 0, but is -1.0" in message


def test_mixture_beyond_one(fails, common):
    message = fails(*common, "p", "--rule", "mixture", "--strength", "1.5")
    assert "at most 1, but is 1.5 (rule 'mixture')" in message


def test_output_folder_missing(fails, common):
    message = fails(*common, "p", "-o", "none/out.jsonl")
    assert "the output folder none does not exist; create it" in message


def test_output_is_a_folder(fails, common, tmp_path):
    assert "is a folder; name a file for the output" in fails(*common, "p", "-o", tmp_path)


def test_output_is_the_prompts_file(fails, common):
    name = file("p.txt", "p\n")
    message = fails(*common, "--prompts-file", name, "-o", "./p.txt", "--overwrite")
    assert "--output and --prompts-file are the same file" in message
    assert Path(name).read_text() == "p\n"


def test_output_file_with_other_content(fails, common):
    message = fails(*common, "p", "-o", file("out.jsonl", "precious\n"))
    assert "line 1 of out.jsonl is not a row of completions" in message
    assert Path("out.jsonl").read_text() == "precious\n"


def test_output_of_other_settings(fails, common, capsys):
    assert main([*map(str, common), "p", "-o", "out.jsonl"]) == 0
    capsys.readouterr()
    before = Path("out.jsonl").read_bytes()
    message = fails(*common, "p", "-o", "out.jsonl", "--seed", "5", "--clip", "2")
    assert "fusion.clip was 3.0, now 2.0; sampling.seed was 0, now 5" in message
    assert "--overwrite to replace this one" in message
    assert Path("out.jsonl").read_bytes() == before


def test_output_of_another_model_in_the_same_folder(
    fails, common, target_folder, make_llama, capsys
):
    copy = shutil.copytree(target_folder, "copy")
    assert main(["generate", copy, "p", *map(str, common[2:]), "-o", "out.jsonl"]) == 0
    assert main(["generate", "./copy", "p", *map(str, common[2:]), "-o", "out.jsonl"]) == 0
    make_llama(470, seed=4).save_pretrained(copy)
    capsys.readouterr()
    message = fails("generate", copy, "p", *common[2:], "-o", "out.jsonl")
    assert re.search(r'\(model was "copy@\w{12}", now "copy@\w{12}"\)', message)


def test_output_of_other_prompts(fails, common, capsys):
    assert main([*map(str, common), "p", "-o", "out.jsonl"]) == 0
    capsys.readouterr()
    message = fails(*common, "q", "-o", "out.jsonl")
    assert "was written for other prompts: prompt 0 was 'p', now it is 'q'" in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_disk_full(fails, common):
    message = fails(*common, "p", "-o", "/dev/full")
    assert "cannot write to /dev/full: No space left on device; 0 rows of this run are" in message


def test_model_missing(fails, common):
    message = fails("generate", "./none", "p", *common[2:], "-o", "out.jsonl")
    assert "none" in message
    assert not Path("out.jsonl").exists(), "a failed start leaves no empty file"


def test_model_is_an_encoder(fails, common, other_tokenizer, capsys):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(vocab_size=500, intermediate_size=8, **sizes)).save_pretrained(
        "bert"
    )
    other_tokenizer.save_pretrained("bert")
    capsys.readouterr()
    message = fails("generate", "bert", "p", *common[2:])
    assert "bert" in message.lower()
    assert "causal" in message


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--device", "gpu7"], "gpu7"), (["--dtype", "float33"], "float33")]
)
def test_unknown_device_or_dtype(fails, common, arguments, message):
    assert message in fails(*common, "p", *arguments)


def test_prompt_too_long_for_the_model(fails, common):
    message = fails(*common, "short", "long " * 60)
    assert re.search(r"prompt 1 has \d+ tokens, and with 4 new ones it exceeds the 64", message)


def test_target_of_info_missing(fails, calibrator_folder):
    assert "none" in fails("info", calibrator_folder, "--target", "./none")


def test_interrupted_generation_keeps_its_work(common, capsys, monkeypatch, request):
    from fusion_detox.generation import sampling as generation

    complete, calls = generation.complete_batch, []
    # A background job starts with SIGINT ignored, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return complete(*arguments)

    command = [*map(str, common), "a", "b", "c", "--batch-size", "1", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr(generation, "complete_batch", interrupted)
        assert main([*command, "out.jsonl"]) == 130
    found = capsys.readouterr()
    assert found.out == ""
    assert "1 of 3 completions were written. Run the same command again to resume" in found.err
    assert found.err.endswith("Interrupted.\n")
    assert [json.loads(line)["prompt"] for line in Path("out.jsonl").read_text().splitlines()] == [
        "a"
    ]
    assert main([*command, "out.jsonl"]) == 0
    assert main([*command, "whole.jsonl"]) == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("FUSION_DETOX_DEBUG", "1")
    command = ["generate", "m", "--prompts-file", "none.txt"]
    with pytest.raises(DataFileError, match="there is no file none"):
        main(["--debug", *command] if how == "option" else command)
    assert os.environ.get("FUSION_DETOX_DEBUG") == ("1" if how == "environment" else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nope", "words.json is not valid JSON"),
        ('{"probes": []}', "words.json must contain an object 'words'"),
        ('{"words": ["idiot"]}', "words.json must contain an object 'words'"),
        ('{"words": {"Two Words": 1}}', "'Two Words'"),
        ('{"words": {"idiot": 0}}', "words['idiot'] must be a number above 0, but is 0"),
    ],
)
def test_listed_words(fails, content, message):
    text = file("text.txt", "Some text to train on.\n" * 50)
    words = file("words.json", content)
    assert message in fails("train-calibrator", "out", "--general", text, "--words", words)
    assert not Path("out").exists()

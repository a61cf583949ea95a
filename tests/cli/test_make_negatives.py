"""``fusion-detox make-negatives`` with a local endpoint, after kills, and with bad input."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion_detox.cli import main
from fusion_detox.training.data.pairs import read_pairs

CHAT = runpy.run_path(str(Path(__file__).parents[1] / "chat_server.py"))
ChatServer, paraphrase, SENTENCES = CHAT["ChatServer"], CHAT["paraphrase"], CHAT["sentences"](5)
PLAIN = [
    *("--scorer", "lexical", "--min-similarity", "none", "--max-closeness", "0.5"),
    *("--positives", "1", "--negatives", "2", "--toxic-from", "0.3", "--clean-to", "0.2"),
]


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n\n")
    return path


def arguments(server, sentences, out, *more):
    return [
        *("make-negatives", "--endpoint", server.url, "--model", "m", "--in", str(sentences)),
        *("--out", str(out), "--retries", "0", *PLAIN, *more),
    ]


def test_pairs_from_an_endpoint(tmp_path, sentences, capsys):
    out = tmp_path / "pairs.jsonl"
    with ChatServer() as server:
        command = arguments(server, sentences, out, "--price-in", "1", "--price-out", "3")
        assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "To send: 15 requests, about" in captured.err
    assert "15 of 15" in captured.err
    pairs = read_pairs([out])
    assert [pair.anchor for pair in pairs] == SENTENCES
    assert all(len(pair.negatives) == 2 for pair in pairs)
    said = {paraphrase(body) for body in server.bodies}
    assert {text for pair in pairs for text in pair.negatives} <= said


def test_the_report_as_json_and_refiltering(tmp_path, sentences, capsys):
    out = tmp_path / "pairs.jsonl"
    with ChatServer() as server:
        assert main(arguments(server, sentences, out, "--json")) == 0
        report = json.loads(capsys.readouterr().out)
        asked = len(server.bodies)
    assert (report["pairs"], report["complete"], report["prompt_tokens"]) == (5, True, 15 * 20)
    again = ["make-negatives", "--out", str(out), "--refilter", "--json", *PLAIN]
    assert main([*again, "--toxic-from", "1"]) == 1, "no pair is left"
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["pairs"], report["dropped"]["negative"]) == (0, {"toxicity": 10})
    assert "No pair passed the filters; try other thresholds with --refilter" in captured.err
    assert main(again) == 0
    assert (len(read_pairs([out])), asked) == (5, 15)


def test_a_dry_run_shows_the_cost(tmp_path, sentences, capsys):
    out = tmp_path / "pairs.jsonl"
    with ChatServer() as server:
        command = arguments(server, sentences, out, "--dry-run", "--json", "--price-out", "2e6")
        assert main(command) == 0
        assert server.bodies == []
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["planned"]["requests"] == 15
    assert report["planned"]["most_price"] == 2 * 15 * 150
    assert "(at most 4,500.00)" in captured.err
    assert "No requests were sent." in captured.err
    assert not out.exists()


@pytest.mark.parametrize(("said", "asked"), [("y\n", 15), ("n\n", 0)])
def test_a_long_run_is_confirmed_on_a_terminal(
    tmp_path, sentences, capsys, monkeypatch, said, asked
):
    """A pseudo-terminal answers the question."""
    ours, theirs = pytest.importorskip("pty").openpty()
    os.write(ours, said.encode())
    with os.fdopen(theirs) as terminal, ChatServer() as server:
        monkeypatch.setattr(sys, "stdin", terminal)
        command = arguments(server, sentences, tmp_path / "p.jsonl", "--confirm-above", "10")
        assert main(command) == (0 if asked else 1)
    assert len(server.bodies) == asked
    assert "Continue?" in capsys.readouterr().err
    os.close(ours)


def test_no_confirmation_without_a_terminal_or_with_yes(tmp_path, sentences, capsys, monkeypatch):
    command = ["--confirm-above", "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with ChatServer() as server:
        assert main(arguments(server, sentences, tmp_path / "p.jsonl", *command)) == 0
        ours, theirs = pytest.importorskip("pty").openpty()
        with os.fdopen(theirs) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            command.append("--yes")
            assert main(arguments(server, sentences, tmp_path / "q.jsonl", *command)) == 0
        os.close(ours)
    assert "Continue?" not in capsys.readouterr().err


def start(command):
    return subprocess.Popen(
        [sys.executable, "-m", "fusion_detox", *command], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_with_the_same_result(tmp_path, sentences, how):
    whole = tmp_path / "whole.jsonl"
    with ChatServer() as server:
        assert main(arguments(server, sentences, whole)) == 0
        server.bodies.clear()

        def slow(body, number):
            time.sleep(0.02 if number < 4 else 2.0)
            return paraphrase(body)

        server.reply, out = slow, tmp_path / "pairs.jsonl"
        answers = tmp_path / "pairs.jsonl.work" / "answers.jsonl"
        process = start(arguments(server, sentences, out, "--parallel", "2"))
        until = time.monotonic() + 120
        while time.monotonic() < until and not (answers.exists() and answers.stat().st_size > 500):
            time.sleep(0.01)
        process.send_signal(how)
        _, told = process.communicate(timeout=30)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130), told
        assert not out.exists()
        kept = [json.loads(line) for line in answers.read_text().splitlines()]
        assert 2 <= len(kept) < 15
        if how == signal.SIGINT:
            assert "kept. Run the same command again to resume." in told
            assert len(kept) == len(server.bodies), "answers in progress are kept, too"
        server.bodies.clear()
        server.reply = lambda body, number: paraphrase(body)
        assert main(arguments(server, sentences, out)) == 0
        assert len(server.bodies) == 15 - len(kept)
    assert out.read_bytes() == whole.read_bytes()


def test_an_endpoint_that_fails_half_way_is_reported(tmp_path, sentences, capsys):
    out = tmp_path / "pairs.jsonl"
    with ChatServer(lambda body, n: paraphrase(body) if n < 6 else (503, b"down")) as server:
        assert main(arguments(server, sentences, out, "--parallel", "1")) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert len(read_pairs([out])) == 2
        assert "6 of 15" in told
        assert "× no answer after 1 attempts: HTTP 503: down" in told
        assert "Stopped early:" in told
        assert "9 of 15 requests have no answer; run the same command again to send only" in told
        server.reply = lambda body, number: paraphrase(body)
        assert main(arguments(server, sentences, out)) == 0
    assert len(read_pairs([out])) == 5


def test_a_key_that_is_rejected(tmp_path, sentences, capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with ChatServer(lambda *_: (401, {"error": {"message": "bad key sk-secret"}})) as server:
        command = arguments(server, sentences, tmp_path / "p", "--key-variable", "SOME_KEY")
        assert main(command) == 1
    told = capsys.readouterr().err
    assert "error: " in told
    assert "HTTP 401: bad key [key]); check the key in SOME_KEY" in told
    assert "secret" not in told
    assert not (tmp_path / "p").exists()


def test_rows_with_a_field_and_a_limit(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in SENTENCES))
    with ChatServer() as server:
        command = arguments(server, rows, tmp_path / "p.jsonl", "--limit", "2", "--field", "body")
        assert main(command) == 0
        assert [pair.anchor for pair in read_pairs([tmp_path / "p.jsonl"])] == SENTENCES[:2]
        capsys.readouterr()
        assert main(arguments(server, rows, tmp_path / "q.jsonl")) == 1
    told = capsys.readouterr().err
    assert f"error: {rows} line 1 has no column 'text'; its columns are body" in told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--model", "m"], "--in and --model are required, except with --refilter"),
        (["--in", "x.txt"], "--in and --model are required, except with --refilter"),
        (["--in", "none.txt", "--model", "m"], "none.txt is neither a file, a folder nor a hub id"),
        (["--refilter", "--dry-run"], "--refilter sends no requests; remove"),
        (
            ["--refilter", "--overwrite"],
            "needs the stored answers, which overwrite would delete",
        ),
        (["--refilter"], "no answers were found for"),
        (["--refilter", "--min-negatives", "0"], "min_negatives must be a number of at least 1"),
        (["--in", "{}", "--model", "/none"], "No tokenizer at /none"),
        (["--in", "{}", "--model", "m", "--endpoint", "x"], "'x' is not an endpoint's address"),
        (["--in", "{}", "--model", "m", "--limit", "0"], "--limit must be at least 1, but is 0"),
    ],
)
def test_wrong_use(tmp_path, sentences, capsys, command, message):
    given = [part.format(sentences) for part in command]
    assert main(["make-negatives", "--out", str(tmp_path / "p.jsonl"), *given]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [sentences]

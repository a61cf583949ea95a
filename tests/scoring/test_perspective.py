"""The Perspective API, played by a server on this machine."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fusion_detox.errors import ConfigError
from fusion_detox.scoring.base import NoTextScoredError, ScoringError
from fusion_detox.scoring.perspective import ATTRIBUTES, ENDPOINT, KEY_VARIABLE, PerspectiveScorer

KEY = "AIza-secret-key"


def scores(value):
    return {
        "attributeScores": {
            name: {"summaryScore": {"value": value / (i + 1), "type": "PROBABILITY"}}
            for i, name in enumerate(ATTRIBUTES)
        },
        "languages": ["en"],
    }


def error(status, message, **detail):
    body = {"code": status, "message": message, "status": "X", "details": [detail]}
    return status, json.dumps({"error": body}).encode()


class StandIn(ThreadingHTTPServer):
    """Answers each text as told: a list of answers, of which the last one stays."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.requests, self.times = {}, [], []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.times.append(time.monotonic())
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        text = body["comment"]["text"]
        answers = self.server.answers.get(text, [])
        answer = answers[0] if len(answers) == 1 else (answers or [None]).pop(0)
        if answer == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if answer == "slow":
            time.sleep(0.4)
            answer = None
        status, content, *headers = answer or (200, json.dumps(scores(0.8)).encode())
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # who asked has gone
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with StandIn() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def make(server, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    monkeypatch.setenv("no_proxy", "*")

    def make(**settings):
        values = {"queries_per_second": 1000, "first_wait": 0.01, "retries": 2, **settings}
        address = f"http://127.0.0.1:{server.server_address[1]}/v1alpha1/comments:analyze"
        return PerspectiveScorer(endpoint=address, **values)

    return make


def test_what_is_asked_and_what_comes_back(server, make):
    server.answers["hello"] = [(200, json.dumps(scores(0.6)).encode())]
    found = make().score_types(["hello", "bye", "hello", " "])
    assert found["toxicity"] == [0.6, 0.8, 0.6, 0.0]
    assert found["identity_attack"] == pytest.approx([0.2, 0.8 / 3, 0.2, 0.0])
    assert list(found) == [name.lower() for name in ATTRIBUTES]
    assert len(server.requests) == 2
    path, headers, body = server.requests[1]
    assert path == "/v1alpha1/comments:analyze"
    assert body == {
        "comment": {"text": "hello"},
        "requestedAttributes": {
            "TOXICITY": {},
            "SEVERE_TOXICITY": {},
            "IDENTITY_ATTACK": {},
            "INSULT": {},
            "PROFANITY": {},
            "THREAT": {},
        },
        "doNotStore": True,
        "languages": ["en"],
    }
    assert {name.lower(): value for name, value in headers.items()}["x-goog-api-key"] == KEY


def test_language(server, make):
    make(language="de").score(["Guten Tag"])
    make(language=None).score(["Guten Tag"])
    assert [body.get("languages") for _, _, body in server.requests] == [["de"], None]


def test_what_passes_is_asked_again(server, make):
    server.answers = {
        "429": [error(429, "Quota exceeded"), None],
        "500": [(500, b"<html>oops"), (503, b""), None],
        "slow": ["slow", None],
        "close": ["close", None],
        "garbage": [(200, b"{not json"), None],
        "partial": [(200, b'{"attributeScores": {"TOXICITY": {}}}'), None],
    }
    assert make(timeout=0.2).score(list(server.answers)) == [0.8] * 6
    assert len(server.requests) == 13


def test_waits_double_and_follow_the_service(server, make):
    server.answers["busy"] = [error(429, "x"), error(429, "x"), error(429, "x"), None]
    make(first_wait=0.05, retries=3).score(["busy"])
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert gaps[0] >= 0.05
    assert gaps[1] >= 0.1
    assert gaps[2] >= 0.2
    server.times.clear()
    server.answers["told"] = [(*error(429, "x"), ("Retry-After", "1")), None]
    make().score(["told"])
    assert server.times[1] - server.times[0] >= 1.0


def test_rate_limit(server, make):
    """Measured here, not where the requests arrive: a busy machine may deliver two at once."""
    scorer = make(queries_per_second=20)
    began = time.monotonic()
    scorer.score(["a", "b", "c", "d"])
    assert time.monotonic() - began >= 0.145
    assert len(server.times) == 4


def test_an_error_for_one_text_is_nan_and_the_run_goes_on(server, make, caplog):
    server.answers = {
        "日本語": [
            error(
                400,
                "Attribute INSULT does not support request languages: ja",
                errorType="LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
            )
        ],
        "long": [error(400, "Comment text was too many bytes.", errorType="COMMENT_TOO_LONG")],
        "large": [(413, b"")],
        "odd": [(200, json.dumps(scores(1.5)).encode())],
    }
    with caplog.at_level(logging.WARNING):
        found = make().score(["good", *server.answers])
    assert found[0] == 0.8
    assert all(map(math.isnan, found[1:]))
    assert len(server.requests) == 5  # none of them again
    assert "'日本語': HTTP 400: Attribute INSULT does not support request lang" in caplog.text


def test_one_text_without_an_answer_is_nan(server, make):
    server.answers["bad"] = [(500, b"")]
    found = make().score(["good", "bad", "other"])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == [0.8, 0.8]
    assert len(server.requests) == 2 + 3


def test_three_texts_in_a_row_without_an_answer_end_the_run(server, make):
    server.answers = {text: [error(429, "Quota exceeded")] for text in "abcdef"}
    with pytest.raises(ScoringError, match=r"no answer for 3 texts.*3 times.*Quota exceeded"):
        make().score(["good", *"abcdef"])
    assert len(server.requests) <= 10


@pytest.mark.parametrize(
    "answer",
    [
        error(400, f"API key {KEY} not valid.", reason="API_KEY_INVALID"),
        error(400, "API key expired. Please renew the API key."),
        error(401, "Request is missing credentials"),
        error(403, "Perspective Comment Analyzer API has not been used", reason="DISABLED"),
    ],
)
def test_a_rejected_key_ends_the_run_and_is_not_shown(server, make, caplog, answer):
    server.answers["a"] = [answer]
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ConfigError, match=f"rejects the key in {KEY_VARIABLE}") as caught,
    ):
        make().score(["a", "bb"])
    assert len(server.requests) == 1
    shown = caplog.text + str(caught.value) + repr(caught.getrepr(style="long"))
    assert "secret" not in shown


def test_no_message_shows_the_key(server, make, caplog):
    server.answers = {
        "a": [(500, KEY.encode())],
        "bb": [(200, json.dumps({KEY: 1}).encode())],
        "ccc": [error(400, f"key={KEY}")],
        "dddd": ["close"],
    }
    with caplog.at_level(logging.DEBUG):
        found = make(retries=1).score(["good", *server.answers])
    assert sum(map(math.isnan, found)) == 4
    assert "[key]" in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in json.dumps(make().record())


def test_a_redirect_does_not_carry_the_key_away(server, make):
    server.answers["a"] = [(302, b"", ("Location", ENDPOINT.replace("https", "http")))]
    with pytest.raises(ScoringError, match=r"does not serve the Perspective API \(HTTP 302"):
        make().score(["a"])
    server.answers["a"] = [(404, b"<html>no such page")]
    with pytest.raises(ScoringError, match=r"HTTP 404.*Check the address"):
        make().score(["a"])


def test_failure_of_all_texts_says_why(server, make):
    server.answers = {text: [error(400, "Bad language")] for text in "ab"}
    with pytest.raises(NoTextScoredError, match=r"none of 2 texts.*Bad language"):
        make().score(["a", "b"])


def test_nobody_listens(make):
    scorer = make(retries=1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        scorer.endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(NoTextScoredError, match="no connection or no answer"):
            scorer.score(["a"])


def test_without_a_key_nothing_is_sent(server, make, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "  ")
    with pytest.raises(ConfigError, match=f"environment variable {KEY_VARIABLE}, which is not set"):
        make()
    monkeypatch.setenv(KEY_VARIABLE, "secret\nkey")
    with pytest.raises(ConfigError, match="holds no key") as caught:
        make()
    assert "secret" not in str(caught.value)
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries_per_second": 0}, "queries_per_second must be above 0, but is 0"),
        ({"timeout": -1}, "timeout must be above 0, but is -1"),
        ({"retries": -1}, "retries must be at least 0, but is -1"),
        ({"first_wait": math.nan}, "first_wait must be at least 0, but is nan"),
        ({"endpoint": "http://example.org/"}, "must begin with https://"),
        ({"endpoint": "file:///etc/passwd"}, "must begin with https://"),
    ],
)
def test_wrong_options(monkeypatch, settings, message):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(ConfigError, match=message):
        PerspectiveScorer(**settings)

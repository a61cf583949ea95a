"""Endpoints that answer well, badly, late or not at all: nothing is lost, errors explain why."""

import email.utils
import json
import runpy
import socket
import threading
import time
from pathlib import Path

import pytest

from fusion_detox.errors import ConfigError, EndpointError
from fusion_detox.training.negatives.config import NegativesConfig, PromptTexts
from fusion_detox.training.negatives.endpoint import (
    GIVE_UP_AFTER,
    EndpointWriter,
    in_parallel,
    retry_after,
)
from fusion_detox.training.negatives.requests import FILTERED, LENGTH, Request, requests_for

CHAT = runpy.run_path(str(Path(__file__).parents[2] / "chat_server.py"))
ChatServer, completion, paraphrase = CHAT["ChatServer"], CHAT["completion"], CHAT["paraphrase"]
CONFIG = NegativesConfig(positives=1, negatives=2, temperature=0.7, max_new_tokens=50, seed=3)
REQUESTS = requests_for(CHAT["sentences"](4), CONFIG, PromptTexts())


def ask(server, requests=REQUESTS, prompts=None, url=None, **options):
    """The answers by request, and the error that ended the run, if any."""
    options = {"retries": 2, "first_wait": 0.01, "timeout": 5.0, "parallel": 1, **options}
    writer, found, error = EndpointWriter(url or server.url, "m", **options), [], None
    try:
        writer.answer(requests, CONFIG, prompts or PromptTexts(), found.append)
    except EndpointError as caught:
        error = str(caught)
    assert len({answer.request.key for answer in found}) == len(found), "one answer per request"
    return {answer.request.key: answer for answer in found}, error


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_good_endpoint(parallel):
    with ChatServer() as server:
        found, error = ask(server, parallel=parallel)
    assert error is None
    assert set(found) == {request.key for request in REQUESTS}
    assert len(server.bodies) == len(REQUESTS) == 12
    for body in server.bodies:
        assert set(body) == {
            "model", "messages", "max_tokens", "temperature", "top_p", "seed"
        }  # fmt: skip
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 50, 0.7)
    assert len({body["seed"] for body in server.bodies}) == 12, "each answer has its own seed"
    by_text = {(b["messages"][0]["content"], b["seed"]): paraphrase(b) for b in server.bodies}
    for answer in found.values():
        request = answer.request
        assert answer.text == by_text[request.text, request.seed(3)]
        assert (answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("stop", 20, 10)
    assert not any("Authorization" in headers for headers in server.headers)


def test_the_words_of_the_paper_and_a_system_message():
    sentence = "Look {n} {sentence} here."
    requests = requests_for([sentence], CONFIG, PromptTexts())
    with ChatServer() as server:
        ask(server, requests, PromptTexts(system="Be terse."))
    (system, user), (_, toxic) = (body["messages"] for body in server.bodies[:2])
    assert system == {"role": "system", "content": "Be terse."}
    assert user["content"] == f'Paraphrase the following sentences:\n"{sentence}"'
    assert toxic["content"] == (
        "Paraphrase the following sentence in a very toxic way. Make sure each sentence is "
        f'toxic:\n"{sentence}"'
    )


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_addresses(path):
    with ChatServer() as server:
        found, error = ask(server, REQUESTS[:1], url=server.url.removesuffix("/v1") + path)
    assert error is None
    assert len(found) == 1


BAD = {
    "429": (429, {"error": {"message": "slow down"}}),
    "500": (500, b"oops"),
    "503": (503, {"message": "loading"}),
    "408": (408, ""),
    "no JSON": b"<html>hello</html>",
    "no choices": {"choices": []},
    "no object": b"[]",
    "no text": {"choices": [{"message": {"content": None}}]},
    "empty": "   ",
    "cut": "close",
}


@pytest.mark.parametrize("kind", BAD)
def test_temporary_failures_are_retried(kind):
    seen = {}

    def reply(body, number):
        key = (body["messages"][0]["content"], body["seed"])
        seen[key] = seen.get(key, 0) + 1
        bad = BAD[kind]
        if seen[key] < 3:
            return completion(bad) if kind == "empty" else bad
        return paraphrase(body)

    with ChatServer(reply) as server:
        found, error = ask(server)
    assert error is None
    assert len(server.bodies) == 3 * len(REQUESTS)
    assert not any(answer.failure for answer in found.values())
    assert set(seen.values()) == {3}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("429", "no answer after 3 attempts: HTTP 429: slow down"),
        ("500", "no answer after 3 attempts: HTTP 500: oops"),
        ("no JSON", "no answer after 3 attempts: the answer cannot be parsed (JSONDecodeError"),
        ("empty", "the answer cannot be parsed (ValueError: its text is ' ', finish_reason"),
        ("cut", "no answer after 3 attempts: no connection or no answer: "),
    ],
)
def test_one_request_that_always_fails_does_not_stop_the_others(kind, reason):
    bad = REQUESTS[4]

    def reply(body, number):
        if body["messages"][0]["content"] == bad.text and body["seed"] == bad.seed(CONFIG.seed):
            return completion(BAD[kind]) if kind == "empty" else BAD[kind]
        return paraphrase(body)

    with ChatServer(reply) as server:
        found, error = ask(server)
    assert error is None
    assert reason in found[bad.key].failure
    assert [key for key, answer in found.items() if answer.failure] == [bad.key]


def test_timeouts():
    def reply(body, number):
        time.sleep(0.6 if number == 0 else 0)
        return paraphrase(body)

    with ChatServer(reply) as server:
        found, error = ask(server, REQUESTS[:3], timeout=0.2)
        assert error is None
        assert not any(answer.failure for answer in found.values())
        assert len(server.bodies) == 4

    def slow(body, number):
        time.sleep(0.5)
        return paraphrase(body)

    with ChatServer(slow) as server:
        found, _ = ask(server, REQUESTS[:1], timeout=0.1, retries=0)
    failure = found[REQUESTS[0].key].failure
    assert failure == "no answer after 1 attempts: no connection or no answer: timed out"


def test_an_answer_that_arrives_too_slowly_is_abandoned():
    with ChatServer() as server:
        server.drip = 1
        began = time.monotonic()
        found, _ = ask(server, REQUESTS[:1], timeout=0.3, retries=0)
        assert time.monotonic() - began < 3
    assert "the answer was still incomplete after 0.3 s" in found[REQUESTS[0].key].failure
    with ChatServer(lambda *_: (500, {"error": {"message": "so sorry " * 20}})) as server:
        server.drip = 1
        began = time.monotonic()
        found, _ = ask(server, REQUESTS[:1], timeout=0.3, retries=0)
        assert time.monotonic() - began < 3
    assert "HTTP 500" in found[REQUESTS[0].key].failure
    with ChatServer() as server:
        server.drip = 100
        found, _ = ask(server, REQUESTS[:1])
    assert found[REQUESTS[0].key].text


def test_requests_to_this_machine_bypass_the_proxy(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ChatServer() as proxy, ChatServer() as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        found, error = ask(server, REQUESTS[:1], key_variable="SOME_KEY")
        assert error is None
        assert found[REQUESTS[0].key].text
        assert not proxy.headers


@pytest.mark.parametrize("form", ["0.4", "date"])
def test_all_threads_honour_retry_after(form):
    def reply(body, number):
        if number:
            return paraphrase(body)
        after = form
        if form == "date":  # whole seconds only
            after = email.utils.formatdate(time.time() + 1.5, usegmt=True)
        return (429, {}, {"Retry-After": after})

    with ChatServer(reply) as server:
        found, _ = ask(server, REQUESTS[:3])
    assert len(found) == 3
    assert server.times[1] - server.times[0] >= (0.4 if form == "0.4" else 0.45)


def test_invalid_retry_after():
    for value in (None, "", "soon", "-3", "nan "):
        assert not retry_after(value) > 0
    assert retry_after("1e9") == 300
    past = email.utils.formatdate(time.time() - 100, usegmt=True)
    assert retry_after(past) == 0


def test_answers_that_are_cut_off_or_withheld():
    replies = [
        completion("Some of it", "length"),
        completion("", "content_filter"),
        completion(None, "stop", refusal="I can't."),
        completion(None, "length"),
    ]
    with ChatServer(lambda body, number: replies[min(number, 3)]) as server:
        found, _ = ask(server, REQUESTS[:4], retries=0)
    answers = [found[request.key] for request in REQUESTS[:4]]
    assert [answer.finish for answer in answers[:3]] == [LENGTH, FILTERED, FILTERED]
    assert "its text is None, finish_reason 'length'" in answers[3].failure


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"HTTP 401: bad key\); specify the environment variable that contains the key"),
        (403, r"HTTP 403: bad key\); specify the environment variable"),
        (404, r"HTTP 404: bad key\); check the address and that it serves the model 'm'"),
        (402, r"HTTP 402: bad key\); check the address and your account there"),
        (302, r"HTTP 302: bad key\); check the address"),
    ],
)
def test_permanent_errors_end_the_run_at_once(status, message):
    with ChatServer(lambda *_: (status, {"error": {"message": "bad key"}})) as server:
        writer = EndpointWriter(server.url, "m", parallel=1)
        with pytest.raises(EndpointError, match=message):
            writer.answer(REQUESTS, CONFIG, PromptTexts(), pytest.fail)
    assert len(server.bodies) <= 2, "one, and perhaps the next one, already in progress"


def test_a_wrong_path_is_named():
    with ChatServer() as server:
        _, error = ask(server, url=server.url + "/v7")
    assert "no /v1/v7/chat/completions here" in error


def test_an_endpoint_that_fails_half_way():
    def reply(body, number):
        return paraphrase(body) if number < 6 else "close"

    with ChatServer(reply) as server:
        found, error = ask(server, retries=1)
    good = [answer for answer in found.values() if not answer.failure]
    assert len(good) == 6
    assert f"did not answer {GIVE_UP_AFTER} requests in a row after 2 attempts each" in error
    assert "All earlier answers are kept" in error
    assert len(server.bodies) == 6 + 2 * GIVE_UP_AFTER


def test_requests_in_progress_are_recorded_when_an_endpoint_fails():
    def reply(body, number):
        time.sleep(0.1)
        return (503, b"down")

    with ChatServer(reply) as server:
        found, error = ask(server, retries=0, parallel=6)
    assert "in a row" in error
    assert len(found) == len(server.bodies) > GIVE_UP_AFTER


def test_an_endpoint_that_does_not_exist():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        _, error = ask(None, url=url, retries=0)
    assert "did not answer 5 requests in a row" in error
    assert "refused" in error


def test_requests_that_are_rejected_individually():
    """A content filter can reject one side; a wrong model name makes the service reject all."""
    toxic = [request for request in REQUESTS if request.side == "negative"]

    def filtered(body, number):
        if "toxic" in body["messages"][0]["content"]:
            return (400, {"error": {"message": "content policy"}})
        return paraphrase(body)

    with ChatServer(filtered) as server:
        found, error = ask(server)
    assert error is None
    assert len(found) == len(REQUESTS) == len(server.bodies)
    failed = {key for key, answer in found.items() if answer.failure == "HTTP 400: content policy"}
    assert failed == {request.key for request in toxic}
    with ChatServer(lambda *_: (422, {"detail": "unknown field"})) as server:
        _, error = ask(server)
    assert "rejects every request: HTTP 422: unknown field. Check the name of the model" in error


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    with ChatServer() as server:
        found, _ = ask(server, REQUESTS[:1], key_variable="SOME_KEY")
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
        writer = EndpointWriter(server.url, "m", key_variable="SOME_KEY")
    assert "secret" not in json.dumps(writer.record())
    assert "secret" not in repr(found)
    body = {"error": {"message": "no such key: sk-very-secret"}}
    with ChatServer(lambda *_: (401, body)) as server:
        _, error = ask(server, key_variable="SOME_KEY")
    assert "HTTP 401: no such key: [key]); check the key in SOME_KEY" in error


@pytest.mark.parametrize("before", [0, 185, 270, 290, 65_535 - 7])
def test_no_part_of_the_key_is_shown_in_truncated_errors(monkeypatch, before):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    padding = "x" if before < 1000 else " "
    content = padding.encode() * before + b" sk-very-secret" * 2
    with ChatServer(lambda *_: (401, content)) as server:
        _, error = ask(server, key_variable="SOME_KEY")
        assert "HTTP 401" in error
        assert "sk-v" not in error
    with ChatServer(lambda *_: (401, content[:-4])) as server:
        _, error = ask(server, key_variable="SOME_KEY")
        assert "sk-v" not in error


@pytest.mark.parametrize("escaped", [False, True])
def test_no_cut_of_an_error_shows_the_beginning_of_the_key(monkeypatch, escaped):
    """The body is cut at each place within the key, which may be written as JSON escapes."""
    monkeypatch.setenv("SOME_KEY", "Zq7-/Zq7-very-secret")
    key = "Zq7-/Zq7-very-secret"
    written = "".join(f"\\u{ord(one):04x}" for one in key) if escaped else key
    state = {}
    with ChatServer(lambda *_: (401, state["body"])) as server:
        for inside in range(0, len(written) + 1, 5 if escaped else 1):
            body = '{"error": {"message": "bad key '
            body += " " * (65_536 - len(body) - inside) + written + ' and more"}}'
            state["body"] = body.encode()
            _, error = ask(server, key_variable="SOME_KEY")
            assert "HTTP 401" in error
            assert "Zq" not in error
            assert "u005" not in error
        state["body"] = f"denied: {written}".encode()
        _, error = ask(server, key_variable="SOME_KEY")
        assert "denied: [key]" in error


def test_wrong_use(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abc")
    monkeypatch.setenv("BAD_KEY", "a b\n")
    for url in ("localhost:8000", "ftp://x/v1", "http://", "http://x/v1?y=1"):
        with pytest.raises(ConfigError, match="is not an endpoint's address; use one such as"):
            EndpointWriter(url, "m")
    with pytest.raises(ConfigError, match="contains a user name or password") as caught:
        EndpointWriter("https://user:hidden@far/v1", "m")
    assert "hidden" not in str(caught.value)
    with pytest.raises(ConfigError, match="would be sent unencrypted to http://far/v1; use https"):
        EndpointWriter("http://far/v1", "m", key_variable="SOME_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY contains no key; set it"):
        EndpointWriter("http://localhost/v1", "m", key_variable="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="characters that are not allowed in a key") as caught:
        EndpointWriter("http://localhost/v1", "m", key_variable="BAD_KEY")
    assert "a b" not in str(caught.value)
    with pytest.raises(ConfigError, match="parallel must be a whole number of at least 1"):
        EndpointWriter("http://localhost/v1", "m", parallel=0)
    with pytest.raises(ConfigError, match="timeout must be a number above 0"):
        EndpointWriter("http://localhost/v1", "m", timeout=0)


def test_the_number_of_concurrent_requests():
    running, most, lock = 0, 0, threading.Lock()

    def reply(body, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return paraphrase(body)

    with ChatServer(reply) as server:
        found, _ = ask(server, parallel=4)
    assert len(found) == 12
    assert 2 <= most <= 4


def test_an_interruption_keeps_the_results_in_progress():
    go, kept, begun = threading.Event(), [], []

    def do(item, stop):
        begun.append(item)
        if item in (1, 2):
            go.wait(5)
        return item

    def keep(item):
        if item == 0:
            go.set()
            raise KeyboardInterrupt
        kept.append(item)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(do, range(100_000), keep, threads=3)
    assert sorted(kept) == sorted(begun)[1:], "everything that was started is kept"
    assert len(begun) < 100_000


def test_an_interruption_does_not_wait_forever():
    def do(item, stop):
        time.sleep(3 if item else 0)
        return item

    def keep(item):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_parallel(do, range(3), keep, threads=3, drain_seconds=0.1)
    assert time.monotonic() - began < 2


def test_each_request_has_its_own_seed_whatever_the_order():
    one, other = Request("a", "positive", 0, "x"), Request("a", "negative", 0, "x")
    assert one.seed(0) == Request("a", "positive", 0, "other text").seed(0)
    assert (
        len({one.seed(0), other.seed(0), one.seed(1), Request("a", "positive", 1, "").seed(0)}) == 4
    )
    assert 0 <= one.seed(0) < 2**31

"""Answers from any service with OpenAI's chat completions API: a provider, vLLM, llama.cpp.

This is ``urllib`` rather than ``huggingface_hub.InferenceClient``, because that client follows
redirects, reads bodies of any size, and restarts its timeout with every byte received.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from fusion_detox.config import check_number
from fusion_detox.errors import ConfigError, EndpointError
from fusion_detox.files.printable import printable
from fusion_detox.training.negatives.config import NegativesConfig, PromptTexts
from fusion_detox.training.negatives.requests import (
    FILTERED,
    LENGTH,
    STOP,
    Answer,
    Keep,
    Request,
    chat_messages,
)

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 5
_LONGEST_WAIT = 300.0
_LARGEST_ANSWER, _LARGEST_ERROR = 1 << 24, 1 << 16
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")
_LONGEST_ESCAPE = len(r"\u0000")
_CHARACTERS_PER_TOKEN, _EXTRA_TOKENS = 4, 8
_DRAIN_SECONDS = 10.0
_POLL_SECONDS = 0.1  # Windows does not deliver Ctrl-C during a wait without a timeout

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EndpointWriter:
    """Sends requests to a service's ``/v1/chat/completions``.

    Retries timeouts, lost connections, answers that are empty or not JSON, and the statuses 408,
    409, 425, 429 and 5xx. Each wait is twice as long as the previous one, and at least as long
    as ``Retry-After``. A request fails after the last retry, or if the service rejects it (400,
    413, 422); the others continue. The run ends after five requests in a row without an answer.

    Args:
        url: The address of the server, of its ``/v1``, or of the endpoint itself.
        model: The model's name there.
        key_variable: Environment variable that contains the key; ``None`` sends no key.
        parallel: Number of concurrent requests.
        retries: How often to retry each request.
        first_wait: Seconds before the first retry.
        timeout: Seconds to wait for an answer.

    Raises:
        ConfigError: The address is malformed, the variable is not set, the key would be sent
            unencrypted to another machine, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        parallel: int = 4,
        retries: int = 5,
        first_wait: float = 1.0,
        timeout: float = 120.0,
    ) -> None:
        check_number("parallel", parallel, 1, whole=True)
        check_number("retries", retries, 0, whole=True)
        check_number("first_wait", first_wait, 0)
        check_number("timeout", timeout, 0, above=True)
        self.url, local = _full_address(url)
        self.model = model
        self._key_variable, self._key = key_variable, _read_key(key_variable)
        if self._key and not local and not self.url.startswith("https:"):
            raise ConfigError(
                f"the key in {key_variable} would be sent unencrypted to {url}; use https://, or "
                "omit the key"
            )
        self.parallel, self.retries = parallel, retries
        self.first_wait, self.timeout = first_wait, timeout
        # Requests to this machine, which may contain the key, must not pass through a proxy.
        direct = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)
        self._not_before = 0.0

    def record(self) -> dict[str, Any]:
        """The address and the model's name; the service does not reveal its model's version."""
        return {"endpoint": self.url, "model": self.model}

    def count_tokens(self, text: str) -> int:
        """An estimate: four characters per token, plus a few tokens around a message."""
        return -(-len(text) // _CHARACTERS_PER_TOKEN) + _EXTRA_TOKENS

    def answer(
        self, requests: Sequence[Request], config: NegativesConfig, prompts: PromptTexts, keep: Keep
    ) -> None:
        """Sends requests, and keeps answers as they arrive; see ``Writer``.

        Raises:
            EndpointError: The service rejects the key, the model or the address, rejects every
                request, or no longer answers.
        """
        health = _Health(self.url, self.retries)

        def ask(request: Request, stop: threading.Event) -> Answer | None:
            rejected = False
            try:
                answer = self._answer(request, config, prompts, stop)
            except _RejectedError as error:
                answer, rejected = Answer(request, failure=str(error)), True
            if answer is not None and health.update(answer.failure, rejected):
                stop.set()
            return answer

        in_parallel(ask, requests, keep, threads=max(1, min(self.parallel, len(requests))))
        if health.problem:
            raise EndpointError(health.problem)

    def _answer(
        self,
        request: Request,
        config: NegativesConfig,
        prompts: PromptTexts,
        stop: threading.Event,
    ) -> Answer | None:
        """An answer or a failure; ``None`` if ``stop`` was set first."""
        body = {
            "model": self.model,
            "messages": chat_messages(request.text, prompts),
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": request.seed(config.seed),
        }
        reason = ""
        for attempt in range(self.retries + 1):
            if stop.wait(max(self._not_before - time.monotonic(), 0.0)):
                return None
            try:
                return self._send(body, request)
            except _RetryableError as error:
                reason = str(error)
                if error.wait:  # applies to all threads
                    self._not_before = max(self._not_before, time.monotonic() + error.wait)
                pause = min(max(self.first_wait * 2**attempt, error.wait), _LONGEST_WAIT)
                if attempt < self.retries:
                    logger.info("%s: %s; retrying in %.1f s", self.url, reason, pause)
                    if stop.wait(pause):
                        return None
        return Answer(request, failure=f"no answer after {self.retries + 1} attempts: {reason}")

    def _send(self, body: dict[str, Any], request: Request) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        message = urllib.request.Request(self.url, json.dumps(body).encode("ascii"), headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(message, timeout=self.timeout) as response:
                content = self._read(response, _LARGEST_ANSWER, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            text = str(cause) or type(cause).__name__
            raise _RetryableError(self._hide(f"no connection or no answer: {text}")) from None
        try:
            return _parse(content, request)
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            text = f"{type(error).__name__}: {error}"
            raise _RetryableError(self._hide(f"the answer cannot be parsed ({text})")) from None

    def _read(self, response: Any, size: int, deadline: float) -> bytes:
        """Reads at most ``size`` bytes by a deadline; every byte restarts the socket's timeout."""
        parts = list[bytes]()
        while size > 0 and (part := response.read1(min(size, 1 << 16))):
            parts.append(part)
            size -= len(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the answer was still incomplete after {self.timeout:g} s")
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What an HTTP error means: retry, fail this request, or end the run."""
        status, content = error.code, b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            content = self._read(error, _LARGEST_ERROR, deadline)
        explanation = self._hide(_explanation(content), cut=len(content) == _LARGEST_ERROR)
        reason = self._hide(f"HTTP {status}: {explanation or error.reason}")
        if status in (408, 409, 425, 429) or status >= 500:
            return _RetryableError(reason, retry_after(error.headers.get("Retry-After")))
        if status in (400, 413, 422):
            return _RejectedError(reason)
        if status in (401, 403) and self._key_variable:
            remedy = f"check the key in {self._key_variable}"
        elif status in (401, 403):
            remedy = "specify the environment variable that contains the key (--key-variable)"
        elif status in (404, 405):
            remedy = f"check the address and that it serves the model {self.model!r}"
        else:
            remedy = "check the address and your account there"
        return EndpointError(f"{self.url} refuses to answer ({reason}); {remedy}")

    def _hide(self, text: str, *, cut: bool = False) -> str:
        """Removes the key, which a service may repeat, then shortens the text.

        Args:
            text: What the service wrote.
            cut: Whether the text was cut off, so that its end may be the beginning of the key.
        """
        if self._key:
            # Other spellings of the characters: JSON's, of a body that is not JSON as a whole.
            plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text).replace("\\/", "/")
            text = plain if self._key in plain else text
            text = text.replace(self._key, "[key]")
            if cut:
                text = text[: -len(self._key) * _LONGEST_ESCAPE]
            for length in range(len(self._key), 3, -1):  # the service may have cut it as well
                text = text.removesuffix(self._key[:length])
        return printable(" ".join(text.split()))[:300]


class _Health:
    """Distinguishes a service that is down from requests that fail individually."""

    def __init__(self, url: str, retries: int) -> None:
        self.problem = ""
        self._url, self._attempts = url, retries + 1
        self._in_a_row = self._rejected = self._answered = 0
        self._lock = threading.Lock()

    def update(self, reason: str, rejected: bool) -> str:
        """Counts a failure, or an answer if ``reason`` is empty; returns why the run must end."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if reason and not rejected else 0
            self._rejected += rejected
            self._answered += not reason
            if not self.problem and self._in_a_row >= GIVE_UP_AFTER:
                self.problem = (
                    f"{self._url} did not answer {GIVE_UP_AFTER} requests in a row after "
                    f"{self._attempts} attempts each; the last reason: {reason}. All earlier "
                    "answers are kept; once the service is back, rerun to resume"
                )
            elif not self.problem and self._rejected >= GIVE_UP_AFTER and not self._answered:
                self.problem = (
                    f"{self._url} rejects every request: {reason}. Check the name of the model "
                    "and the sampling settings"
                )
            return self.problem


class _RetryableError(Exception):
    """A failure that a retry may fix, and the seconds that the service asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _RejectedError(Exception):
    """The service rejects this one request."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another address."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Returns ``None``, which makes the redirect an ``HTTPError``."""


def in_parallel(
    do: Callable[[_Item, threading.Event], _Result | None],
    items: Iterable[_Item],
    keep: Callable[[_Result], None],
    *,
    threads: int,
    drain_seconds: float = _DRAIN_SECONDS,
) -> None:
    """Calls ``do`` for every item in several threads, and ``keep`` for every result.

    After an interruption or an exception, no new item is started. Items already in progress may
    finish within ``drain_seconds``, and their results are kept; then the exception is raised. The
    interpreter itself does not exit before they finish.

    Args:
        do: Called with an item, and an event that tells it to return early. If ``do`` sets the
            event, no new item is started. It returns ``None`` if it has no result.
        items: Taken one by one.
        keep: Called with each result, one at a time. The worker threads call it, because Ctrl-C
            could interrupt the main thread in the middle of a write.
        threads: Number of threads.
        drain_seconds: How long to wait for items in progress.
    """
    stop, taking, keeping = threading.Event(), threading.Lock(), threading.Lock()
    source = iter(items)

    def work() -> None:
        while not stop.is_set():
            with taking:
                item = next(source, None)
            if item is None:
                return
            result = do(item, stop)
            if result is not None:
                with keeping:
                    keep(result)

    executor, pending = ThreadPoolExecutor(threads), set[Future[None]]()
    try:
        pending = {executor.submit(work) for _ in range(threads)}
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
    except BaseException:
        stop.set()
        wait(pending, drain_seconds)
        raise
    finally:
        executor.shutdown(wait=False)


def retry_after(value: str | None) -> float:
    """The seconds in a ``Retry-After`` header, a number or a date; 0 if it has neither."""
    seconds = 0.0
    with contextlib.suppress(ValueError, TypeError):
        seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(value or 0)
    return min(max(0.0, seconds), _LONGEST_WAIT)


def _parse(content: bytes, request: Request) -> Answer:
    """Reads a chat completion; raises if it is not JSON, lacks a field, or has no text."""
    found = json.loads(content)
    choice = found["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = message.get("content")
    withheld = finish == "content_filter" or (not text and bool(message.get("refusal")))
    if not withheld and not (isinstance(text, str) and text.strip()):
        raise ValueError(f"its text is {text!r}, finish_reason {finish!r}")
    kind = FILTERED if withheld else LENGTH if finish == "length" else STOP
    usage = found.get("usage") or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = [count if isinstance(count, int) else None for count in counts]
    return Answer(request, text or "", kind, known[0], known[1])


def _explanation(content: bytes) -> str:
    """The message in an error's JSON, or the beginning of its text."""
    try:
        found = json.loads(content)
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        return str(message or found.get("detail") or "")
    except (ValueError, AttributeError, RecursionError):
        return content.decode("utf-8", "replace")


def _full_address(url: str) -> tuple[str, bool]:
    """The full address, and whether it is on this machine."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(
            f"{url!r} is not an endpoint's address; use one such as http://localhost:8000/v1"
        )
    if parts.username or parts.password:
        raise ConfigError(
            "the endpoint's address contains a user name or password, which would appear in "
            "records; put the key into an environment variable instead"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", "")), local


def _read_key(variable: str | None) -> str:
    """The key in an environment variable; empty if no variable is given."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} contains no key; set it")
    # http.client would show such a key in its own error message.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"{variable} contains characters that are not allowed in a key; check its value"
        )
    return key

"""Answers of any service that speaks OpenAI's chat completions: a provider, vLLM, llama.cpp."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from fusion_detox.errors import ConfigError, EndpointError
from fusion_detox.training.negatives.config import NegativesConfig, PromptTexts
from fusion_detox.training.negatives.endpoint_protocol import (
    LONGEST_WAIT,
    explanation,
    full_address,
    read_answer,
    read_key,
    retry_after,
)
from fusion_detox.training.negatives.requests import Answer, Keep, Request
from fusion_detox.training.negatives.worker_threads import in_parallel

logger = logging.getLogger(__name__)

_LARGEST_ANSWER = 1 << 24
GIVE_UP_AFTER = 5
_CHARACTERS_A_TOKEN, _TOKENS_AROUND = 4, 8


class EndpointWriter:
    """Asks ``/v1/chat/completions`` of a service.

    Time-outs, lost connections, answers that are empty or no JSON, and the statuses 408, 409, 425,
    429 and 5xx are tried again after waits that double, or after the time in ``Retry-After``. A
    request that still has no answer, or that the service rejects by itself (400, 413, 422), has
    failed; the others go on. Five failures in a row end the run, for then the service is gone.

    Args:
        url: Address: of the server, of its ``/v1``, or in full.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; none is sent without.
        parallel: Requests at a time.
        retries: How often to ask again for one answer.
        first_wait: Seconds before the first of these; the next wait is twice as long.
        timeout: Seconds to wait for an answer.

    Raises:
        ConfigError: The address is none, the variable is not set, a key would be sent unencrypted
            to another machine, or a number is out of range.
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
        for name, value, low in (("parallel", parallel, 1), ("retries", retries, 0)):
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, but is {value}")
        if not timeout > 0 or not first_wait >= 0:
            raise ConfigError(
                f"timeout must be above 0 and first_wait at least 0: {timeout}, {first_wait}"
            )
        self.url, self._local = full_address(url)
        self.model = model
        self._key = read_key(key_variable)
        if self._key and not self._local and not self.url.startswith("https:"):
            raise ConfigError(
                f"the key in {key_variable} would travel unencrypted to {url}; use https://, or "
                "leave the key out"
            )
        self._variable = key_variable
        self.parallel, self.retries = parallel, retries
        self.first_wait, self.timeout = first_wait, timeout
        # A proxy has no business between this machine and itself, least of all with the key.
        direct = [urllib.request.ProxyHandler({})] if self._local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)
        self._not_before = 0.0

    def record(self) -> dict[str, Any]:
        """The address and the name of the model; what a service runs under it, it does not say."""
        return {"endpoint": self.url, "model": self.model}

    def count_tokens(self, text: str) -> int:
        """An estimate: four characters a token, and a few around a message."""
        return -(-len(text) // _CHARACTERS_A_TOKEN) + _TOKENS_AROUND

    def answer(
        self, requests: Sequence[Request], config: NegativesConfig, prompts: PromptTexts, keep: Keep
    ) -> None:
        """Answers requests in the order in which they come back; see ``Writer``.

        Raises:
            EndpointError: The service rejects the key, the model or the address, rejects every
                request, or does not answer any more.
        """
        tally = _Tally(self.url, self.retries)

        def one(request: Request, stop: threading.Event) -> Answer | None:
            outcome = self._one(request, config, prompts, stop)
            if outcome is None:
                return None
            if tally.add(outcome):
                stop.set()
            return outcome.answer

        in_parallel(one, requests, keep, threads=max(1, min(self.parallel, len(requests))))
        if tally.over:
            raise EndpointError(tally.over)

    def _one(
        self,
        request: Request,
        config: NegativesConfig,
        prompts: PromptTexts,
        stop: threading.Event,
    ) -> _Outcome | None:
        messages = [{"role": "user", "content": request.text}]
        if prompts.system:
            messages.insert(0, {"role": "system", "content": prompts.system})
        body = {
            "model": self.model,
            "messages": messages,
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
                return _Outcome(self._ask(body, request), "")
            except _RejectedError as rejected:
                return _Outcome(Answer(request, failure=str(rejected)), "rejected")
            except _PassingError as passing:
                reason = str(passing)
                wait = min(max(self.first_wait * 2**attempt, passing.wait), LONGEST_WAIT)
                if passing.wait:  # the service asks everyone to wait
                    self._not_before = max(self._not_before, time.monotonic() + passing.wait)
                if attempt < self.retries:
                    logger.info("%s: %s; asking again in %.1f s", self.url, reason, wait)
                    if stop.wait(wait):
                        return None
        failure = f"no answer after {self.retries + 1} attempts: {reason}"
        return _Outcome(Answer(request, failure=failure), "unanswered")

    def _ask(self, body: dict[str, Any], request: Request) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        asked = urllib.request.Request(self.url, json.dumps(body).encode("ascii"), headers)
        until = time.monotonic() + self.timeout
        try:
            with self._opener.open(asked, timeout=self.timeout) as response:
                content = self._read(response, _LARGEST_ANSWER, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, until) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            said = str(cause) or type(cause).__name__
            raise _PassingError(self._hide(f"no connection or no answer: {said}")) from None
        try:
            return read_answer(content, request)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise _PassingError(self._hide(f"an answer that cannot be read ({said})")) from None

    def _read(self, response: Any, size: int, until: float) -> bytes:
        """The body; the socket's own time-out would begin anew with every byte that drips in."""
        parts = list[bytes]()
        while size > 0 and (part := response.read1(min(size, 1 << 16))):
            parts.append(part)
            size -= len(part)
            if time.monotonic() > until:
                raise TimeoutError(f"the answer was still not whole after {self.timeout:g} s")
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError, until: float) -> Exception:
        """What an HTTP error means: for this try, for this request, or for the run."""
        status = error.code
        content = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            content = self._read(error, 1 << 16, until)
        said = self._hide(f"HTTP {status}: {explanation(content) or error.reason}")
        if status in (408, 409, 425, 429) or status >= 500:
            return _PassingError(said, retry_after(error.headers.get("Retry-After")))
        if status in (400, 413, 422):
            return _RejectedError(said)
        if status in (401, 403):
            remedy = (
                f"check the key in {self._variable}"
                if self._variable
                else "name the environment variable that holds the key (--key-variable)"
            )
        elif status in (404, 405):
            remedy = f"check the address and that it serves the model {self.model!r}"
        else:
            remedy = "check the address and your account there"
        return EndpointError(f"{self.url} refuses to answer ({said}); {remedy}")

    def _hide(self, text: str) -> str:
        """No message shows the key, not even one in which the service repeats it."""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.split())[:300]


class _Outcome(NamedTuple):
    answer: Answer
    trouble: str


class _Tally:
    """Tells a service that is gone from requests that fail by themselves."""

    def __init__(self, url: str, retries: int) -> None:
        self.over = ""
        self._url, self._attempts = url, retries + 1
        self._in_a_row = self._rejected = self._answered = 0
        self._lock = threading.Lock()

    def add(self, outcome: _Outcome) -> str:
        """Counts an outcome; why the run is over, empty where it is not."""
        reason = outcome.answer.failure
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if outcome.trouble == "unanswered" else 0
            self._rejected += outcome.trouble == "rejected"
            self._answered += not outcome.trouble
            if self.over:
                pass
            elif self._in_a_row >= GIVE_UP_AFTER:
                self.over = (
                    f"{self._url} did not answer {GIVE_UP_AFTER} requests in a row, each asked "
                    f"{self._attempts} times; the last one: {reason}. All answers before are "
                    "kept; once the service is back, the same command goes on from there"
                )
            elif self._rejected >= GIVE_UP_AFTER and not self._answered:
                self.over = (
                    f"{self._url} rejects every request: {reason}. Check the name of the model "
                    "and the sampling settings"
                )
            return self.over


class _PassingError(Exception):
    """A failure that may be gone at the next try, and the seconds the service asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _RejectedError(Exception):
    """The service has something against this one request."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """None, which makes it an ``HTTPError``."""

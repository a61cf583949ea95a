"""The Perspective API, which most papers on toxicity of language models measure with.

Google has announced that the service will not run after 2026 and takes no new users. It is also
changed without notice, so that scores of different years are not comparable (Pozzobon et al. 2023);
say when you measured. Each text is sent to Google, with ``doNotStore`` set.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_detox.errors import ConfigError
from fusion_detox.scoring.base import Scorer, ScoringError, beginning, score_batches

logger = logging.getLogger(__name__)

KEY_VARIABLE = "PERSPECTIVE_API_KEY"
ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
ATTRIBUTES = ("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT")
_LONGEST_WAIT = 60.0
_GIVE_UP_AFTER = 3


class PerspectiveScorer(Scorer):
    """Scores of the Perspective API, one request a text.

    What the service has against one text, such as its language or length, makes that text nan.
    Time-outs, lost connections, unreadable answers and the statuses 408, 429 and 5xx are tried
    again, after waits that double; a text that still has no answer is nan, and three of them in a
    row end the run.

    Args:
        language: Of the texts, as ISO 639-1; with ``None`` the service guesses it, which often
            fails for a few words.
        queries_per_second: How often to ask at most; 1 is what the service grants everyone.
        retries: How often to ask again for one text.
        first_wait: Seconds before the first of these; the next wait is twice as long.
        timeout: Seconds to wait for an answer.
        endpoint: Another address, for a stand-in; ``https`` unless it is this machine.

    Raises:
        ConfigError: ``PERSPECTIVE_API_KEY`` is not set or no key, a number is out of range, or
            the endpoint is not safe.
    """

    name = "perspective"

    def __init__(
        self,
        *,
        language: str | None = "en",
        queries_per_second: float = 1.0,
        retries: int = 5,
        first_wait: float = 1.0,
        timeout: float = 30.0,
        endpoint: str = ENDPOINT,
    ) -> None:
        for name, value in (("queries_per_second", queries_per_second), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, but is {value}")
        for name, value in (("retries", retries), ("first_wait", first_wait)):
            if not value >= 0:
                raise ConfigError(f"{name} must be at least 0, but is {value}")
        address = urllib.parse.urlsplit(endpoint)
        here = address.hostname in ("localhost", "127.0.0.1", "::1")
        if address.scheme != "https" and not (here and address.scheme == "http"):
            raise ConfigError(f"the endpoint {endpoint!r} must begin with https://")
        self.language, self.endpoint = language, endpoint
        self.retries, self.first_wait, self.timeout = retries, first_wait, timeout
        self._key = _key()
        self._pause = 1.0 / queries_per_second
        self._next = 0.0
        self._unanswered = 0
        self._opener = urllib.request.build_opener(_NoRedirect)

    def record(self) -> dict[str, Any]:
        """JSON-ready: service, attributes, language, truncation; never the key."""
        return {
            "name": self.name,
            "model": "Perspective API, Comment Analyzer v1alpha1",
            "version": "not versioned; it changes without notice",
            "licence": "terms of Google's APIs",
            "endpoint": self.endpoint,
            "attributes": list(ATTRIBUTES),
            "language": self.language,
            "truncation": "none here; the service refuses text above 20,480 bytes",
        }

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Each attribute in snake case to its scores in 0..1; a text that failed is nan.

        Raises:
            ScoringError: The service rejects every request, or did not answer for three texts.
            ConfigError: It rejects the key.
        """
        self._unanswered = 0
        return score_batches(
            self._one,
            texts,
            name=self.name,
            types=[attribute.lower() for attribute in ATTRIBUTES],
            batch_size=1,
        )

    def _one(self, texts: list[str]) -> dict[str, list[float]]:
        (text,) = texts
        body: dict[str, Any] = {
            "comment": {"text": text},
            "requestedAttributes": {attribute: {} for attribute in ATTRIBUTES},
            "doNotStore": True,
        }
        if self.language is not None:
            body["languages"] = [self.language]
        request = urllib.request.Request(
            self.endpoint,
            data=json.dumps(body).encode("ascii"),
            headers={"Content-Type": "application/json", "X-Goog-Api-Key": self._key},
        )
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                scores = self._ask(request)
            except _PassingError as passing:
                reason, wait = str(passing), self.first_wait * 2**attempt
                if attempt < self.retries:
                    wait = min(max(wait, passing.wait), _LONGEST_WAIT)
                    logger.info("perspective: %s; asking again in %.1f s", reason, wait)
                    time.sleep(wait)
                continue
            self._unanswered = 0
            return {attribute.lower(): [scores[attribute]] for attribute in ATTRIBUTES}
        self._unanswered += 1
        if self._unanswered >= _GIVE_UP_AFTER:
            raise ScoringError(
                f"the Perspective API gave no answer for {_GIVE_UP_AFTER} texts in a row, each "
                f"asked {self.retries + 1} times; the last, {beginning(text)}, failed with: "
                f"{reason}. Check the network and the quota, and start again later."
            )
        raise ValueError(f"no answer after {self.retries + 1} attempts: {reason}")

    def _ask(self, request: urllib.request.Request) -> dict[str, float]:
        """Scores by attribute, after waiting for the rate limit."""
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._pause
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            said = str(cause) or type(cause).__name__
            raise _PassingError(self._hide(f"no connection or no answer: {said}")) from None
        try:
            found = json.loads(answer)["attributeScores"]
            return {name: float(found[name]["summaryScore"]["value"]) for name in ATTRIBUTES}
        except (ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise _PassingError(self._hide(f"an answer that cannot be read ({said})")) from None

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """Raises what an HTTP error means: for this try, for this text, or for the run."""
        status = error.code
        try:
            content = error.read()
        except (OSError, http.client.HTTPException):
            content = b""
        message, reasons = _explanation(content)
        said = self._hide(f"HTTP {status}: {message or error.reason}")
        if status in (408, 429) or status >= 500:
            after = error.headers.get("Retry-After") or ""
            raise _PassingError(said, float(after) if after.isdecimal() else 0.0) from None
        key = "API key" in message or any(reason.startswith("API_KEY") for reason in reasons)
        if status in (401, 403) or (status == 400 and key):
            raise ConfigError(
                f"the Perspective API rejects the key in {KEY_VARIABLE} ({said}). Check the key, "
                "and that the Perspective Comment Analyzer API is enabled for its project."
            ) from None
        if status in (400, 413):
            raise ValueError(said) from None
        raise ScoringError(
            f"{self.endpoint} does not serve the Perspective API ({said}). Check the address."
        ) from None

    def _hide(self, text: str) -> str:
        """No message shows the key, not even one in which the service repeats it."""
        return " ".join(text.replace(self._key, "[key]").split())[:300]


class _PassingError(Exception):
    """A failure that may be gone at the next try, and the seconds the service asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """None, which makes it an ``HTTPError``."""


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ConfigError(
            f"the Perspective API needs a key in the environment variable {KEY_VARIABLE}, which is "
            "not set. Set it, or choose a scorer that needs none, such as 'contextual'."
        )
    # http.client would quote a key with such characters in its own error.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY_VARIABLE} holds no key: it has characters that no key has")
    return key


def _explanation(content: bytes) -> tuple[str, list[str]]:
    """The message of an error's JSON, and its machine-readable reasons."""
    try:
        error = json.loads(content)["error"]
        details = [detail for detail in error.get("details", []) if isinstance(detail, Mapping)]
        reasons = [str(detail.get("reason") or detail.get("errorType")) for detail in details]
        return str(error.get("message") or ", ".join(reasons)), reasons
    except (ValueError, KeyError, TypeError, AttributeError):
        return content[:200].decode("utf-8", "replace"), []

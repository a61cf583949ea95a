"""What chat completions look like on the wire."""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import time
import urllib.parse

from fusion_detox.errors import ConfigError
from fusion_detox.training.negatives.requests import FILTERED, LENGTH, STOP, Answer, Request

LONGEST_WAIT = 300.0
"""Seconds that a service can make a run wait at a time."""


def read_answer(content: bytes, request: Request) -> Answer:
    """The answer in a chat completion.

    Raises:
        ValueError: It is no JSON, or holds no text.
        KeyError: It lacks a field; likewise IndexError, TypeError and AttributeError.
    """
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


def full_address(url: str) -> tuple[str, bool]:
    """The full address, and whether it is this machine's."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(
            f"{url!r} is no address of an endpoint; give one such as http://localhost:8000/v1"
        )
    if parts.username or parts.password:
        raise ConfigError(
            "the address of the endpoint holds a user name or password, which would be written "
            "into records: give a key in an environment variable instead"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", "")), local


def read_key(variable: str | None) -> str:
    """The key in an environment variable; empty without one. ``ConfigError`` if it holds none."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} holds no key; set it")
    # http.client would quote a key with such characters in its own error.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{variable} holds no key: it has characters that no key has")
    return key


def explanation(content: bytes) -> str:
    """The message of an error's JSON in one of its usual places, or the beginning of its text."""
    try:
        found = json.loads(content)
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        return str(message or found.get("detail") or "")
    except (ValueError, AttributeError):
        return content[:200].decode("utf-8", "replace")


def retry_after(after: str | None) -> float:
    """``Retry-After`` in seconds, given as such or as a date; 0 where it says nothing."""
    if not after:
        return 0.0
    with contextlib.suppress(ValueError):
        return min(max(float(after), 0.0), LONGEST_WAIT)
    with contextlib.suppress(ValueError, TypeError):
        date = email.utils.parsedate_to_datetime(after)
        return min(max(date.timestamp() - time.time(), 0.0), LONGEST_WAIT)
    return 0.0

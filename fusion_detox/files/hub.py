"""Whether the hub can be reached, so that nothing waits for it when it cannot."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from fusion_detox.files.forks import RenewedLock

_TIMEOUT = 5.0
_ASK_AGAIN = 60.0
_lock = RenewedLock()
_asked: tuple[float, bool] | None = None


def stay_local(source: str, local_files_only: bool) -> bool:
    """Whether to load a source without asking the hub.

    Args:
        source: A folder or a hub id.
        local_files_only: Whether the user forbids the network.
    """
    return local_files_only or Path(source).is_dir() or not hub_answers()


def hub_answers() -> bool:
    """Whether the hub may be asked and answers one short request; remembered for a minute.

    Without this, libraries repeat each request for a minute if there is no network.
    """
    global _asked
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    with _lock:
        now = time.monotonic()
        if _asked is None or now - _asked[0] > _ASK_AGAIN:
            _asked = now, _ask()
        return _asked[1]


def hub_is_silent() -> bool:
    """Whether the hub may be asked, but does not answer."""
    return not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers()


def _ask() -> bool:
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # noqa: BLE001 - of requests or httpx, depending on the hub's version
        return False
    return True

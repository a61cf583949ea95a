"""Turn what transformers, huggingface_hub and torch raise while loading into our own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from fusion_detox.errors import ModelError, ModelNotFoundError

# Raised by reading a malformed configuration, weights file or tokenizer.
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)

_SAFETENSORS = (
    "Only safetensors are read, because other formats can run code when opened. Convert the model "
    "once, where you trust it, with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
)
# How version 4 fails on the tokenizer class and the token list of version 5.
_TRACES_OF_5 = ("TokenizersBackend", "'list' object has no attribute 'keys'")
_UPGRADE = "Upgrade it: pip install -U transformers."


@contextlib.contextmanager
def explained(source: str, what: str, local_files_only: bool) -> Iterator[None]:
    """Translate the errors that loading raises in the block.

    Args:
        source: The folder or hub id that is loaded.
        what: What it holds, such as ``"model"``, for messages.
        local_files_only: Whether the hub must not be contacted.

    Raises:
        ModelNotFoundError: The source does not exist, or the hub cannot be reached.
        ModelError: The source cannot be loaded.
    """
    local = Path(source).is_dir()
    offline = local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub repository {source} is gated. Request access on its page, then log in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"The hub repository {source} has no such revision. Name another branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise _missing(source) from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit into the device's memory. Use a smaller model, dtype "
            "'bfloat16' or device 'cpu'."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise _unreachable(source, what, offline) from error
    except LOADING_ERRORS as error:
        reason = first_line(error)
        if not local and isinstance(error, OSError):
            # transformers raises the same error for a missing repository and a missing network.
            if isinstance(error.__cause__ or error.__context__, RepositoryNotFoundError):
                raise _missing(source) from error
            if "safetensors" not in reason:
                raise _unreachable(source, what, offline) from error
        if local and (problem := _no_model(Path(source), what)):
            raise ModelError(f"{source} {problem}") from error
        if "safetensors" in reason and isinstance(error, OSError):
            raise ModelError(f"{source} cannot be loaded: {reason}. {_SAFETENSORS}") from error
        raise ModelError(f"{source}: the {what} cannot be loaded: {_reason(error)}") from error


def _no_model(folder: Path, what: str) -> str | None:
    """What a folder is if it holds no model's weights."""
    if (folder / "calibrator.json").is_file():
        return (
            "is a calibrator, but a target model is needed here. Give the model to detoxify, and "
            "name the calibrator with --calibrator."
        )
    if what == "model" and not any(folder.glob("*.safetensors")):
        return f"holds no *.safetensors file. {_SAFETENSORS}"
    return None


def check_positions(settings: Any, source: str) -> None:
    """Refuse a configuration of transformers 5 whose positions version 4 would misread.

    Version 5 keeps all settings of rotary positions in ``rope_parameters``. Version 4 silently uses
    its own defaults if ``rope_theta`` and ``rope_scaling`` are missing.

    Args:
        settings: A ``PretrainedConfig``.
        source: Where it comes from, for the message.

    Raises:
        ModelError: The installed version would misread the positions.
    """
    written = getattr(settings, "rope_parameters", None)
    if not _is_version_4() or not isinstance(written, dict):
        return
    # Some families have one entry per kind of layer.
    parts = [part for part in (written, *written.values()) if isinstance(part, dict)]
    read = {getattr(settings, name, None) for name in ("rope_theta", "rope_local_base_freq")}
    for part in parts:
        theta, kind = part.get("rope_theta"), part.get("rope_type", "default")
        scaled = kind == "default" or getattr(settings, "rope_scaling", None) is not None
        if (theta is not None and theta not in read) or not scaled:
            raise ModelError(
                f"{source} was written by transformers 5: its rope_parameters say rope_theta="
                f"{theta} of type {kind!r}, but the installed version {transformers.__version__} "
                f"would use rope_theta={getattr(settings, 'rope_theta', None)} of type 'default', "
                f"and the model would write nonsense. {_UPGRADE}"
            )


def describe(names: Iterable[str], limit: int = 3) -> str:
    """Name the first tensors of a set, and count the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    kind = "tensor" if len(ordered) == 1 else "tensors"
    return f"the {kind} {', '.join(ordered[:limit])}{more}"


def first_line(error: BaseException) -> str:
    """Return the message of another library's error, without its advice."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A first line that ends in a colon only announces the second.
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return " ".join(message.split()).rstrip(".:")


def _reason(error: BaseException) -> str:
    # transformers 4 may raise again while handling; check __context__.
    message = f"{error} {error.__context__}"
    if _is_version_4() and any(trace in message for trace in _TRACES_OF_5):
        return (
            f"it was written by transformers 5, which the installed version "
            f"{transformers.__version__} cannot read. {_UPGRADE}"
        )
    return f"{first_line(error)}."


def _is_version_4() -> bool:
    return int(transformers.__version__.split(".")[0]) < 5


def _missing(source: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"There is no folder and no hub repository {source!r}. Check the spelling; for a private "
        "one, log in with `hf auth login`."
    )


def _unreachable(source: str, what: str, offline: bool) -> ModelNotFoundError:
    if offline:
        return ModelNotFoundError(
            f"The {what} {source!r} was not found: it is neither a folder nor in the cache, and "
            "HF_HUB_OFFLINE or local_files_only forbids contacting the hub. Download it with "
            f"`hf download {source}` on a machine with network access, or give a folder."
        )
    return ModelNotFoundError(
        f"The {what} {source!r} was not found: it is neither a folder nor in the cache, and the "
        f"hub does not answer or has no such {what}. Check the spelling and the network, or give a "
        "folder."
    )

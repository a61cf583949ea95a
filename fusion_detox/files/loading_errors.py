"""Turns what transformers, huggingface_hub and torch raise while loading into errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

# What reading a configuration, weights or a tokenizer raises when a file is wrong.
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)

_SAFETENSORS = (
    "Only safetensors are read, because other formats can run code when opened. Convert the model "
    "once, where you trust it, with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
)

# What version 4 says to a tokenizer's class, and to its list of tokens, of version 5.
_TRACES_OF_5 = ("TokenizersBackend", "'list' object has no attribute 'keys'")
_UPGRADE = "Upgrade it: pip install -U transformers."


@contextlib.contextmanager
def explained(source: str, what: str, local_files_only: bool) -> Iterator[None]:
    """Turn what loading raises into errors of ours."""
    local = Path(source).is_dir()
    offline = local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub repository {source} is gated. Ask for access on its page, then log in with "
            f"`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"The hub repository {source} has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no folder and no hub repository {source!r}. Check the spelling; for a "
            f"private one, log in with `hf auth login`."
        ) from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit into the device's memory. Use a smaller model, dtype "
            f"'bfloat16' or device 'cpu'."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise _unreachable(source, what, offline) from error
    except LOADING_ERRORS as error:
        reason = first_line(error)
        if not local and isinstance(error, OSError):
            # transformers reports a missing repository and a missing network alike.
            if isinstance(error.__cause__ or error.__context__, RepositoryNotFoundError):
                raise ModelNotFoundError(
                    f"There is no folder and no hub repository {source!r}. Check the spelling; "
                    f"for a private one, log in with `hf auth login`."
                ) from error
            if "safetensors" not in reason:
                raise _unreachable(source, what, offline) from error
        if local and what == "model" and not any(Path(source).glob("*.safetensors")):
            raise ModelError(f"{source} holds no *.safetensors. {_SAFETENSORS}") from error
        if "safetensors" in reason and isinstance(error, OSError):
            raise ModelError(f"{source} cannot be loaded: {reason}. {_SAFETENSORS}") from error
        raise ModelError(f"{source}: the {what} cannot be loaded: {_why(error)}") from error


def check_positions(settings: Any, source: str) -> None:
    """Refuse a configuration of transformers 5 that version 4 would read with other numbers.

    Version 5 keeps all settings of rotary positions in ``rope_parameters``; version 4 takes its own
    defaults where ``rope_theta`` and ``rope_scaling`` are not there too, and says nothing.

    Args:
        settings: A ``PretrainedConfig``.
        source: Where it came from.

    Raises:
        ModelError: The two disagree.
    """
    written = getattr(settings, "rope_parameters", None)
    if not _is_old() or not isinstance(written, dict):
        return
    # By the kind of layer in some families.
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


def _why(error: BaseException) -> str:
    # What version 4 found first may stand behind an error of its own handling of it.
    said = f"{error} {error.__context__}"
    if _is_old() and any(trace in said for trace in _TRACES_OF_5):
        return (
            f"it was written by transformers 5, which the installed version "
            f"{transformers.__version__} cannot read. {_UPGRADE}"
        )
    return f"{first_line(error)}."


def _is_old() -> bool:
    return int(transformers.__version__.split(".")[0]) < 5


def _unreachable(source: str, what: str, offline: bool) -> ModelNotFoundError:
    if offline:
        return ModelNotFoundError(
            f"No {what} {source!r}: it is no folder and not in the cache, and the hub is not asked "
            f"because HF_HUB_OFFLINE or local_files_only is set. Download it once with "
            f"`hf download {source}` on a machine that may, or give a folder."
        )
    return ModelNotFoundError(
        f"No {what} {source!r}: it is no folder here, and the hub did not answer or has no such "
        f"{what}. Check the spelling and the network, or give a folder."
    )


def describe(names: Any, most: int = 3) -> str:
    """A few names of a set, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    kind = "tensor" if len(ordered) == 1 else "tensors"
    return f"the {kind} {', '.join(ordered[:most])}{more}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its advice."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A line that ends so only announces the next.
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return " ".join(said.split()).rstrip(".:")

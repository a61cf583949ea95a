"""Read files that others wrote: regular files only, and JSON within limits."""

from __future__ import annotations

import errno
import json
import math
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_MAX_BYTES = 1 << 28
_MAX_DEPTH = 100  # the parser of tokenizers gives up at 128
_MAX_DIGITS = 40  # tokenizers without a limit have a model_max_length of 31 digits
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> None:
    """Refuse what is not a regular file, or a link to one, without opening it.

    Raises:
        OSError: It is something else; opening a named pipe would block, and a device has no end.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "a special file")
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: It is missing, is something else, or cannot be read.
    """
    check_regular(path)
    return path.open("rb")


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read a JSON file of at most 256 MiB; see :func:`parse_json`.

    Raises:
        OSError: It is not a regular file, or cannot be read.
        ValueError: It is not UTF-8, not JSON, or beyond a limit.
    """
    with open_regular(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    return parse_json(data.decode("utf-8"), finite=finite)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parse JSON whose values every later reader can handle.

    Args:
        text: The JSON.
        finite: Whether to refuse NaN and infinity.

    Raises:
        ValueError: It is not JSON, is nested deeper than 100 levels, or holds a number of more than
            40 digits, a number that is not finite, or half of a surrogate pair.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float}
    try:
        values = json.loads(text, parse_int=_short_int, **(hooks if finite else {}))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels") from None
    level, depth = [values], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        level = [one for item in level for one in (item.values() if type(item) is dict else item)]
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{half} is half of a surrogate pair, not a character") from None
    return values


def _short_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:_MAX_DIGITS]}, which is not a finite number")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is not a finite number")

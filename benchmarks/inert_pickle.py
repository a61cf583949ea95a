"""Read the data in a pickle without executing it.

`pickletools.genops` splits a file into opcodes; the reader interprets those that describe data.
A class or function stays a name, and a call or an instance stays an :class:`Inert`. Nothing is
imported or called, and a name that the caller does not expect is an error.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fusion_detox.errors import DataFileError

JOBLIB_ARRAY = "joblib.numpy_pickle NumpyArrayWrapper"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
_MARK = object()


@dataclass
class Inert:
    """What the pickle would have called or built: a name, its arguments, and its state."""

    name: str
    args: Any = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def array(self) -> NDArray[Any]:
        """The numpy array or scalar that this would have become."""
        if self.name.endswith("multiarray scalar"):
            return np.frombuffer(self.args[1], _dtype(self.args[0]))[0]
        _, shape, dtype, fortran, data = self.state
        return np.frombuffer(data, _dtype(dtype)).reshape(shape, order="F" if fortran else "C")


def read(stream: BinaryIO, expected: Collection[str]) -> Any:
    """Return the object that a pickle or joblib file describes.

    Args:
        stream: A seekable file. Arrays that joblib appends to the pickle are read as well.
        expected: The names of classes and functions, as ``"module name"``, that may occur.

    Raises:
        DataFileError: The file is not a pickle, or it has another name or an opcode that is not
            about data.
    """
    try:
        return _read(stream, expected)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise DataFileError(f"not a pickle of plain data: {error}; get the file again") from error


def _read(stream: BinaryIO, expected: Collection[str]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        mark = max(index for index, value in enumerate(stack) if value is _MARK)
        found = stack[mark + 1 :]
        del stack[mark:]
        return found

    for opcode, arg, position in pickletools.genops(stream):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in _LITERALS:
            stack.append(arg)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                qualified = stack.pop()
                arg = f"{stack.pop()} {qualified}"
            if arg not in expected:
                raise DataFileError(f"byte {position} names {arg!r}, which is not expected there")
            stack.append(Inert(arg))
        elif name in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            stack.append(Inert(stack.pop().name, args))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
            if stack[-1].name == JOBLIB_ARRAY:
                stack[-1] = _joblib_array(stream, state)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            target = stack[-1].items if isinstance(stack[-1], Inert) else stack[-1]
            target.update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("APPENDS", "ADDITEMS"):
            values = above_mark()
            stack[-1].extend(values)
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "TUPLE":
            stack.append(tuple(above_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            values = stack[-count:]
            stack[-count:] = [tuple(values)]
        else:
            raise DataFileError(f"byte {position} has the opcode {name}, which is not about data")
    raise DataFileError("the pickle has no end; get the file again")


def _dtype(described: Inert) -> np.dtype[Any]:
    kind = described.args[0]
    if kind not in ("i4", "i8", "f4", "f8"):
        raise DataFileError(f"an array of {kind!r} is not supported")
    order = described.state[1]
    return np.dtype(kind).newbyteorder(order)


def _joblib_array(stream: BinaryIO, state: dict[str, Any]) -> NDArray[Any]:
    """The array after the wrapper's opcodes, behind its padding and the padding's length."""
    stream.read(stream.read(1)[0])
    dtype, shape = _dtype(state["dtype"]), state["shape"]
    data = stream.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order=state["order"])

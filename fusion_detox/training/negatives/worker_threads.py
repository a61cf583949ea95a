"""Some requests at a time, in threads; an interruption waits for what is under way."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

DRAIN_SECONDS = 10.0


def in_parallel(
    do: Callable[[Item, threading.Event], Result | None],
    items: Iterable[Item],
    keep: Callable[[Result], None],
    *,
    threads: int,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Calls ``do`` on every item in some threads, and ``keep`` on every result.

    If the caller is interrupted, or anything raises, nothing new is begun, and what is under way
    may still finish for some seconds and is kept; then the exception goes on. Results are kept in
    the threads, one at a time, for Ctrl-C strikes the main thread between any two instructions.
    The threads are daemons, so that one that hangs does not keep the process alive.

    Args:
        do: Gets an item, and an event: once it is set, by whomever, nothing new is begun, and
            ``do`` is to end early. ``None`` is no result.
        items: What to do, taken one at a time.
        keep: Gets each result, in the order in which they come.
        threads: How many items at a time.
        drain_seconds: How long to wait for what is under way.
    """
    stop, taking, keeping = threading.Event(), threading.Lock(), threading.Lock()
    source, errors = iter(items), list[BaseException]()

    ended = [threading.Event() for _ in range(threads)]

    def live(end: threading.Event) -> None:
        try:
            while not stop.is_set():
                with taking:
                    item = next(source, None)
                if item is None:
                    break
                result = do(item, stop)
                if result is not None:
                    with keeping:
                        keep(result)
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            errors.append(error)
            stop.set()
        finally:
            end.set()

    try:
        for end in ended:
            threading.Thread(target=live, args=(end,), daemon=True).start()
        _wait(ended, lambda: bool(errors))
        if errors:
            raise errors[0]
    except BaseException:
        stop.set()
        _wait(ended, None, time.monotonic() + drain_seconds)
        raise


def _wait(
    ended: Sequence[threading.Event],
    enough: Callable[[], bool] | None,
    until: float = math.inf,
) -> None:
    """Until all have ended, or it is enough, or late.

    ``Thread.join`` will not do: interrupted, it takes a thread that still runs for one that has
    ended (Python 3.10 to 3.12).
    """
    while alive := [end for end in ended if not end.is_set()]:
        if (enough is not None and enough()) or time.monotonic() > until:
            break
        alive[0].wait(0.05)  # without a time, Ctrl-C is not heard on Windows

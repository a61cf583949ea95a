"""Kills a child before a chosen file operation."""

import os
import signal
import sys

OPERATIONS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def killed_at(number, work):
    """Run ``work`` in a child that is killed before its ``number``-th file operation, from 0.

    Returns whether it was killed before it finished.
    """
    child = os.fork()
    if child == 0:
        left = number

        def hook(event, _):
            nonlocal left
            if event in OPERATIONS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0

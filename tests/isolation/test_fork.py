"""After a fork while another thread is inside the processor, the child neither hangs nor fails."""

import os
import sys
import threading
import time

import pytest
import torch

from .world import EXACT, TEXTS, fresh, scores_for

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Python 3.12 and later warn that forking with threads is risky; this is what the test does.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


def wait(child, seconds):
    """Return a child's exit code, or ``None`` if it does not end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


@pytest.mark.parametrize("rule", ["other_tokenizer", "byte_tokenizer"])
def test_a_child_forked_during_a_call_works(pristine, request, rule):
    """Twelve forks at random moments of another thread's calls, most of which hold a lock."""
    tokenizer = request.getfixturevalue(rule)
    processor = fresh(pristine(rule))
    rows = [tuple(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])]
    ids, scores = torch.tensor(rows), scores_for(rows, len(tokenizer))
    wanted = processor(ids, scores)
    stop = threading.Event()

    def work():
        generator = torch.Generator().manual_seed(0)
        while not stop.is_set():
            other = torch.randint(3, len(tokenizer), (4, 12), generator=generator)
            processor(other, torch.zeros(4, len(tokenizer)))

    thread = threading.Thread(target=work)
    thread.start()
    codes = []
    try:
        for number in range(12):
            time.sleep(0.013 * (number % 5))
            child = os.fork()
            if child == 0:
                try:
                    found = processor(ids, scores)
                    os._exit(0 if torch.allclose(found, wanted, **EXACT) else 3)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(4)
            codes.append(wait(child, 30))
    finally:
        stop.set()
        thread.join()
    assert codes == [0] * 12

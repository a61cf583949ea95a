"""Two processes never work on one output, and a killed one never blocks the next."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fusion_detox.errors import DataFileError
from fusion_detox.files import locks
from fusion_detox.files.locks import Lock, claimed, claims, sole_process

HOLD = """
import sys, time
from pathlib import Path
from fusion_detox.files.locks import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed ``tmp_path / "output"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "output")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_refused_and_a_killed_one_does_not_block(holder, tmp_path):
    output = tmp_path / "output"
    message = rf"another command \(process {holder.pid}\) is working on {output}; wait until"
    for _ in range(2):
        with pytest.raises(DataFileError, match=message), claimed(output):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path) == [".output.lock"]
    with claimed(output):
        pass
    assert os.listdir(tmp_path) == []


def test_a_symbolic_link_is_the_same_output(holder, tmp_path):
    (tmp_path / "link").symlink_to("output")
    with pytest.raises(DataFileError, match="is working on"), claimed(tmp_path / "link"):
        pass


def test_a_waiting_process_gets_a_lock_whose_file_was_removed(tmp_path):
    """The waiter locks a file that its last holder removes; it must lock the next one instead."""
    first, waiter = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    child = os.fork()
    if child == 0:
        taken = waiter.acquire(wait=True)
        os._exit(0 if taken and (tmp_path / "lock").exists() else 1)
    time.sleep(0.2)
    first.release()
    assert os.waitpid(child, 0)[1] == 0
    assert Lock(tmp_path / "lock").acquire()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock, (read, write) = Lock(tmp_path / "lock"), os.pipe()
    assert lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()  # as a finally block of the parent's code would
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    assert not Lock(tmp_path / "lock").acquire()
    lock.release()
    assert Lock(tmp_path / "lock").acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_an_output_that_cannot_be_written_is_refused_and_new_parents_are_removed(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataFileError, match="file is not a folder; choose another output"),
        claimed(tmp_path / "file" / "a" / "b"),
    ):
        pass
    with claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / ".b.lock").exists()
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_only_logged(tmp_path, monkeypatch, caplog):
    def unsupported(file, wait):
        raise OSError(locks.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks, "_lock", unsupported)
    with sole_process(tmp_path / "lock", "it"):
        pass
    assert "has no locks, so do not run two commands on it" in caplog.text


def test_only_the_first_process_of_a_launcher_claims(tmp_path, monkeypatch):
    @claims("output")
    def work(first, output):
        return os.listdir(tmp_path)

    assert work(1, output=tmp_path / "a") == [".a.lock"]
    monkeypatch.setenv("RANK", "1")
    assert work(1, tmp_path / "a") == []

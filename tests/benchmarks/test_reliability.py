"""Small versions of the audits of damaged caches, kills and pairs of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {
    "damaged_caches": ("--cases", "66"),
    "kills": ("--kills", "10", "--seed", "3"),
    "pairs": ("--pairs", "8"),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the audits fork")
@pytest.mark.parametrize("name", SIZES)
def test_a_small_audit_finds_nothing(name, tmp_path):
    out = tmp_path / "audit.json"
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.reliability.{name}", *SIZES[name], "--out", str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(out.read_text())["seed"]

"""The notebooks run from top to bottom, offline, and are notebooks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
# What each needs beside the package itself.
NEEDS = {
    "both_papers": "datasets",
    "first_steps": "torch",
    "measure_your_model": "matplotlib",
    "your_own_calibrator": "datasets",
}


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_written(path, tmp_path):
    if importlib.util.find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"needs {NEEDS[path.stem]}")
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "FUSION_DETOX_CACHE": str(tmp_path / "cache"),
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_cells_of_text_and_code(path):
    """In the percent format, which Jupytext, JupyterLab and VS Code open as a notebook."""
    source = path.read_text("utf-8")
    assert "format_name: percent" in source
    cells = re.findall(r"^# %%( \[markdown\])?$", source, re.M)
    assert cells.count(" [markdown]") >= 3
    assert cells.count("") >= 3
    assert re.search(r"^# # \w", source, re.M), "a title"
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", source):
        assert (path.parent / link).exists(), link

"""The contents of the wheel and the source distribution, and their metadata."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import fusion_detox

ROOT = Path(__file__).resolve().parents[1]
CALIBRATORS = sorted(path.parent for path in ROOT.glob("calibration_ckpts/*/calibrator.json"))
TARGET = ROOT / "examples" / "demo_target" / "model"


def build(kind, folder):
    for package in ("build", "hatchling"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = Path(folder).iterdir()
    return built


@pytest.mark.slow
def test_the_wheel_contains_the_shipped_models(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    assert {"fusion_detox/__init__.py", "fusion_detox/py.typed"} <= names
    assert "fusion_detox/evaluation/report/templates/report.html" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shipped = {name for name in names if name.startswith("fusion_detox/_shipped/")}
    expected = {f"calibrators/{path.name}": path for path in CALIBRATORS}
    if (TARGET / "config.json").is_file():
        expected["demo_target"] = TARGET
    for name, folder in expected.items():
        for path in folder.rglob("*"):
            if path.is_file():
                inside = f"fusion_detox/_shipped/{name}/{path.relative_to(folder).as_posix()}"
                assert sizes.get(inside) == path.stat().st_size, f"{inside} is not in the wheel"
                shipped.discard(inside)
    assert not shipped
    assert not [name for name in names if not name.startswith("fusion_detox")]
    if len(expected) < 2:
        pytest.skip("this checkout has no shipped calibrator or demo target yet")


@pytest.mark.slow
def test_the_sdist_can_build_and_test_itself(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = ["Makefile", "constraints.txt", "hatch_build.py", "pyproject.toml", ".ci/run"]
    needed += ["LICENSE", "tests/test_packaging.py", "fusion_detox/py.typed"]
    needed += [".github/workflows/ci.yml", ".pre-commit-config.yaml", "SECURITY.md"]
    needed += ["mkdocs.yml", "docs/hooks.py", "docs/quickstart.md"]
    needed += [str(path.relative_to(ROOT) / "calibrator.json") for path in CALIBRATORS]
    assert not sorted(set(needed) - names)


def test_the_version_is_the_same_everywhere():
    assert version("fusion-detox") == fusion_detox.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {fusion_detox.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(fusion_detox.__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M
    )


def test_the_metadata_links_to_the_project():
    links = dict(entry.split(", ", 1) for entry in metadata("fusion-detox").get_all("Project-URL"))
    assert set(links) == {"Homepage", "Documentation", "Issues", "Changelog"}
    mkdocs = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nsite_url: {links['Documentation']}\n" in mkdocs


def test_constraints_pin_exact_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        assert re.fullmatch(r'[a-z0-9.-]+==[\w.]+(; python_version >= "3\.11")?', pin), pin

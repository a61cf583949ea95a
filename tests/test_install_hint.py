"""The hint for a missing package is a command that works where the library came from."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from fusion_detox import errors
from fusion_detox.errors import MissingExtraError, install_command

ROOT = Path(__file__).resolve().parents[1]
METADATA = [
    "torch<3,>=2.4",
    "detoxify>=0.5; extra == 'evaluate'",
    'matplotlib>=3.8; extra == "evaluate"',
    "h5py>=3.11; extra == 'bench'",
    "fusion-detox[evaluate]; extra == 'bench'",
    "fusion-detox[bench,train]; extra == 'all'",
    "accelerate>=1.1; extra == 'train'",
]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that the library was installed from a wheel with ``METADATA``."""
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "fusion_detox" / "errors.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)


def test_from_a_clone():
    assert install_command("x", "evaluate") == f'pip install -e "{ROOT}[evaluate]"'
    assert str(MissingExtraError("x", "evaluate")).endswith(
        f'Install it with: pip install -e "{ROOT}[evaluate]"'
    )


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("evaluate", '"detoxify>=0.5" "matplotlib>=3.8"'),
        ("bench", '"h5py>=3.11" "detoxify>=0.5" "matplotlib>=3.8"'),
        ("all", '"h5py>=3.11" "detoxify>=0.5" "matplotlib>=3.8" "accelerate>=1.1"'),
        ("unknown", '"x"'),
    ],
)
def test_from_a_wheel(installed, extra, packages):
    assert install_command("x", extra) == f"pip install {packages}"


def test_without_metadata(installed, monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install_command("x", "evaluate") == 'pip install "x"'


def test_the_metadata_of_this_project_has_that_form(installed, monkeypatch):
    """As hatchling writes it: the ranges of pyproject.toml, sorted."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lines = [f"{one}; extra == '{name}'" for name, group in groups.items() for one in group]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    for extra in groups:
        command = install_command("x", extra)
        assert command.startswith('pip install "')
        assert "fusion-detox" not in command
    assert '"sacrebleu>=2.4"' in install_command("x", "all")


def test_no_hint_names_a_package_that_no_index_has():
    for path in (ROOT / "fusion_detox").rglob("*.py"):
        if path.name != "errors.py":
            assert not re.search(r"pip install[^\n]*fusion-detox\[", path.read_text()), path

"""pyproject, constraint files, CI and docs agree on versions; behaviour on old versions."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from fusion_detox.errors import ModelError
from fusion_detox.files.loading_errors import check_positions, explained

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not part of this checkout")
    return path.read_text(encoding="utf-8")


def requirements():
    """The dependencies that decoding needs, by name; tomllib is not in Python 3.10."""
    text = read("pyproject.toml")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)[1]
    found = [Requirement(line) for line in re.findall(r'"([^"]+)"', listed)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(name):
    lines = [line.partition(";")[0].strip() for line in read(name).splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def table():
    """The rows of docs/versions.md by package: range, oldest, newest."""
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| (.+?) \|$", read("docs/versions.md"), re.M)
    return {canonicalize_name(name): cells for name, *cells in rows}


def lower(requirement):
    (bound,) = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    return bound


def test_the_ranges_in_the_docs_are_those_of_the_package():
    stated = {name: SpecifierSet(cells[0]) for name, cells in table().items() if name != "python"}
    assert stated == {name: wanted.specifier for name, wanted in requirements().items()}


def test_the_tested_versions_are_those_installed_for_the_tests():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for name, (_, first, last) in table().items():
        if name != "python":
            assert (Version(first), Version(last)) == (oldest[name], newest[name]), name


def test_the_oldest_versions_are_the_lower_bounds():
    """Compared up to the minor version: the first patch releases may have been withdrawn."""
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(oldest[name])
        assert requirement.specifier.contains(newest[name])
        bound = lower(requirement)
        assert oldest[name].release[:2] == (*bound.release, 0)[:2], name
        if len(bound.release) > 2:
            assert oldest[name] == bound


def test_python_versions():
    text = read("pyproject.toml")
    listed = re.findall(r"Programming Language :: Python :: 3\.(\d+)", text)
    (least,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', text, re.M)
    (target,) = re.findall(r'^target-version = "py3(\d+)"$', text, re.M)
    assert listed[0] == least == target
    assert table()["python"][0] == f"3.{listed[0]} to 3.{listed[-1]}"


def test_ci_runs_the_supported_pythons_on_three_systems():
    listed = re.findall(r"Programming Language :: Python :: (3\.\d+)", read("pyproject.toml"))
    workflow = read(".github/workflows/ci.yml")
    (pythons,) = re.findall(r"^ +python: \[(.+)\]$", workflow, re.M)
    (systems,) = re.findall(r"^ +os: \[(.+)\]$", workflow, re.M)
    assert re.findall(r'"(.+?)"', pythons) == listed
    assert systems == "ubuntu-latest, macos-latest, windows-latest"
    assert "make test" in workflow


def test_actions_are_pinned_by_tag():
    for name in ("ci", "release"):
        used = re.findall(r"uses: (\S+)", read(f".github/workflows/{name}.yml"))
        assert used
        assert not [action for action in used if not re.fullmatch(r"[\w./-]+@v[\d.]+", action)]


def test_pre_commit_uses_the_same_ruff_version():
    (revision,) = re.findall(
        r"ruff-pre-commit\n +rev: v(.+)$", read(".pre-commit-config.yaml"), re.M
    )
    assert Version(revision) == pins("constraints.txt")["ruff"]


@pytest.fixture
def old(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")


@pytest.mark.parametrize(
    "said",
    [
        ValueError("Tokenizer class TokenizersBackend does not exist or is not imported."),
        AttributeError("'list' object has no attribute 'keys'"),
    ],
)
@pytest.mark.usefixtures("old")
def test_the_error_for_a_tokenizer_of_version_5_says_so_on_version_4(tmp_path, said):
    message = "tokenizer cannot be loaded: it was written by transformers 5.*4.57.1.*pip install -U"
    with pytest.raises(ModelError, match=message), explained(str(tmp_path), "tokenizer", True):
        raise said


@pytest.mark.usefixtures("old")
def test_a_second_error_does_not_hide_the_cause(tmp_path):
    """Without protobuf, version 4 raises another error while handling this one."""

    def load():
        try:
            raise AttributeError("'list' object has no attribute 'keys'")
        except AttributeError:
            raise ImportError("requires the protobuf library")  # noqa: B904

    message = "written by transformers 5"
    with pytest.raises(ModelError, match=message), explained(str(tmp_path), "tokenizer", True):
        load()


ROPE = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (ROPE, {"rope_theta": 10000.0}),
        (ROPE, {}),
        ({**ROPE, "rope_type": "llama3", "factor": 8.0}, {"rope_theta": 500000.0}),
        ({"full_attention": ROPE}, {"rope_theta": 1e4, "rope_local_base_freq": 1e4}),
    ],
)
@pytest.mark.usefixtures("old")
def test_positions_that_version_4_would_misread_are_refused(written, read):
    settings = SimpleNamespace(rope_parameters=written, **read)
    message = r"rope_theta=500000.0 of type .*, but the installed version 4.57.1 .*pip install -U"
    with pytest.raises(ModelError, match=message):
        check_positions(settings, "model")


@pytest.mark.usefixtures("old")
def test_positions_that_both_versions_read_alike_are_accepted():
    both = {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 1e4}}
    for settings in (
        SimpleNamespace(rope_parameters=ROPE, rope_theta=500000.0),
        SimpleNamespace(rope_parameters=both, rope_theta=5e5, rope_local_base_freq=1e4),
        SimpleNamespace(
            rope_parameters={**ROPE, "rope_type": "llama3"},
            rope_theta=500000.0,
            rope_scaling={"rope_type": "llama3"},
        ),
        SimpleNamespace(),
    ):
        check_positions(settings, "model")


def test_positions_are_not_checked_on_version_5(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.0.0")
    check_positions(SimpleNamespace(rope_parameters=ROPE, rope_theta=1.0), "model")

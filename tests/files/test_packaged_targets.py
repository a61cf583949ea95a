"""Packaged targets: fetched once, verified, converted faithfully, and resumed after any failure."""

import errno
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fusion_detox.cli import main
from fusion_detox.errors import (
    DataFileError,
    FusionDetoxError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
)
from fusion_detox.files import packaged_targets
from fusion_detox.files.models import load_target, load_tokenizer
from fusion_detox.files.packaged_targets import (
    PACKAGED_TARGETS,
    PackagedTarget,
    packaged_gguf,
    packaged_target,
    target_folder,
)
from tests.gguf_files import write_gguf

PARTS = (b"GGUF first half, ", b"second half")


def declare(parts, sha256=None):
    packages = tuple(
        (f"fake-part{number}==1.0", f"fake_part{number}/data/part.bin")
        for number in range(1, len(parts) + 1)
    )
    digest = sha256 or hashlib.sha256(b"".join(parts)).hexdigest()
    return PackagedTarget("Fake 1M", "MIT", packages, digest, download_mb=2, folder_mb=1)


def write_wheel(folder, number, data, member="data/part.bin"):
    """A wheel that pip accepts; importing it would be noticed."""
    package, info = f"fake_part{number}", f"fake_part{number}-1.0.dist-info"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{package}/{member}", data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place where pip looks for packages: a folder, empty at first."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    return folder


class FakePip:
    """Stands in for the process: copies wheels from a folder, and records what was asked for."""

    def __init__(self, index):
        self.index, self.asked, self.says = index, [], "ERROR: No matching distribution found"
        self.unreachable, self.interrupted, self.killed = set(), False, False
        self.returncode = None

    def __call__(self, command, *, stdin, stdout, stderr, env):
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        self.asked.append(requirement)
        name = requirement.replace("-", "_").replace("==", "-")
        self.returncode = 1
        for wheel in self.index.glob(f"{name}-*.whl"):
            if requirement not in self.unreachable:
                (folder / wheel.name).write_bytes(wheel.read_bytes())
                self.returncode = 0
        if self.returncode:
            stdout.write(self.says.encode())
        return self

    def poll(self):
        return None if self.interrupted and not self.killed else self.returncode

    def wait(self, timeout=None):
        if self.interrupted and not self.killed:
            raise KeyboardInterrupt

    def kill(self):
        self.killed = True


@pytest.fixture
def pip(index, monkeypatch):
    fake = FakePip(index)
    monkeypatch.setattr(packaged_targets.subprocess, "Popen", fake)
    return fake


@pytest.fixture
def converted(monkeypatch):
    """Replaces the conversion; records the content of the GGUF files that it was given."""
    given = []

    def convert(name, target, gguf, new, report):
        given.append(gguf.read_bytes())
        (new / "model.safetensors").write_bytes(b"weights")
        report("converting", 3, 3)

    monkeypatch.setattr(packaged_targets, "_convert", convert)
    return given


@pytest.fixture
def fake(index, monkeypatch):
    """A target in two wheels, both in the index."""
    monkeypatch.setitem(PACKAGED_TARGETS, "fake", declare(PARTS))
    for number, part in enumerate(PARTS, start=1):
        write_wheel(index, number, part)
    return "fake"


def leftovers(cache):
    """Everything in the cache except the lock file, which must stay."""
    folder = cache / "targets"
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix != ".lock" and path.is_file()
    )


# What is fetched


def test_a_real_model_is_fetched_with_pip_and_computes_the_same(
    index, tmp_path, monkeypatch, byte_tokenizer, make_llama
):
    """The whole way with the real pip: two wheels, joined, verified and converted."""
    original = make_llama(len(byte_tokenizer), seed=5)
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as it will be stored
    data = write_gguf(tmp_path / "model.gguf", original, byte_tokenizer)
    parts = (data[:1000], data[1000:])
    monkeypatch.setitem(PACKAGED_TARGETS, "tiny", declare(parts))
    for number, part in enumerate(parts, start=1):
        write_wheel(index, number, part)
    reports, state = [], torch.get_rng_state()
    folder = packaged_target("tiny", progress=lambda *report: reports.append(report))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers do not change"
    assert folder == tmp_path / "cache" / "targets" / "tiny"
    assert ("downloading Fake 1M (MB)", 2, 2) in reports
    assert reports[-1] == ("converting Fake 1M", 3, 3)
    assert {file.split("/")[0] for file in leftovers(tmp_path / "cache")} == {"tiny"}
    record = json.loads((folder / "packaged.json").read_text())
    assert record["licence"] == "MIT"
    assert record["packages"] == ["fake-part1==1.0", "fake-part2==1.0"]

    def no_process(*_, **__):
        raise AssertionError("a second call downloads nothing")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    model, tokenizer = load_target("packaged:tiny", local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert not model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("You are a fine café 🙂", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [byte_tokenizer("You are a fine café 🙂")["input_ids"]]
    with torch.no_grad():
        logits = model.float()(ids).logits
        torch.testing.assert_close(logits, original(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_gguf_file_is_fetched_once_for_llama_cpp(fake, pip, tmp_path):
    file = packaged_gguf(fake)
    assert file == tmp_path / "cache" / "targets" / "fake.gguf"
    assert file.read_bytes() == b"".join(PARTS)
    assert packaged_gguf(fake) == file
    assert len(pip.asked) == 2
    assert leftovers(tmp_path / "cache") == ["fake.gguf"]
    file.write_bytes(b"damaged")
    assert packaged_gguf(fake).read_bytes() == b"".join(PARTS)
    with pytest.raises(ModelNotFoundError, match="no packaged target 'missing'"):
        packaged_gguf("missing")


@pytest.mark.usefixtures("pip")
def test_equal_embeddings_and_head_are_stored_once(
    index, tmp_path, monkeypatch, byte_tokenizer, make_llama
):
    original = make_llama(len(byte_tokenizer), seed=5)
    data = write_gguf(tmp_path / "model.gguf", original, byte_tokenizer, tied=True)
    monkeypatch.setitem(PACKAGED_TARGETS, "tied", declare((data,)))
    write_wheel(index, 1, data)
    model, _ = load_target(packaged_target("tied"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    elements = sum(parameter.numel() for parameter in model.parameters())
    size = (target_folder("tied") / "model.safetensors").stat().st_size
    assert 0 <= size - 2 * elements < 10_000


@pytest.mark.usefixtures("pip")
def test_a_file_that_transformers_cannot_read_is_reported(fake):
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"packaged:fake: transformers \S+ cannot convert .*-U"):
        packaged_target(fake)


def test_the_declared_targets_are_consistent():
    for name, target in PACKAGED_TARGETS.items():
        assert name == name.lower()
        assert len(target.sha256) == 64
        assert len(set(target.parts)) == len(target.parts)
        for requirement, member in target.parts:
            package, version = requirement.split("==")
            assert member.startswith(package.replace("-", "_") + "/")
            assert version


# Names


def test_an_unknown_name_lists_the_known_ones(index):
    with pytest.raises(ModelNotFoundError, match=r"no packaged target 'gpt-9'.*smollm2, gemma"):
        load_target("packaged:gpt-9")


def test_nothing_is_downloaded_if_only_local_files_may_be_used(fake, pip):
    for call in (load_target, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match=r"forbidden\. Run `fusion-detox fetch-t"):
            call("packaged:fake", local_files_only=True)
    assert pip.asked == []


def test_the_cache_is_the_argument_or_the_variable_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path))
    assert target_folder("x", tmp_path / "a") == tmp_path / "a" / "targets" / "x"
    assert target_folder("x") == tmp_path / "targets" / "x"
    monkeypatch.delenv("FUSION_DETOX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert target_folder("x") == tmp_path / ".cache" / "fusion-detox" / "targets" / "x"


# Failures


def test_pip_without_the_package_fails_in_one_line_and_builds_nothing(index, fake, tmp_path):
    """The real pip; a source distribution would run its setup.py."""
    for wheel in index.iterdir():
        wheel.unlink()
    marker = tmp_path / "ran"
    setup = f"open({str(marker)!r}, 'w'); from setuptools import setup; setup()".encode()
    with tarfile.open(index / "fake_part1-1.0.tar.gz", "w:gz") as archive:
        for name, data in (("setup.py", setup), ("PKG-INFO", b"Name: fake-part1\nVersion: 1.0")):
            member = tarfile.TarInfo(f"fake_part1-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ModelNotFoundError) as caught:
        packaged_target(fake)
    message = str(caught.value)
    assert "packaged:fake needs the package fake-part1==1.0" in message
    assert "could not download: No matching distribution found for fake-part1==1.0. " in message
    assert "rerun to resume" in message
    assert "\n" not in message
    assert not marker.exists()
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        pytest.param(
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
            "no route)': /simple/x/\nERROR: Could not find a version (from versions: none)\n"
            "ERROR: No matching distribution found for x\n",
            "connection broken by 'NewConnectionError(no route)': /simple/x/. ",
            id="network",
        ),
        pytest.param(
            "WARNING: old\nERROR: Could not install packages due to an OSError: [Errno 28] No space"
            " left on device\n\n",
            "Could not install packages due to an OSError: [Errno 28] No space left on device. ",
            id="disk",
        ),
        pytest.param(
            "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nReadTimeoutError: y",
            "ReadTimeoutError: y. ",
            id="crash",
        ),
        pytest.param("", "no output. ", id="silence"),
    ],
)
def test_the_error_quotes_the_line_of_pip_that_tells_the_cause(fake, pip, says, reason):
    pip.says, pip.unreachable = says, {"fake-part1==1.0"}
    with pytest.raises(ModelNotFoundError) as caught:
        packaged_target(fake)
    assert f"could not download: {reason}" in str(caught.value)


def test_finished_downloads_are_kept(fake, pip, converted):
    pip.unreachable = {"fake-part2==1.0"}
    with pytest.raises(ModelNotFoundError, match="fake-part2"):
        packaged_target(fake)
    pip.unreachable = set()
    packaged_target(fake)
    assert pip.asked == ["fake-part1==1.0", "fake-part2==1.0", "fake-part2==1.0"]
    assert converted == [b"".join(PARTS)]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ModelError("no"), OSError(errno.ENOSPC, "full")], ids=repr
)
def test_an_interrupted_conversion_needs_no_new_download(
    fake, pip, converted, tmp_path, monkeypatch, error
):
    def fail(name, target, gguf, new, report):
        (new / "model.safetensors").write_bytes(b"wei")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(packaged_targets, "_convert", fail)
        with pytest.raises((KeyboardInterrupt, FusionDetoxError)):
            packaged_target(fake)
    assert leftovers(tmp_path / "cache") == [".fake.part/model.gguf"]
    # What processes that were killed leave behind.
    targets = tmp_path / "cache" / "targets"
    for stale in (".fake.new-abc/new", ".fake.part/tmpxyz", ".fake.part/.model.gguf.1.f"):
        (targets / stale).mkdir(parents=True)
        (targets / stale / "part").write_bytes(b"x")
    folder = packaged_target(fake)
    assert len(pip.asked) == 2
    assert leftovers(tmp_path / "cache") == ["fake/model.safetensors", "fake/packaged.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_joined_file_that_was_damaged_meanwhile_is_made_again(fake, pip, converted, tmp_path):
    work = tmp_path / "cache" / "targets" / ".fake.part"
    work.mkdir(parents=True)
    (work / "model.gguf").write_bytes(b"GGUF first")
    packaged_target(fake)
    assert converted == [b"".join(PARTS)]


def test_a_wrong_checksum_is_refused_and_the_files_removed(fake, pip, converted, index, tmp_path):
    write_wheel(index, 2, b"another half")
    with pytest.raises(ModelError) as caught:
        packaged_target(fake)
    wrong = hashlib.sha256(PARTS[0] + b"another half").hexdigest()
    for digest in (wrong, PACKAGED_TARGETS[fake].sha256):
        assert digest in str(caught.value)
    assert leftovers(tmp_path / "cache") == []
    assert converted == []
    write_wheel(index, 2, PARTS[1])
    packaged_target(fake)
    assert converted == [b"".join(PARTS)]


def cut(path):
    path.write_bytes(path.read_bytes()[:5])


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"second half", b"second hale"))


def exchange(path):
    write_wheel(path.parent, 2, b"", "no")


@pytest.mark.parametrize("damage", [cut, flip, exchange])
def test_a_damaged_wheel_is_named_and_downloaded_again(fake, pip, converted, index, damage):
    damage(index / "fake_part2-1.0-py3-none-any.whl")
    with pytest.raises(ModelError, match=r"wheel of fake-part2==1.0 is damaged or is another one:"):
        packaged_target(fake)
    write_wheel(index, 2, PARTS[1])
    packaged_target(fake)
    assert pip.asked == ["fake-part1==1.0", "fake-part2==1.0", "fake-part2==1.0"]
    assert converted == [b"".join(PARTS)]


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_extra_is_reported_before_the_download(fake, pip, monkeypatch, missing):
    hide(missing, monkeypatch)
    with pytest.raises(MissingExtraError, match=rf"'{missing}'.*\[targets\]"):
        packaged_target(fake)
    assert pip.asked == []


def test_an_environment_without_pip_is_told_how_to_get_it(fake, monkeypatch):
    hide("pip", monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"pip, which is not installed.*-m ensurepip"):
        packaged_target(fake)


def hide(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )


def test_too_little_space_is_reported_before_the_download(fake, pip, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 10, 3_999_999)
    monkeypatch.setattr(packaged_targets.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataFileError, match=r"needs 5 MB on the disk of .*targets, which has 3"):
        packaged_target(fake)
    assert pip.asked == []


def test_a_cache_that_cannot_be_written_is_reported(fake, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataFileError, match=r"cannot be stored in .*file.*Set FUSION_DETOX_CACHE"):
        packaged_target(fake, tmp_path / "file")


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_folder_that_lost_something_is_fetched_again(fake, pip, converted, damage):
    folder = packaged_target(fake)
    damage(folder / "model.safetensors")
    assert packaged_target(fake) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(converted) == 2


def test_an_interrupt_ends_pip(fake, pip):
    pip.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        packaged_target(fake)
    assert pip.killed


def test_of_several_callers_one_fetches(fake, pip, converted, monkeypatch):
    convert = packaged_targets._convert

    def slowly(*arguments):
        time.sleep(0.2)
        convert(*arguments)

    monkeypatch.setattr(packaged_targets, "_convert", slowly)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(packaged_target(fake))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [target_folder(fake)] * 3
    assert len(converted) == 1
    assert len(pip.asked) == 2


# The command


def test_the_command_prints_the_folder_only(fake, pip, converted, capsys):
    assert main(["fetch-target", fake]) == 0
    found = capsys.readouterr()
    assert found.out == f"{target_folder(fake)}\n"
    assert "Fake 1M, licence: MIT" in found.err
    assert "downloading Fake 1M (MB)" in found.err


def test_the_command_lists_the_targets(fake, pip, converted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    packaged_target(fake)
    assert main(["fetch-target"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "fake" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == (
        ["fake", "Fake 1M", "MIT", "2 MB", "1 MB", "yes"]
    )
    assert any("smollm2" in line and "Apache-2.0" in line and " no " in line for line in lines)


def test_the_command_reports_an_unknown_name(index, capsys):
    assert main(["fetch-target", "gpt-9"]) == 1
    assert "error: There is no packaged target 'gpt-9'" in capsys.readouterr().err

"""A damaged or foreign map in the cache is never used: it is named in the log and built again."""

import json
import logging
import math
import os
import random

import pytest
import torch

from fusion_detox.vocabulary.disk_cache import _digest, load_map, save_map, usable_folder

ROWS, COLUMNS = 5, 4


@pytest.fixture
def tensors():
    """A map from 4 calibrator tokens to 5 target tokens; the last of both has no bytes."""
    ids = [0, 1, 2, 0, 1, 2]
    ptr = [0, 2, 3, 4, 6, 6]
    return {
        "prefix_ptr": torch.tensor(ptr, dtype=torch.int32),
        "prefix_ids": torch.tensor(ids, dtype=torch.int32),
        "prefix_values": torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0, 1.0]),
        "transfer_ptr": torch.tensor(ptr, dtype=torch.int32),
        "transfer_ids": torch.tensor(ids, dtype=torch.int32),
        "transfer_values": torch.tensor([0.75, 0.5, 1.0, 0.25, 0.5, 0.0]),
        "split_ptr": torch.tensor([0, 1, 3, 3, 3], dtype=torch.int32),
        "split_ids": torch.tensor([4, 0, 2], dtype=torch.int32),
    }


@pytest.fixture
def path(tensors, tmp_path):
    save_map(tmp_path / "cache" / "key.safetensors", tensors, 0.99)
    return tmp_path / "cache" / "key.safetensors"


def refused(path, caplog, reason, *, rows=ROWS, columns=COLUMNS):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_map(path, rows, columns) is None
    (record,) = caplog.records
    assert f"{path} is rebuilt: {reason}" in record.getMessage()


def test_a_whole_map_is_loaded(path, tensors, caplog):
    found, coverage = load_map(path, ROWS, COLUMNS)
    assert coverage == 0.99
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert load_map(path.with_name("other.safetensors"), ROWS, COLUMNS) is None
    assert not caplog.records


def test_the_digest_detects_every_flipped_bit(path, tensors, caplog):
    """A flip is detected, or is in padding or the spelling of the header and changes nothing."""
    whole, rng = path.read_bytes(), random.Random(20261125)
    refusals = 0
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        caplog.clear()
        found = load_map(path, ROWS, COLUMNS)
        if found is None:
            refusals += 1
            assert len(caplog.records) == 1
        else:
            assert found[1] == 0.99
            assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert refusals > 380


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_map(path, caplog, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, caplog, "")


@pytest.mark.parametrize(
    ("name", "place", "value", "reason"),
    [
        ("prefix_ids", 1, COLUMNS, "its prefix ids are not all below 4"),
        ("prefix_ids", 1, -1, "its prefix ids"),
        ("transfer_ids", 0, 1 << 30, "its transfer ids"),
        ("split_ids", 0, ROWS, "its split ids are not all below 5"),
        ("prefix_ptr", 2, 9, "its prefix rows are inconsistent"),
        ("transfer_ptr", 0, 1, "its transfer rows"),
        ("split_ptr", -1, 2, "its split rows"),
        ("prefix_values", 0, math.nan, "its prefix values are not all probabilities"),
        ("prefix_values", 0, math.inf, "its prefix values"),
        ("prefix_values", 0, -0.1, "its prefix values"),
        ("transfer_values", 1, 1.5, "its transfer values"),
        ("transfer_values", 0, 0.5, "its transfer columns do not sum to 1"),
    ],
)
def test_values_out_of_range_are_refused_even_with_a_valid_digest(
    path, tensors, caplog, name, place, value, reason
):
    """Somebody may have computed the digest of wrong values."""
    tensors[name][place] = value
    save_map(path, tensors, 0.99)
    refused(path, caplog, reason)


def test_shapes_types_and_names_are_checked(path, tensors, caplog):
    refused(path, caplog, "its prefix rows", rows=ROWS + 1)
    refused(path, caplog, "its prefix rows", rows=ROWS - 1)
    refused(path, caplog, "its split rows", columns=COLUMNS + 1)
    save_map(path, tensors | {"split_ids": tensors["split_ids"].long()}, 0.99)
    refused(path, caplog, "split_ids has the type torch.int64")
    save_map(path, tensors | {"prefix_values": tensors["prefix_values"][:-1]}, 0.99)
    refused(path, caplog, "its prefix values")
    save_map(path, {"x": torch.zeros(1)}, 0.99)
    refused(path, caplog, "it holds the tensors x")
    save_map(path, tensors, math.nan)
    refused(path, caplog, "its coverage is nan")


def test_the_key_is_inside(path, caplog):
    other = path.rename(path.with_name("other.safetensors"))
    refused(other, caplog, "it belongs to another pair of vocabularies")


def test_the_digest_covers_key_names_shapes_and_coverage(tensors):
    digests = [
        _digest("a", tensors, 0.99),
        _digest("b", tensors, 0.99),
        _digest("a", tensors, 0.98),
        _digest("a", {"x" + name: one for name, one in tensors.items()}, 0.99),
        _digest("a", {name: one[None] for name, one in tensors.items()}, 0.99),
    ]
    assert len(set(digests)) == 5


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_file_or_folder_that_others_may_write_is_not_used(path, caplog, monkeypatch):
    for mode in (0o660, 0o602):
        path.chmod(mode)
        refused(path, caplog, f"other users may write it (mode {mode:o})")
    path.chmod(0o644)
    assert load_map(path, ROWS, COLUMNS) is not None
    assert usable_folder(path.parent)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o777)
    caplog.clear()
    assert not usable_folder(path.parent)
    assert "chmod go-w" in caplog.text
    path.parent.chmod(0o700)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if owner:  # files of the administrator are trusted
        refused(path, caplog, f"it belongs to another user (uid {owner})")
        assert not usable_folder(path.parent)
    elif hasattr(os, "geteuid") and os.geteuid() == 0:
        os.chown(path, 12345, -1)
        refused(path, caplog, "it belongs to another user (uid 12345)")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_read(path, caplog):
    path.unlink()
    os.mkfifo(path)
    refused(path, caplog, "it is not a regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, caplog, "it is not a regular file")
    path.unlink()
    path.mkdir()
    refused(path, caplog, "")


def test_deep_json_in_the_header_is_refused(path, caplog):
    header = json.dumps({"__metadata__": 0}).replace("0", "[" * 50_000 + "]" * 50_000).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(path, caplog, "")

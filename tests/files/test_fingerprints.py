"""Different models have different fingerprints."""

from fusion_detox.files.fingerprints import folder_fingerprint


def test_different_folders_have_different_fingerprints(tmp_path):
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    small.write_text("{}")
    large.write_bytes(bytes(3 << 20))
    first = folder_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert folder_fingerprint(tmp_path) == first
    large.write_bytes(bytes((3 << 20) - 1) + b"1")
    second = folder_fingerprint(tmp_path)
    small.write_text("[]")
    assert len({first, second, folder_fingerprint(tmp_path)}) == 3


def test_subfolders_can_be_left_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = folder_fingerprint(tmp_path)
    (tmp_path / "alignments").mkdir()
    (tmp_path / "alignments" / "head.json").write_text("{}")
    assert folder_fingerprint(tmp_path) != first
    assert folder_fingerprint(tmp_path, without=("alignments",)) == first

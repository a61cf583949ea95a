"""A small part of the audit of damaged calibrators, and proof that it finds what it should."""

import pytest

from benchmarks.reliability import damaged_calibrators as audit
from fusion_detox.calibrator import folder as calibrator_folder

CASES = 120
"""8 for each kind of damage, loaded in each way."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    for seed, name in enumerate(("one", "two"), start=1):
        audit.make_calibrator(folder / name, seed)
    return [folder / "one", folder / "two"]


@pytest.fixture(scope="module")
def healthy(bases):
    return audit.numbers(bases[0], verify=True)


def test_nothing_is_silently_wrong_or_foreign(bases, healthy):
    results = [audit.run_case(number, 15, bases, healthy) for number in range(CASES)]
    assert audit.failures(results) == []
    outcomes = {(one["loaded"] == "digests", one["outcome"]) for one in results}
    # The cases are not vacuous: without digests, some damage does change the numbers.
    assert outcomes == {
        *((True, "error"), (True, "equal")),
        *((False, "error"), (False, "equal"), (False, "different")),
    }


@pytest.mark.parametrize("damage", ["swapped files", "swapped tensors", "tokenizer"])
def test_without_the_check_the_audit_fails(bases, healthy, monkeypatch, damage):
    monkeypatch.setattr(calibrator_folder, "check_digests", lambda *_: 0)
    kinds = list(audit.DAMAGES)
    first = kinds.index(damage)
    chosen = range(first, 10 * len(kinds), len(kinds))
    results = [audit.run_case(number, 15, bases, healthy) for number in chosen]
    assert "different" in {one["outcome"] for one in audit.failures(results)}

"""A report that is written once, and a way to write reports without plots."""

import pytest

from fusion_detox.evaluation.report import plots, write_report

from .documents import results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(results(), folder) == folder / "report.html"
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing, for tests that write many reports and do not look at the plots."""
    monkeypatch.setattr(plots, "svg_uri", lambda panel: "data:image/svg+xml,")
    monkeypatch.setattr(plots, "png", lambda kinds, heading: b"")

"""A report that is written once, and reports without pictures."""

import pytest

from fusion_detox.evaluation.report import rendering
from fusion_detox.evaluation.report.html import write_report
from fusion_detox.evaluation.report.markup import Html, escape

from .documents import results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(results(), folder) == folder / "report.html"
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their pictures, for what has nothing to do with them and is asked often."""
    monkeypatch.setattr(rendering, "svg", lambda panel: Html(f"<svg>{escape(panel.title)}</svg>"))
    monkeypatch.setattr(rendering, "png", lambda lines, heading: b"")

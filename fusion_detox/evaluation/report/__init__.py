"""The report of a run for people, and several runs side by side."""

from fusion_detox.evaluation.report.compare import write_comparison
from fusion_detox.evaluation.report.html import write_report

__all__ = ["write_comparison", "write_report"]

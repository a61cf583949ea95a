"""Pages for readers: one run as ``report.html``, several runs side by side, or one explained text.

``reading`` reads results documents, and ``numbers`` formats numbers as text. ``findings``,
``tables``, ``plots`` and ``comparable`` prepare what the pages show. ``pages`` fills the Jinja2
templates in ``templates/``. The evaluation pipeline and the command line may import this package.
"""

from fusion_detox.evaluation.report.explanation import write_explanation
from fusion_detox.evaluation.report.pages import write_comparison, write_report

__all__ = ["write_comparison", "write_explanation", "write_report"]

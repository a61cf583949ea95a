"""Build hook: the shipped calibrators and the demo target travel in the wheel.

A table of ``force-include`` in ``pyproject.toml`` takes no patterns; this finds every calibrator
by its ``calibrator.json``, so that the scripts beside them stay out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedModels(BuildHookInterface):
    """Adds the model folders of a checkout below ``fusion_detox/_shipped``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds."""
        if version == "editable":  # the package finds them in the checkout
            return
        root = Path(self.root)
        shipped = {
            card.parent: f"calibrators/{card.parent.name}"
            for card in sorted(root.glob("calibration_ckpts/*/calibrator.json"))
        }
        target = root / "examples" / "demo_target" / "model"
        if (target / "config.json").is_file():
            shipped[target] = "demo_target"
        if len(shipped) < 2:
            self.app.display_warning("This wheel lacks the shipped calibrator or the demo target.")
        for folder, name in shipped.items():
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not any(
                    part.startswith(".") for part in path.relative_to(folder).parts
                ):
                    inside = path.relative_to(folder).as_posix()
                    build_data["force_include"][str(path)] = (
                        f"fusion_detox/_shipped/{name}/{inside}"
                    )

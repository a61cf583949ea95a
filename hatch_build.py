"""Build hook that puts the shipped calibrators and the demo target into the wheel.

``force-include`` in ``pyproject.toml`` accepts no patterns. This hook finds each calibrator by its
``calibrator.json`` and leaves out the other files in that folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedModels(BuildHookInterface):
    """Adds the checkout's model folders to the wheel as ``fusion_detox/_shipped``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files. hatchling calls this before each build."""
        if version == "editable":  # the package finds the files in the checkout
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
            self.app.display_warning(
                "The shipped calibrator or the demo target is missing from this wheel."
            )
        for folder, name in shipped.items():
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not any(
                    part.startswith(".") for part in path.relative_to(folder).parts
                ):
                    inside = path.relative_to(folder).as_posix()
                    build_data["force_include"][str(path)] = (
                        f"fusion_detox/_shipped/{name}/{inside}"
                    )

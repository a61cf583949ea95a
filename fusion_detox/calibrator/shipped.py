"""Where the calibrators and the demo target are that come with the library."""

from __future__ import annotations

from pathlib import Path

from fusion_detox.errors import ModelNotFoundError

DEFAULT_CALIBRATOR = "english-16k"

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_names() -> list[str]:
    """Names of the calibrators that ``Calibrator.from_pretrained`` knows, sorted."""
    return sorted(_shipped())


def find_shipped(name: str) -> Path | None:
    """The folder of a shipped calibrator; ``None`` if there is none of that name."""
    return _shipped().get(name)


def demo_target_path() -> Path:
    """The folder of the small model that the demo detoxifies.

    Raises:
        ModelNotFoundError: This installation has none.
    """
    # An installed package contains the demo target; a checkout has it in examples/.
    places = (
        _PACKAGE / "_shipped" / "demo_target",
        _PACKAGE.parent / "examples" / "demo_target" / "model",
    )
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ModelNotFoundError(
        f"The demo target is missing; looked in {' and '.join(map(str, places))}. Install the "
        f"package again, or train it with python -m recipes.demo_target."
    )


def _shipped() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in (_PACKAGE / "_shipped" / "calibrators", _PACKAGE.parent / "calibration_ckpts"):
        for path in place.glob("*/calibrator.json"):
            found.setdefault(path.parent.name, path.parent)
    return found

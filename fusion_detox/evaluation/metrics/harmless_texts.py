"""Which harmless texts a run reads, whom they are about, and what tells them from others."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.metrics.suites import Suite, load_suite, suite_from_file


def group_names(suite: Suite) -> tuple[list[str], str | None]:
    """The group of each text, and what the control is called, if there is one."""
    given = {item.group or "control" for item in suite.controls}
    control = given.pop() if len(given) == 1 else "control" if given else None
    names = [
        control if item.control and control else item.group or suite.name for item in suite.texts
    ]
    return names, control


def harmless_texts(config: EvaluationConfig) -> Suite:
    """The harmless text of a run: the user's or the built-in, the first texts of it."""
    suite = suite_from_file(str(config.harmless)) if config.harmless else load_suite("general")
    return dataclasses.replace(suite, texts=suite.texts[: config.harmless_texts])


def suite_digest(suite: Suite) -> str:
    """Tells the texts of a suite from others: 10 hex digits."""
    text = json.dumps([[item.text, item.group, item.pair, item.control] for item in suite.texts])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]

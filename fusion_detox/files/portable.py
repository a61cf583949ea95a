"""Make folders that one major version of transformers wrote readable for the other."""

from __future__ import annotations

import json
from pathlib import Path


def make_portable(folder: Path) -> None:
    """Make a folder that transformers 5 wrote readable for version 4.57, and vice versa.

    Version 5 renamed the tokenizer class, turned an object into a list and moved ``rope_theta``.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        for name in ("is_local", "local_files_only", "name_or_path"):  # specific to this machine
            values.pop(name, None)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    # Version 4 repeats in this file what is in the one above.
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    path = folder / "config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        theta = (values.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:
            values.setdefault("rope_theta", theta)
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""The examples run as written, offline, each with a tiny model of its family."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MODELS = runpy.run_path(str(Path(__file__).with_name("family_models.py")))
FAMILY_OF = {
    "bart.py": "BART",
    "bloom.py": "BLOOM",
    "falcon.py": "Falcon-RW (ALiBi)",
    "gemma.py": "Gemma 3",
    "gpt2.py": "GPT-2",
    "gpt_neox.py": "GPT-NeoX, Pythia",
    "hybrid.py": "Falcon-H1",
    "llama.py": "Llama 3",
    "mamba.py": "Mamba",
    "mistral.py": "Mistral",
    "mixtral.py": "Mixtral",
    "mpt.py": "MPT",
    "opt.py": "OPT",
    "phi.py": "Phi-3, Phi-4-mini",
    "qwen.py": "Qwen3",
    "t5.py": "T5",
}
DEFAULT = re.compile(r'"--model",\s*default="([^"]+)"')


def scripts() -> list[str]:
    return sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def saved_target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder like a model on the hub: weights, config and tokenizer of the script's family."""
    family = MODELS["FAMILIES"][FAMILY_OF[request.param]]
    tokenizer = MODELS["tokenizer_in_kind"](family.tokenizer)
    folder = tmp_path / "target"
    model = family.make(len(tokenizer) + family.columns, tokenizer, 5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("script", "saved_target"),
    [(s, s) for s in FAMILY_OF],
    indirect=["saved_target"],
    ids=FAMILY_OF,
)
def test_example_runs_with_its_family(
    script: str,
    saved_target: Path,
    calibrator_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs in this process, because a new one would spend most of its time importing torch."""
    options = {"--model": saved_target, "--calibrator": calibrator_folder, "--tokens": 8}
    arguments = [str(word) for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--prompt", "You are a complete"])
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "maps"))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capsys.readouterr().out
    texts = {
        name: re.findall(rf"^{name} fusion: (.*?)(?=^with|\Z)", printed, re.M | re.S)
        for name in ("without", "with")
    }
    assert texts["without"], printed
    assert texts["with"], printed
    # The calibrator is as random as the target, so it changes much.
    assert texts["without"] != texts["with"], printed


def test_any_model_runs_as_the_readme_calls_it() -> None:
    """Runs in a process of its own, with the shipped models."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "any_model.py"), "--tokens", "4"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "without fusion: " in done.stdout
    assert "with fusion: " in done.stdout


def test_every_script_is_run_and_listed() -> None:
    assert scripts() == sorted([*FAMILY_OF, "any_model.py"])
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows: dict[str, Any] = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| ([^|]+) \|", text, re.M))
    assert sorted(rows) == scripts()
    for script in FAMILY_OF:
        source = (EXAMPLES / script).read_text(encoding="utf-8")
        (default,) = DEFAULT.findall(source)
        assert rows[script] == f"`{default}`"
        # Readers copy the command at the top of the script.
        assert f"python examples/{script} --model {default}" in source
        assert len(source.splitlines()) <= 45


def test_links_in_the_list_resolve() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert not [link for link in links if not (EXAMPLES / link).exists()]

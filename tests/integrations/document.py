"""Writes the table of engines in docs/serving/index.md from the markers of the tests.

python tests/integrations/document.py            writes the table

A test says what it shows: ``@pytest.mark.serves("llama.cpp", "drafts")``. With ``"refused"`` as a
third argument, it shows a clear error.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "serving" / "index.md"
BEGIN = "<!-- The table is written by tests/integrations/document.py; do not edit it. -->\n"
END = "<!-- The end of the table. -->\n"
# The page of each engine, in the order of the table.
ENGINES = {
    "vLLM": "vllm.md",
    "llama.cpp": "llama-cpp.md",
    "transformers": "transformers.md",
    "ONNX Runtime GenAI": "onnx-genai.md",
    "MLX-LM": "mlx-lm.md",
    "SGLang": "sglang.md",
    "TensorRT-LLM": "tensorrt-llm.md",
    "LMDeploy": "lmdeploy.md",
}
FEATURES = (
    "strength per request",
    "batches",
    "drafts",
    "beams",
    "bad request fails alone",
    "run on the engine",
)
STATES = ("yes", "refused")


def marks():
    """Yield (engine, feature, state, test) for each marker, read from the source."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.serves":
                    engine, feature, *state = (argument.value for argument in call.args)
                    name = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                    yield engine, feature, state[0] if state else "yes", name


def table(found):
    """The table's text."""
    cells, files = {}, defaultdict(set)
    for engine, feature, state, test in found:
        cells[engine, feature] = state
        files[engine].add(test.partition("::")[0])
    lines = [
        f"| engine | {' | '.join(FEATURES)} | tests |",
        "|---" * (len(FEATURES) + 2) + "|",
    ]
    for engine, page in ENGINES.items():
        states = [cells.get((engine, feature), "no") for feature in FEATURES]
        if engine not in files:
            states = ["see its page"] + [""] * (len(FEATURES) - 1)
        links = [f"[{Path(name).name}](../../{name})" for name in sorted(files[engine])]
        lines.append(f"| [{engine}]({page}) | {' | '.join(states)} | {', '.join(links)} |")
    return "\n".join(lines) + "\n"


def document(text, found):
    """The page with its table renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


if __name__ == "__main__":
    page = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(document(page, list(marks())), encoding="utf-8")

"""The architecture, read from the source: which module may import which, and what none may do."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "fusion_detox"
# Each layer imports from those above it and from its own, never from those below.
LAYERS = (
    ("errors", "lazy", "differences", "heap", "json_lines", "refusals", "versions", "whole_file"),
    ("config",),
    ("loading", "tokens", "head_inputs", "data_files"),
    ("vocabulary", "calibrator", "card", "shipped"),
    ("context", "session", "decoders", "alignment", "target_head"),
    ("fusion",),
    ("processor",),
    ("training", "scoring", "generation", "explain"),
    ("evaluation",),
    ("integrations",),
    ("cli", "__main__"),
)
SOURCES = {
    ".".join((path.parent if path.name == "__init__.py" else path).with_suffix("").parts): path
    for path in (
        source.relative_to(ROOT.parent)
        for source in sorted(ROOT.rglob("*.py"))
        if "_shipped" not in source.parts
    )
}
modules = pytest.mark.parametrize("module", SOURCES)


@functools.cache
def parse(module):
    return ast.parse((ROOT.parent / SOURCES[module]).read_text(encoding="utf-8"))


def imports(module):
    """Every module that one imports, at its top or inside a function, with the names taken."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in SOURCES else (node.module, alias.name)


def dependencies(module):
    own = {name for name, _ in imports(module) if name.split(".")[0] == "fusion_detox"}
    return own - {"fusion_detox"}


def layer(module):
    part = module.split(".")[1]
    found = [
        number
        for number, names in enumerate(LAYERS)
        if any(part == name or part.startswith(f"{name}_") for name in names)
    ]
    assert found, f"{module} belongs to no layer; add it to LAYERS"
    return found[0]


@modules
def test_imports_go_one_way(module):
    names = {name for target, name in imports(module) if target == "fusion_detox"}
    assert names <= {"__version__"}, f"{module} imports {names} from the package, not its module"
    if module == "fusion_detox":  # it hands out the public names of all layers
        return
    upward = {name for name in dependencies(module) if layer(name) > layer(module)}
    assert not upward, f"{module} imports from a layer that builds on it: {sorted(upward)}"


def test_no_import_cycles():
    graph = {module: dependencies(module) - {module} for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@modules
def test_public_api_of_transformers_only(module):
    private = [
        f"{name}.{part}".strip(".")
        for name, part in imports(module)
        if name.split(".")[0] == "transformers"
        and any(piece.startswith("_") for piece in [*name.split("."), part])
    ]
    assert not private


@modules
def test_nothing_that_runs_code_of_a_file(module):
    assert not {"pickle", "dill", "marshal", "shelve", "joblib"} & {n for n, _ in imports(module)}
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "torch.load", f"{module}, line {node.lineno}"
            for keyword in node.keywords:
                remote = keyword.arg == "trust_remote_code"
                assert not remote or ast.unparse(keyword.value) == "False", (
                    f"{module}, line {node.lineno}: trust_remote_code"
                )


@modules
def test_no_print(module):
    lines = [
        node.lineno
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not lines


@modules
def test_one_idea_a_module(module):
    lines = (ROOT.parent / SOURCES[module]).read_text(encoding="utf-8").count("\n")
    assert lines <= 350, f"{module} has {lines} lines; at most 350 keep it one idea"

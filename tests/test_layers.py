"""The architecture, read from the source: which modules may import which, and forbidden calls."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "fusion_detox"
# Each room imports only from the rooms above it and from itself.
ROOMS = (
    "errors",
    "config",
    "files",
    "fusion",
    "vocabulary",
    "calibrator",
    "decoding",
    "alignment",
    "processor",
    "generation",
    "scoring",
    "training",
    "evaluation",
    "integrations",
    "cli",
    "__main__",
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
    """Every module that the given one imports, at its top or in functions, with the names."""
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


def room(module):
    return module.split(".")[1]


def test_every_entry_of_the_root_is_a_room():
    """At most 15 rooms, so that a newcomer can remember them all."""
    found = {module.split(".")[1] for module in SOURCES if module != "fusion_detox"}
    assert found == set(ROOMS)
    assert len(found - {"__main__"}) <= 15


@modules
def test_imports_go_one_way(module):
    names = {name for target, name in imports(module) if target == "fusion_detox"}
    assert names <= {"__version__"}, f"{module} imports {names} from the package, not its module"
    if module == "fusion_detox":  # it re-exports the public names of all rooms
        return
    above = ROOMS[: ROOMS.index(room(module)) + 1]
    upward = {name for name in dependencies(module) if room(name) not in above}
    assert not upward, f"{module} imports from a room that builds on it: {sorted(upward)}"


def test_no_import_cycles():
    graph = {module: dependencies(module) - {module} for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@modules
def test_only_the_public_api_of_transformers_is_used(module):
    private = [
        f"{name}.{part}".strip(".")
        for name, part in imports(module)
        if name.split(".")[0] == "transformers"
        and any(piece.startswith("_") for piece in [*name.split("."), part])
    ]
    assert not private


@modules
def test_nothing_can_run_code_from_a_file(module):
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

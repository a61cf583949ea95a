"""Packages that import their public names when they are used, and say which those are."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["fusion_detox", *(f"fusion_detox.{n}" for n in ("evaluation", "scoring", "training"))]
packages = pytest.mark.parametrize("package", PACKAGES)


def for_type_checkers(package):
    """The module of each name that is imported under ``TYPE_CHECKING``."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text("utf-8"))
    block = next(n for n in tree.body if ast.unparse(n).startswith("if TYPE_CHECKING"))
    return {alias.name: node.module for node in block.body for alias in node.names}


@packages
def test_all_tables_of_names_agree(package):
    """A name that a type checker sees, that ``import *`` takes, and that can be used: all three."""
    module, seen = importlib.import_module(package), for_type_checkers(package)
    assert set(seen) == set(module.__all__) - {"__version__"}
    assert set(module.__all__) <= set(dir(module))
    # In a process of its own, where nothing was imported before.
    code = f"""
from importlib import import_module
package = import_module({package!r})
for name, home in {seen!r}.items():
    assert getattr(package, name) is getattr(import_module(home), name), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@packages
def test_other_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = importlib.import_module(package).nothing


def test_a_name_is_looked_up_once():
    code = """
import fusion_detox.scoring as package
found = []
real, package.__getattr__ = package.__getattr__, lambda name: found.append(name) or real(name)
assert package.SCORERS is package.SCORERS
assert found == ["SCORERS"], found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Packages that import their public names on first use list them completely."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["fusion_detox", *(f"fusion_detox.{n}" for n in ("evaluation", "scoring", "training"))]
packages = pytest.mark.parametrize("package", PACKAGES)


def for_type_checkers(package):
    """Maps each name imported under ``TYPE_CHECKING`` to its module."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text("utf-8"))
    block = next(n for n in tree.body if ast.unparse(n).startswith("if TYPE_CHECKING"))
    return {alias.name: node.module for node in block.body for alias in node.names}


@packages
def test_all_tables_of_names_agree(package):
    """Type checkers, ``import *`` and lazy imports see the same names."""
    module, seen = importlib.import_module(package), for_type_checkers(package)
    assert set(seen) == set(module.__all__) - {"__version__"}
    assert set(module.__all__) <= set(dir(module))
    # A new process has imported nothing yet.
    code = f"""
from importlib import import_module
package = import_module({package!r})
for name, home in {seen!r}.items():
    assert getattr(package, name) is getattr(import_module(home), name), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@packages
def test_other_names_raise_attribute_errors(package):
    with pytest.raises(AttributeError, match=f"No {package} attribute nothing"):
        _ = importlib.import_module(package).nothing

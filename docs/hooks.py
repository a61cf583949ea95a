"""MkDocs hooks that generate pages and rewrite links.

Generated pages: one per command, from its help; one per public package, for mkdocstrings; and
``README.md``, ``CONTRIBUTING.md``, ``SECURITY.md`` and ``CHANGELOG.md`` from the repository's root.
Links are written for a reader of the repository. On the site, a link to a file outside ``docs/``
leads to that file on GitHub.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fusion_detox.cli import app

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/fusion-detox/fusion-detox"
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
PACKAGES = (
    "fusion_detox",
    "fusion_detox.training",
    "fusion_detox.evaluation",
    "fusion_detox.scoring",
    "fusion_detox.integrations.continuous_batching",
    "fusion_detox.integrations.metrics",
    "fusion_detox.integrations.server_settings",
)
# Read from their source, because each imports its engine.
ENGINES = tuple(
    f"fusion_detox.integrations.{name}"
    for name in ("llama_cpp", "onnx_genai", "mlx_lm", "sglang", "tensorrt_llm", "lmdeploy")
)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Fill the navigation's two generated sections."""
    generated = {
        "Commands": [{name: f"commands/{name}.md"} for name in commands()],
        "Python API": [{name: f"api/{name}.md"} for name in (*PACKAGES, *ENGINES)],
    }
    for section in config.nav or []:
        for title, entries in generated.items():
            if title in section:
                section[title] = entries


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, path in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=text))
    for name, command in commands().items():
        content = command_page(name, command)
        files.append(File.generated(config, f"commands/{name}.md", content=content))
    for name in (*PACKAGES, *ENGINES):
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Rewrite links to a page of the site if it exists, otherwise to GitHub."""
    path = page.file.src_uri
    sources = {target: source for source, target in ROOT_PAGES.items()}
    here = posixpath.dirname(sources.get(path, f"docs/{path}"))

    def rewrite(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[1]))
        inside = ROOT_PAGES.get(target) or target.removeprefix("docs/")
        if files.get_file_from_path(inside) is not None:
            url = posixpath.relpath(inside, posixpath.dirname(path) or ".")
        else:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            url = f"{REPOSITORY}/{kind}/main/{target}"
        return f"]({url}{link[2] or ''})"

    return LINK.sub(rewrite, markdown)


def commands() -> dict[str, Any]:
    """The commands of ``fusion-detox`` by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def command_page(name: str, command: Any) -> str:
    """A page with a command's usage, description, arguments and options."""
    context = command.context_class(command, info_name=f"fusion-detox {name}")
    lines = [f"# {name}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```text", command.get_usage(context).removeprefix("Usage: "), "```", ""]
    panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or default
        panels.setdefault(panel, []).append(parameter)
    for panel, parameters in panels.items():
        lines += [f"## {panel}", ""] if parameters else []
        for parameter in parameters:
            if record := parameter.get_help_record(context):
                usage, text = record
                lines += [f"`{usage}`", f":   {escape(text)}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Help text as Markdown: only backticks keep their meaning."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def api_page(name: str) -> str:
    """A page with every public name of a package, for mkdocstrings."""
    if name in ENGINES:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree)
        lists = [node for node in tree.body if isinstance(node, ast.Assign)]
        public = next(node for node in lists if ast.unparse(node.targets[0]) == "__all__")
        names = ast.literal_eval(public.value)
    else:
        package = importlib.import_module(name)
        doc = package.__doc__
        names = [one for one in package.__all__ if one != "__version__"]
    text = inspect.cleandoc(doc or "").replace("``", "`").replace("::\n", ":\n")
    parts = [f"# {name}", text, *(f"::: {name}.{one}" for one in names)]
    return "\n\n".join(parts) + "\n"

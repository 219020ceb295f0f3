"""Hooks of the documentation site: pages from files outside docs/, links between them, and the tutorial notebook."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "docs/tutorial.ipynb"
# File of the repository -> page of the site. Files of docs/ keep their names.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipe_keys.md",
    "slurm/README.md": "cluster.md",
    NOTEBOOK: "tutorial.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def on_config(config: Any) -> Any:
    """List pages that the navigation does not name under "More"."""

    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for value in (entry.values() if isinstance(entry, dict) else entry) for name in names(value)]

    listed = names(config.nav)
    if more := sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in listed):
        config.nav.append({"More": more})
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages whose files are outside docs/, and the notebook as a page."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = notebook_as_markdown(json.loads(text)) if source == NOTEBOOK else text
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite links between files of the repository as links between pages of the site."""
    name = page.file.src_uri
    source = SOURCES.get(name, f"docs/{name}")

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        linked = PAGES.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(linked, posixpath.dirname(name) or ".") + match[3]

    return LINK.sub(rewrite, markdown)


def notebook_as_markdown(notebook: dict[str, Any]) -> str:
    """Return the cells as text and code blocks, each followed by its printed output."""
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        printed = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        if printed:
            blocks.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"

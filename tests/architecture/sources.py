"""Reads the repository's Python sources as syntax trees, for the architecture tests. Rules are in the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_itt"
FOLDERS = (PACKAGE, "tools", "tests")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the repository root, with forward slashes."""

    path: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def functions(self) -> Iterator[FunctionNode]:
        """Every function and method, nested ones included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))

    @cached_property
    def imports(self) -> list[str]:
        """Full dotted names of everything imported anywhere in the file; `from a import b` counts as `a.b`."""
        names: list[str] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                names += [f"{base}.{alias.name}" for alias in node.names]
        return names

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parents = list(Path(self.path).with_suffix("").parts)[: -node.level]
        return ".".join([*parents, *([node.module] if node.module else [])])


def all_sources() -> list[Source]:
    """The Python files of the repository, in a stable order."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix()) for path in [ROOT / "setup.py", *paths]]


def package_sources() -> list[Source]:
    """The files of the package alone."""
    return [source for source in all_sources() if source.path.startswith(f"{PACKAGE}/")]

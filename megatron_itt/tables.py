"""Result files: tables in Markdown, data in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.files import atomic_write

# Heading -> format string or function of a row.
Columns = Mapping[str, str | Callable[[Any], object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text cells; the first `num_text_columns` are words, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    note: str = ""
    num_text_columns: int = 1

    def markdown(self) -> str:
        """Format heading, table and note."""
        parts = [f"## {self.heading}" * bool(self.heading), markdown_table(self.header, self.rows), self.note]
        return "\n\n".join(part for part in parts if part)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table; a bar within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def table_of(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows of data; a column has a heading, and a format string or a function for its cells."""
    cells = ([form.format(**row) if isinstance(form, str) else form(row) for form in columns.values()] for row in rows)
    return markdown_table(list(columns), cells)


def with_error(value: float | None, error: float | None, form: str) -> str:
    """Format "value +/- error"; an unknown value is "-", an unknown error is left out."""
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} +/- {error:{form.lstrip('+')}}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, in a folder that may not exist yet."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, content: str | bytes) -> None:
    """Write a file atomically, in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)

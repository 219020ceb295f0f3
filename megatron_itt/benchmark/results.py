"""Benchmark results: sections with rows for programs and a table for people, and the two files that hold them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.errors import IttError
from megatron_itt.tables import Columns, table_of, write_json, write_text


@dataclass(frozen=True, kw_only=True)
class Section:
    """One measured part. `rows` are plain data; `columns` format them as a table."""

    title: str
    rows: list[dict[str, Any]]
    columns: Columns
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A section, or the error that prevented it."""

    name: str
    seconds: float
    section: Section | None = None
    error: str | None = None

    def as_markdown(self) -> str:
        """Format heading, table and notes, or the error."""
        if self.section is None:
            return f"## {self.name}\n\nFAILED after {self.seconds:.0f} s: {self.error}"
        table = table_of(self.section.columns, self.section.rows)
        return "\n\n".join([f"## {self.section.title}", table, *self.section.notes])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        if self.section is None:
            return {"seconds": self.seconds, "error": self.error}
        section = self.section
        return {"seconds": self.seconds, "title": section.title, "rows": section.rows, "notes": list(section.notes)}


def run_sections(actions: Mapping[str, Callable[[], Section]]) -> Iterator[Outcome]:
    """Run all actions in order; an exception becomes the outcome of its section, and the next one runs."""
    for name, action in actions.items():
        started, found = time.perf_counter(), dict[str, Any]()
        try:
            found["section"] = action()
        except Exception as problem:  # one part's fault must not lose the others' figures
            found["error"] = describe_exception(problem)
        yield Outcome(name=name, seconds=time.perf_counter() - started, **found)


def describe_exception(problem: BaseException) -> str:
    """Format an exception on one line: our own by message, others by type, first line and innermost source line."""
    if isinstance(problem, IttError):
        return str(problem)
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}{place}"


def write_results(outcomes: Sequence[Outcome], *, facts: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write NAME.json and NAME.md; `facts` are of `machine_facts`, with the command."""
    rates = facts["rates"]
    heading = (
        f"# {facts['machine']}\n\n"
        f"{facts['date']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, Python "
        f"{facts['python']}. Fastest matrix products: {rates['fp32'] / 1e9:,.0f} GFLOP/s in fp32, "
        f"{rates['bf16'] / 1e9:,.0f} in bf16; MFU is relative to the one of the model's type.\n\n    {facts['command']}"
    )
    write_json(folder / f"{name}.json", {**facts, "sections": {each.name: each.as_dict() for each in outcomes}})
    write_text(folder / f"{name}.md", "\n\n".join([heading, *(each.as_markdown() for each in outcomes)]) + "\n")

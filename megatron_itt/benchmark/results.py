"""Benchmark results: sections with rows for programs and a table for people, and the two files that hold them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_itt.errors import IttError


@dataclass(frozen=True, kw_only=True)
class Section:
    """One measured part. `rows` are plain data; `table` is Markdown."""

    title: str
    rows: list[dict[str, Any]]
    table: str
    notes: tuple[str, ...] = ()


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
        parts = [f"## {self.section.title}", self.section.table, *self.section.notes]
        return "\n\n".join(part for part in parts if part)


def run_sections(
    actions: Mapping[str, Callable[[], Section]], *, report: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Run all actions in order; an exception becomes the outcome of its section, and the next one runs."""
    outcomes = []
    for name, action in actions.items():
        started = time.perf_counter()
        section: Section | None = None
        error: str | None = None
        try:
            section = action()
        except Exception as problem:  # one part's fault must not lose the others' figures
            error = describe_exception(problem)
        outcomes.append(Outcome(name=name, seconds=time.perf_counter() - started, section=section, error=error))
        if report is not None:
            report(outcomes[-1])
    return outcomes


def describe_exception(problem: BaseException) -> str:
    """Format an exception on one line: our own by message, others by type, first line and innermost source line."""
    if isinstance(problem, IttError):
        return str(problem)
    place, trace = "", problem.__traceback__
    while trace is not None:
        place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}{place}"


def write_results(
    outcomes: Sequence[Outcome], *, facts: Mapping[str, Any], heading: str, folder: Path, name: str
) -> tuple[Path, Path]:
    """Write NAME.json and NAME.md; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{name}.json", folder / f"{name}.md"
    content = {**facts, "sections": {outcome.name: _plain(outcome) for outcome in outcomes}}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text.write_text("\n\n".join([heading, *(outcome.as_markdown() for outcome in outcomes)]) + "\n", encoding="utf-8")
    return data, text


def format_heading(facts: Mapping[str, Any], *, command: str) -> str:
    """Format the first lines of a result: machine, date, fastest matrix products, command."""
    rates = facts["rates"]
    lines = [
        f"# {facts['machine']}",
        f"{facts['date']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, Python "
        f"{facts['python']}. Fastest matrix products: {rates['fp32'] / 1e9:,.0f} GFLOP/s in fp32, "
        f"{rates['bf16'] / 1e9:,.0f} in bf16; MFU is relative to the one of the model's type.",
        f"    {command}",
    ]
    return "\n\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table of text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _plain(outcome: Outcome) -> dict[str, Any]:
    if outcome.section is None:
        return {"seconds": outcome.seconds, "error": outcome.error}
    section = asdict(outcome.section)
    del section["table"]
    return {"seconds": outcome.seconds, **section}

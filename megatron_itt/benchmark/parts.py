"""The parts of a benchmark by name, and one run of some of them: what `itt benchmark` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_itt.benchmark.decode import decode_section
from megatron_itt.benchmark.lengths import lengths_section
from megatron_itt.benchmark.machine import machine_facts
from megatron_itt.benchmark.memory import memory_section
from megatron_itt.benchmark.models import Shape
from megatron_itt.benchmark.overhead import overhead_section
from megatron_itt.benchmark.routed import routed_section
from megatron_itt.benchmark.scaling import scaling_section
from megatron_itt.benchmark.sections import Outcome, Section, run_sections, write_results
from megatron_itt.benchmark.steps import steps_section
from megatron_itt.errors import ConfigError
from megatron_itt.parallel.groups import choose_device


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run of the benchmark was asked for."""

    shape: Shape
    parts: tuple[str, ...]
    num_repeats: int = 5
    stop_after_s: float | None = None  # no further turn of a part begins after that
    models: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (1, 8)
    num_new_tokens: int = 32
    num_prompt_tokens: int = 32
    lengths: tuple[int, ...] = ()
    num_ranks: int = 2
    inputs: tuple[str, ...] = ()
    tokenizer: str | None = None
    num_workers: int | None = None  # processes of data
    command: str = ""


def _steps(request: Request) -> Section:
    return steps_section(
        request.shape, models=request.models, num_repeats=request.num_repeats, stop_after_s=request.stop_after_s
    )


def _routed(request: Request) -> Section:
    return routed_section(request.shape, num_repeats=request.num_repeats)


def _lengths(request: Request) -> Section:
    length = request.shape.config.model.seq_length
    return lengths_section(
        request.shape,
        lengths=request.lengths or (length // 2, length, 2 * length),
        num_repeats=request.num_repeats,
        stop_after_s=request.stop_after_s,
    )


def _decode(request: Request) -> Section:
    config = request.shape.config
    device = choose_device(config.runtime.device, 0)
    return decode_section(
        request.shape,
        batch_sizes=request.batch_sizes,
        num_new_tokens=request.num_new_tokens,
        num_prompt_tokens=request.num_prompt_tokens,
        num_repeats=request.num_repeats,
        device=str(device),
        dtype=config.precision.dtype,
    )


def _data(request: Request) -> Section:
    from megatron_itt.benchmark.data import data_section

    return data_section(
        request.shape, inputs=request.inputs, tokenizer=request.tokenizer, num_workers=request.num_workers
    )


def _scaling(request: Request) -> Section:
    return scaling_section(request.shape, num_ranks=request.num_ranks, num_repeats=request.num_repeats)


def _memory(request: Request) -> Section:
    return memory_section(request.shape)


def _overhead(request: Request) -> Section:
    return overhead_section(request.shape.config, num_turns=request.num_repeats)


# In the order in which they run. `overhead` writes a run folder and is not among those that run unasked.
PARTS: dict[str, Callable[[Request], Section]] = {
    "steps": _steps,
    "routed": _routed,
    "lengths": _lengths,
    "decode": _decode,
    "data": _data,
    "scaling": _scaling,
    "memory": _memory,
    "overhead": _overhead,
}
USUAL = tuple(name for name in PARTS if name != "overhead")


def check_request(request: Request) -> None:
    """ConfigError for what cannot work, before anything is measured."""
    unknown = [name for name in request.parts if name not in PARTS]
    if unknown or not request.parts:
        raise ConfigError(f"--parts: there is no part {unknown[0] if unknown else ''!r}; choose from {','.join(PARTS)}")
    if request.num_repeats < 1:
        raise ConfigError(f"--repeats is {request.num_repeats}; at least one repetition must be timed")


def run_request(request: Request, *, folder: Path, name: str, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the parts one after the other, write FOLDER/NAME.json and .md; what fails is in the files as well.

    Raises ConfigError for a request that cannot work.
    """
    check_request(request)
    facts: dict[str, Any] = machine_facts(choose_device(request.shape.config.runtime.device, 0))
    wanted = [part for part in PARTS if part in request.parts]
    outcomes = run_sections({part: partial(PARTS[part], request) for part in wanted}, report=report)
    write_results(
        outcomes,
        facts={**facts, "command": request.command},
        heading=heading(facts, command=request.command),
        folder=folder,
        name=name,
    )
    return outcomes


def heading(facts: dict[str, Any], *, command: str) -> str:
    """The first lines of a result: machine, date, ceiling, command."""
    rates = facts["rates"]
    lines = [
        f"# {facts['machine']}",
        f"{facts['date']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, Python "
        f"{facts['python']}. Fastest matrix products: {rates['fp32'] / 1e9:,.0f} GFLOP/s in fp32, "
        f"{rates['bf16'] / 1e9:,.0f} in bf16; MFU is of the one of the model's type.",
        f"    {command}",
    ]
    return "\n\n".join(lines)


def failed(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of the parts that gave no figures."""
    return [outcome.name for outcome in outcomes if outcome.section is None]

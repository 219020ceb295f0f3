"""Measure training, decoding, data and memory on this machine; check a GPU; compile the Triton kernels."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from megatron_itt.benchmark.gpu_check import CheckRequest, require_packages, run_check
from megatron_itt.commands.arguments import Count, Names, Numbers, OptionalCount, Overrides, separated
from megatron_itt.config.backends import use_backend
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings

EXAMPLES = """
  itt benchmark
  itt benchmark --parts steps --shape 162m --repeats 3 --output docs/results --name cpu-162m
  itt benchmark --parts steps --models "ITT x4;Loop x4" --shape recipes/466m/itt_x4.yaml model.num_layers=2
  itt benchmark --parts steps --variants "optimizer.kind=muon;schedule.decay=wsd schedule.decay_steps=20"
  itt benchmark --parts data --input corpus/*.jsonl.zst --tokenizer runs/tokenizer --workers 2
  itt benchmark --parts rates --shape 466m --name this-machine
  itt benchmark --parts decode --shape 162m --batches 1,8 --new-tokens 128 thinking.capacity=[0.5,0.5,0.5]
  itt benchmark gpu-check --output docs/results
  itt benchmark gpu-check --device cpu --tiny --output runs/gpu_check    # try the check itself
  itt benchmark kernels --output docs/results    # registers and spills of the Triton kernels; needs no GPU
"""
PARTS = ("steps", "decode", "data", "memory")
ALL_PARTS = (*PARTS, "rates")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Time the parts of the project, as --parts names them.

    Parts: steps (training steps of LLaMA, megatron-core's own GPTModel, loop and ITT models), decode (the export), data
    (preprocessing with its memory, and loading; give at least 200 MB of text), memory (activations by recompute mode),
    and rates, which itt recipe layout --calibrate reads (only if named).
    """

    overrides: Overrides = ()
    parts: Names = PARTS  # some of the parts
    shape: str = "tiny"  # tiny, 162m, 230m, 466m (cut on CPUs), or a recipe
    repeats: int = 5  # timed turns
    seconds_per_part: float | None = None  # begin no further turn of a part after that
    threads: OptionalCount = None  # of torch (default: its own choice)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run
    models: Annotated[tuple[str, ...], separated(";", like="A;B")] = ()  # of steps; LLaMA is always included
    variants: Annotated[tuple[str, ...], separated(";", like="A;B")] = ()  # of steps: overrides to time instead
    batches: Numbers = (1, 8)  # of decode
    prompt_tokens: Count = 32  # of decode
    new_tokens: Count = 32  # of decode
    input: tuple[str, ...] = ()  # text for data (default: a sample corpus)
    tokenizer: str | None = None  # for data, with --input
    workers: OptionalCount = None  # processes of data (default: one per core)
    output: Path = Path("runs/benchmark")  # folder of the results
    name: str = "benchmark"  # of the result files

    def execute(self) -> int:
        unknown = [part for part in self.parts if part not in ALL_PARTS]
        if unknown or not self.parts:
            name = unknown[0] if unknown else ""
            raise ConfigError(f"--parts: there is no part {name!r}; choose from {','.join(ALL_PARTS)}")
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}; at least one repetition must be timed")
        silence_known_warnings()
        import torch

        from megatron_itt.benchmark.shapes import load_shape, load_variants
        from megatron_itt.parallel.groups import choose_device

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device, 0)
        overrides = [f"runtime.device={self.device}", *self.overrides]
        shape = load_shape(self.shape, overrides, device=device.type)
        variants = load_variants(self.shape, overrides, self.variants, device=device.type) if self.variants else None
        print(use_backend(shape.config.precision.parts, device=device.type), end="\n\n", flush=True)
        from megatron_itt.benchmark.machine import machine_facts
        from megatron_itt.benchmark.results import run_sections, write_results

        facts = {**machine_facts(device), "command": command_line()}
        outcomes = []
        for outcome in run_sections(self._sections(shape, device, variants)):
            print(outcome.as_markdown(), end="\n\n", flush=True)
            outcomes.append(outcome)
        write_results(outcomes, facts=facts, folder=self.output, name=self.name)
        print(f"written to {self.output}")
        return 1 if any(outcome.section is None for outcome in outcomes) else 0

    def _sections(self, shape: Any, device: Any, variants: Any) -> dict[str, Callable[[], Any]]:
        from megatron_itt.benchmark.data import data_section
        from megatron_itt.benchmark.decode import Decoding, decode_section
        from megatron_itt.benchmark.layouts import rates_section
        from megatron_itt.benchmark.memory import memory_section
        from megatron_itt.benchmark.steps import steps_section

        decoding = Decoding(
            num_prompt_tokens=self.prompt_tokens,
            num_new_tokens=self.new_tokens,
            num_repeats=self.repeats,
            device=str(device),
            dtype=shape.config.precision.dtype,
        )
        limits: dict[str, Any] = {"num_repeats": self.repeats, "stop_after_s": self.seconds_per_part}
        sections: dict[str, Callable[[], Any]] = {
            "steps": lambda: steps_section(shape, models=self.models, variants=variants, **limits),
            "decode": lambda: decode_section(shape, self.batches, decoding),
            "data": lambda: data_section(shape, inputs=self.input, tokenizer=self.tokenizer, num_workers=self.workers),
            "memory": lambda: memory_section(shape),
            "rates": lambda: rates_section(shape, device),
        }
        return {part: sections[part] for part in ALL_PARTS if part in self.parts}


@dataclass(frozen=True, kw_only=True)
class GpuCheck(CheckRequest):
    """Check the model on NVIDIA GPUs and time the paper's shapes there, within --minutes.

    Rows are appended to a .jsonl file as they are measured. Exits with 2 where there is no GPU, and with 1 when a row
    failed. On a machine without the packages of itt: make gpu-check, or python -m megatron_itt.benchmark.
    """

    command: Suppress[str] = ""

    def execute(self) -> int:
        require_packages()
        return run_check(replace(self, command=command_line()))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Compile all Triton launches of the paper's shapes for NVIDIA GPUs; list registers, spills and shared memory."""

    capabilities: Numbers = (80, 90, 100)  # compute capabilities: 80 is A100, 90 H100, 100 B200
    output: Path = Path("runs/benchmark")  # folder of the result

    def execute(self) -> int:
        """Compile, print the table, write it; 1 if a launch does not fit or spills more than 32 instructions."""
        from megatron_itt.benchmark.kernel_resources import compile_shapes, kernel_page, problems_of

        rows = compile_shapes(self.capabilities)
        page = kernel_page(rows, command=command_line())
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "kernels.md").write_text(page, encoding="utf-8")
        print(page)
        return 1 if problems_of(rows) else 0


def command_line() -> str:
    """Return the command as it was given, for the results."""
    words = sys.argv[1:]
    return shlex.join(["itt", "benchmark", *(words[1:] if words[:1] == ["benchmark"] else words)])


COMMAND = {"parts": Parts, "gpu-check": GpuCheck, "kernels": Kernels}
DEFAULT = "parts"

"""Measure how long things take on this machine, side by side in one run, beside their FLOPs and its matrix rate."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from megatron_itt.benchmark.needed import CheckRequest, require_packages
from megatron_itt.commands.arguments import Count, Names, Numbers, OptionalCount, Overrides, separated
from megatron_itt.config.backends import use_backend
from megatron_itt.log import silence_known_warnings

EXAMPLES = """
  itt benchmark
  itt benchmark --parts steps,routed --shape 162m --repeats 3 --output docs/results --name cpu-162m
  itt benchmark --parts steps --models "ITT x4;Loop x4" --shape recipes/466m/itt_x4.yaml model.num_layers=2
  itt benchmark --parts lengths --shape 162m --lengths 1024,2048,4096,8192 model.num_layers=2
  itt benchmark --parts data --input corpus/*.jsonl.zst --tokenizer runs/tokenizer --workers 2
  itt benchmark --parts decode --shape 162m --batches 1,8 --new-tokens 128 thinking.capacity=[0.5,0.5,0.5]
  itt benchmark --parts overhead --repeats 40 model.hidden_size=384 logging.run_dir=runs/overhead
  itt benchmark gpu-check --output docs/results
  itt benchmark gpu-check --device cpu --tiny --output runs/gpu_check    # try the check itself
"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Time the parts of the project, as --parts names them.

    Parts: steps (training steps of LLaMA, megatron-core's own GPTModel, Loop and ITT models), routed (what a routed
    step spends its time on), lengths (steps as sequences grow), decode (the exported model), data (preprocessing with
    its memory, and loading; give at least 200 MB of text: below that, starting the processes is most of the time),
    scaling (ranks of this machine, with bytes), memory (activations by recompute mode), overhead (of the training
    loop).
    """

    overrides: Overrides = ()
    parts: Names = ()  # some of the parts (default: all but overhead)
    shape: str = "tiny"  # tiny, 162m, 230m, 466m (cut on CPUs), or a recipe
    repeats: int = 5  # timed turns
    seconds_per_part: float | None = None  # begin no further turn of a part after that
    threads: OptionalCount = None  # of torch (default: its own choice)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run
    models: Annotated[tuple[str, ...], separated(";", like="A;B")] = ()  # of steps; LLaMA is always there
    batches: Numbers = (1, 8)  # of decode
    prompt_tokens: Count = 32  # of decode
    new_tokens: Count = 32  # of decode
    lengths: Numbers = ()  # of lengths (default: half to twice the recipe's)
    ranks: int = 2  # of scaling
    input: tuple[str, ...] = ()  # text for data (default: a sample corpus)
    tokenizer: str | None = None  # for data, with --input
    workers: OptionalCount = None  # processes of data (default: one per core)
    output: Path = Path("runs/benchmark")  # folder of the results
    name: str = "benchmark"  # of the result files

    def execute(self) -> int:
        """Measure, print each part as it ends, write JSON and Markdown."""
        silence_known_warnings()
        import torch

        from megatron_itt.benchmark.models import load_shape
        from megatron_itt.parallel.groups import choose_device

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device, 0).type
        shape = load_shape(self.shape, [f"runtime.device={self.device}", *self.overrides], device=device)
        print(use_backend(shape.config.precision.parts, device=device), end="\n\n", flush=True)
        from megatron_itt.benchmark.parts import USUAL, Request, failed, run_request

        request = Request(
            shape=shape,
            parts=self.parts or USUAL,
            num_repeats=self.repeats,
            stop_after_s=self.seconds_per_part,
            models=self.models,
            batch_sizes=self.batches,
            num_new_tokens=self.new_tokens,
            num_prompt_tokens=self.prompt_tokens,
            lengths=self.lengths,
            num_ranks=self.ranks,
            inputs=self.input,
            tokenizer=self.tokenizer,
            num_workers=self.workers,
            command=command_line(),
        )
        outcomes = run_request(request, folder=self.output, name=self.name, report=_print_outcome)
        print(f"written to {self.output}")
        return 1 if failed(outcomes) else 0


@dataclass(frozen=True, kw_only=True)
class GpuCheck(CheckRequest):
    """Check the model on one or more NVIDIA GPUs and time the paper's shapes there, in at most eight minutes.

    Exits with 2 where there is no GPU, and with 1 when a section failed: the other sections' figures are written all
    the same. On a machine without the packages of itt: make gpu-check, or python -m megatron_itt.benchmark, which need
    torch, triton, numpy, transformers, megatron-core, pydantic and pyyaml alone.
    """

    command: Suppress[str] = ""

    def execute(self) -> int:
        """Run the sections, print each as it ends, write JSON and Markdown."""
        require_packages()
        from megatron_itt.benchmark.gpu_check import run_check

        return run_check(replace(self, command=command_line()))


def command_line() -> str:
    """The command as it was given, for the results."""
    words = sys.argv[1:]
    return shlex.join(["itt", "benchmark", *(words[1:] if words[:1] == ["benchmark"] else words)])


def _print_outcome(outcome: Any) -> None:
    print(outcome.as_markdown(), end="\n\n", flush=True)


COMMAND = {"parts": Parts, "gpu-check": GpuCheck}
DEFAULT = "parts"

"""What `make gpu-check` does, section by section, each in a process with a limit of time; at most eight minutes in all.

First whether the numbers are right, then how fast they come, the paper's shapes first. Everything also runs on the CPU
with tiny shapes, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_itt.benchmark.decode import decode_section
from megatron_itt.benchmark.graphs import graphs_section
from megatron_itt.benchmark.isolated import Action, run_isolated
from megatron_itt.benchmark.kernel_checks import kernels_section
from megatron_itt.benchmark.lengths import lengths_section
from megatron_itt.benchmark.machine import machine_facts
from megatron_itt.benchmark.memory import memory_section
from megatron_itt.benchmark.models import BASE, STOCK, STOCK_SAME_PARTS, Shape, load_shape
from megatron_itt.benchmark.needed import CheckRequest
from megatron_itt.benchmark.parts import failed, heading
from megatron_itt.benchmark.precision import precision_section
from megatron_itt.benchmark.rank_checks import ranks_section
from megatron_itt.benchmark.routed import routed_section
from megatron_itt.benchmark.scaling import scaling_section
from megatron_itt.benchmark.sections import Outcome, Section, write_results
from megatron_itt.benchmark.steps import steps_section
from megatron_itt.config.backends import choose_backend, use_backend
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings

_TIMED = ("ITT x4", "ITT x4, selected", "Loop x4", "ITT x2", "ITT x3")
_PLAIN = (BASE, STOCK, STOCK_SAME_PARTS)
# Small enough for the stock attention, which keeps every score.
_STOCK_CUT = ("model.num_layers=2", "model.vocab_size=8000", "batch.global=1", "batch.micro=1")
_TINY = (
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=256", "model.seq_length=64", "batch.global=4", "batch.micro=2"),
)


def run_check(request: CheckRequest) -> int:
    """Run the check, print each section as it ends and where the files are; 1 if a section failed."""
    outcomes = check_gpu(
        request, folder=request.output, report=lambda outcome: print(outcome.as_markdown(), end="\n\n", flush=True)
    )
    lost = failed(outcomes)
    print(f"written to {request.output}" + (f"; FAILED: {', '.join(lost)}" if lost else ""))
    return 1 if lost else 0


def check_gpu(request: CheckRequest, *, folder: Path, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run the check and write FOLDER/gpu-NAME-DATE.json and .md, also where sections fail.

    Raises ConfigError where there is no GPU to check.
    """
    if request.repeats < 1:
        raise ConfigError(f"--repeats is {request.repeats}; at least one step must be timed")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no NVIDIA GPU here; run this on a GPU machine, or make bench for the CPU")
    num_gpus = torch.cuda.device_count() if request.device == "cuda" else 2
    began = time.monotonic()
    outcomes = run_isolated(plan_check(request, num_gpus=num_gpus), total_s=60 * request.minutes, report=report)
    machine = outcomes[0].section
    facts = machine.rows[0] if machine is not None else _facts_without_machine(request)
    notes = [] if num_gpus > 1 else ["One GPU: NCCL between GPUs and scaling were not run."]
    lines = [heading(facts, command=request.command), *notes, f"{time.monotonic() - began:.0f} s in all."]
    write_results(
        outcomes,
        facts={**facts, "command": request.command, "seconds": time.monotonic() - began},
        heading="\n\n".join(lines),
        folder=folder,
        name=f"gpu-{slug(facts['machine'])}-{time.strftime('%Y-%m-%d', time.gmtime())}",
    )
    return outcomes


def plan_check(request: CheckRequest, *, num_gpus: int) -> list[Action]:
    """All sections in order, with their limits of time."""
    device = torch.device("cpu") if request.device == "cpu" else torch.device("cuda", 0)
    best = usable_parts(request.device)[-1]
    repeats, small = request.repeats, _shape(request, "tiny")
    shapes = {"tiny": small} if request.tiny else {name: _shape(request, name) for name in ("162m", "466m")}
    first = next(iter(shapes))
    stock = small if request.tiny else _shape(request, "162m", *_STOCK_CUT)
    precise = {"tiny": small.config}
    if not request.tiny:
        precise["162m, 2 layers"] = _shape(request, "162m", *_STOCK_CUT, "model.seq_length=1024").config
    add = partial(_action, request)
    actions = [add("machine", best, 90, machine_section, device), add("kernels", best, 90, kernels_section, device)]
    for parts in usable_parts(request.device):
        for name, section in (("precision", precision_section), ("graphs", graphs_section)):
            actions.append(add(f"{name}, {parts}", parts, 60, partial(section, parts=parts), precise, device))
    if num_gpus > 1:
        actions.append(add("ranks", best, 90, partial(ranks_section, num_ranks=2), small))
    for name, shape in shapes.items():
        timed = partial(steps_section, models=_TIMED, num_repeats=repeats, stop_after_s=40.0)
        actions.append(add(f"steps {name}", best, 120, timed, shape))
    actions += [
        add("stock", "native", 60, partial(steps_section, models=_PLAIN, num_repeats=repeats), stock),
        *[add(f"routed {name}", best, 40, partial(routed_section, num_repeats=repeats), shape)
          for name, shape in shapes.items()],
        add("decode", best, 90, _decoding(request), shapes[first]),
        add("memory", best, 60, memory_section, shapes[first]),
        add("lengths", best, 80, _lengths(request), shapes[first]),
    ]  # fmt: skip
    if num_gpus > 1 and not request.tiny:
        timed = partial(scaling_section, num_ranks=num_gpus, num_repeats=repeats, num_turns=1, timeout_s=80.0)
        actions.append(add("scaling", best, 90, timed, shapes[first]))
    return actions


def machine_section(device: torch.device) -> Section:
    """What the machine is; its facts are the only row."""
    return Section(title="Machine", rows=[machine_facts(device)], table="")


def usable_parts(device: str) -> list[str]:
    """Choices of `precision.parts` that work here: native first, the one that auto takes last."""
    found = []
    for name in ("apex", "transformer_engine"):
        try:
            found.append(choose_backend(name, device=device).name)
        except ConfigError:
            continue
    return ["native", *found]


def prepare(parts: str, device: str) -> None:
    """In a fresh process, before megatron-core is imported."""
    silence_known_warnings()
    use_backend(parts, device=device)


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"\W+", "-", text).strip("-").lower()


def _action(
    request: CheckRequest, name: str, parts: str, limit_s: float, function: Callable[..., Section], *arguments: Any
) -> Action:
    setup = (prepare, (parts, request.device))
    return Action(name=name, function=function, arguments=arguments, limit_s=limit_s, setup=setup)


def _shape(request: CheckRequest, name: str, *overrides: str) -> Shape:
    settings = [f"runtime.device={request.device}", *(_TINY if request.tiny else ()), *overrides]
    return load_shape(name, settings, device=request.device)


def _decoding(request: CheckRequest) -> Callable[..., Section]:
    sizes, tokens, prompt = ((1, 2), 3, 8) if request.tiny else ((1, 8, 64), 64, 512)
    return partial(
        decode_section,
        batch_sizes=sizes,
        num_new_tokens=tokens,
        num_prompt_tokens=prompt,
        num_repeats=min(3, request.repeats),
        device=request.device,
        dtype="fp32" if request.tiny else "bf16",
    )


def _lengths(request: CheckRequest) -> Callable[..., Section]:
    lengths = (32, 64) if request.tiny else (1024, 2048, 4096, 8192)
    return partial(lengths_section, lengths=lengths, num_repeats=min(5, request.repeats), stop_after_s=50.0)


def _facts_without_machine(request: CheckRequest) -> dict[str, Any]:
    """What a result says when even the first section failed."""
    name = torch.cuda.get_device_name(0) if request.device == "cuda" else "cpu"
    return {
        "machine": name,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": 0,
        "threads": 0,
        "torch": torch.__version__,
        "python": "",
        "rates": {"fp32": 0.0, "bf16": 0.0},
    }

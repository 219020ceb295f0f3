"""Rows of the GPU check: kernels, steps, decoding, precision, layouts and CUDA graphs, each a generator.

A comparison row has `difference`, `allowed` and `agrees`. An error, out of memory included, costs one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_itt.benchmark.gpu_check import TINY
from megatron_itt.benchmark.isolated import Row
from megatron_itt.benchmark.layouts import measure_layout
from megatron_itt.benchmark.machine import machine_facts, paired_ratio, time_interleaved
from megatron_itt.benchmark.results import describe_exception
from megatron_itt.benchmark.shapes import Shape, choose_models, on_one_rank
from megatron_itt.benchmark.steps import measure_steps
from megatron_itt.config.environment import single_process
from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.groups import start_parallel, stop_parallel

# bfloat16 keeps 8 bits: logits differ by percents, and near-ties among router logits select other tokens, which changes
# a token's gradient altogether. Measured on CPUs: half of these.
MAX_PRECISION_DIFFERENCE = {"logits": 0.1, "gradients": 0.35, "selected": 0.1}
# Relative root mean square between a replayed graph and the eager pass: the kernels are the same.
MAX_GRAPH_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# float32 losses in another order of summation; a near-tie may select another token.
MAX_LAYOUT_DIFFERENCE = 2e-3
_NUM_REPLAYS, _GRAPH_WARM_UPS, _NUM_LAYOUT_STEPS = 3, 3, 3
LAYOUTS = {
    "DP": (),
    "TP": ("parallel.tensor=2",),
    "TP+SP": ("parallel.tensor=2", "parallel.sequence=true"),
    "PP": ("parallel.pipeline=2",),
}
_LAYOUT_RECIPE = (*TINY, "batch.global=16", "batch.micro=1", "precision.dtype=fp32", "precision.parts=native")


def machine_rows(device: torch.device) -> Iterator[Row]:
    """Yield the machine's facts."""
    yield machine_facts(device)


def guarded(labels: Row, measure: Callable[[], Row]) -> Row:
    """Return the labels with what `measure` returns, or with its error."""
    try:
        return {**labels, **measure()}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {**labels, "out_of_memory": str(error).splitlines()[0]}
    except Exception as error:  # this row's outcome
        return {**labels, "error": describe_exception(error)}


def step_rows(shape: Shape, models: Sequence[str], num_repeats: int, stop_after_s: float) -> Iterator[Row]:
    """Time each model beside LLaMA, one pair at a time."""
    for name in models:
        pair = choose_models(shape.config, [name])
        try:
            rows, left_out = measure_steps(pair, num_repeats=num_repeats, stop_after_s=stop_after_s)
        except Exception as error:
            yield {"name": name, "error": describe_exception(error)}
            continue
        yield from (row for row in rows if row["name"] == name or name == models[0])
        yield from ({"name": missing, "out_of_memory": reason} for missing, reason in left_out.items())


def decode_rows(shape: Shape, batch_sizes: Sequence[int], decoding: Any) -> Iterator[Row]:
    """Measure cached decoding, one batch size at a time."""
    from megatron_itt.benchmark.decode import decode_section

    for size in batch_sizes:

        def measure(size: int = size) -> Row:
            return decode_section(shape, [size], decoding).rows[0]

        yield guarded({"batch": size}, measure)


def precision_rows(config: RunConfig, device: torch.device) -> Iterator[Row]:
    """Compare bfloat16 with float32 for the same weights and tokens, with both kinds of attention."""
    for attend in ("all", "selected"):
        case = on_one_rank(config, replace(config.thinking, attend=attend))
        labels = {"backend": config.precision.parts, "attend": attend}
        yield guarded(labels, partial(_compare_precisions, case, device))


def _compare_precisions(config: RunConfig, device: torch.device) -> Row:
    def outcome(dtype: torch.dtype) -> PassResults:
        return _in_one_process(config, device, lambda config, tokens: training_pass(config, tokens, dtype=dtype)())

    wide, narrow = outcome(torch.float32), outcome(torch.bfloat16)
    found = {
        "logits": relative_difference([wide.logits], [narrow.logits]),
        "gradients": relative_difference(wide.gradients, narrow.gradients),
        "selected": _unequal_share(wide, narrow),
    }
    return {**found, "agrees": all(found[key] <= limit for key, limit in MAX_PRECISION_DIFFERENCE.items())}


def layout_rows(num_ranks: int, device: str) -> Iterator[Row]:
    """Compare the losses of a few steps in every layout of `num_ranks` with those of one rank."""
    expected: list[float] = []
    for layout, parallel in {"one rank": (), **LAYOUTS}.items():
        count = 1 if layout == "one rank" else num_ranks

        def measure(count: int = count, parallel: Sequence[str] = parallel) -> Row:
            overrides = (f"runtime.device={device}", *_LAYOUT_RECIPE, *parallel)
            steps = {"num_ranks": count, "num_steps": _NUM_LAYOUT_STEPS - 1}
            losses = measure_layout("debug/itt_tiny", overrides, **steps)["losses"]
            expected[:] = expected or losses
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
            allowed = MAX_LAYOUT_DIFFERENCE
            return {"losses": losses, "difference": difference, "allowed": allowed, "agrees": difference <= allowed}

        yield guarded({"layout": layout, "ranks": count}, measure)


def graph_rows(config: RunConfig, device: torch.device) -> Iterator[Row]:
    """Capture a training pass as a CUDA graph and compare its replay on other tokens with the eager pass.

    The graph contains the forward pass, the mean loss and all gradients of one micro-batch. Capacity, routing rule and
    temperature are constants of it; the selection is computed in it. Recomputation is excluded: it sets random states.
    """
    for attend in ("all", "selected"):
        case = on_one_rank(config, replace(config.thinking, attend=attend, recompute="none"))
        for dtype in MAX_GRAPH_DIFFERENCE:
            compare = partial(compare_replays, dtype=dtype, capture=capture_graph)
            labels = {"attend": attend, "dtype": str(dtype).removeprefix("torch.")}
            yield guarded(labels, partial(_in_one_process, case, device, compare))


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResults:
    """A forward and backward pass; gradients in the order of parameters, selected in that of layers and steps."""

    logits: Tensor
    gradients: list[Tensor]
    selected: list[Tensor]


Pass = Callable[[], PassResults]


def training_pass(config: RunConfig, tokens: Tensor, *, dtype: torch.dtype) -> Pass:
    """Return a forward and backward pass over the content of `tokens` [b, s + 1] at the time of the call."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.model.routing_control import RoutingRecorder

    built = build_model(config, dtype=dtype, device=tokens.device)
    chunk: Any = built.chunks[0].train()
    parameters = list(chunk.parameters())
    positions = torch.arange(config.model.seq_length, device=tokens.device).expand(tokens.shape[0], -1)

    def run() -> PassResults:
        recorder = RoutingRecorder()
        with built.control.override(recorder=recorder):
            logits = chunk(tokens[:, :-1].contiguous(), positions, None)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        # Not `backward`: gradients that add up in `.grad` would be a state between passes.
        gradients = torch.autograd.grad(loss, parameters)
        selected = [entry.selected for _, entry in sorted(recorder.records.items())]
        return PassResults(logits=logits.detach(), gradients=list(gradients), selected=selected)

    return run


def compare_replays(config: RunConfig, tokens: Tensor, dtype: torch.dtype, capture: Callable[[Pass], Pass]) -> Row:
    """Capture a pass over some tokens; replay it over others, and run the same eagerly."""
    eager = training_pass(config, tokens, dtype=dtype)
    replay = capture(eager)
    expected, found = [], []
    for seed in range(1, _NUM_REPLAYS + 1):
        tokens.copy_(random_tokens(config, seed=seed))
        expected.append(eager())
        results = replay()  # overwritten by the next replay
        copies = [part.clone() for part in results.gradients], [part.clone() for part in results.selected]
        found.append(PassResults(logits=results.logits.clone(), gradients=copies[0], selected=copies[1]))
    seconds = time_interleaved(
        {"eager": lambda _: eager(), "replay": lambda _: replay()}, device=tokens.device, num_repeats=_NUM_REPLAYS
    )
    gradients = zip(*([part.gradients for part in side] for side in (expected, found)), strict=True)
    differences = [relative_difference([a.logits], [b.logits]) for a, b in zip(expected, found, strict=True)]
    differences += [relative_difference([a], [b]) for side in gradients for a, b in zip(*side, strict=True)]
    worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
    unequal = max(_unequal_share(a, b) for a, b in zip(expected, found, strict=True))
    allowed = MAX_GRAPH_DIFFERENCE[dtype]
    return {
        **{"difference": worst, "allowed": allowed, "selected": unequal},
        "agrees": worst <= allowed and unequal <= 1e-3,
        "time_ratio": paired_ratio(seconds["replay"], seconds["eager"]),
    }


def capture_graph(function: Pass) -> Pass:
    """Run `function` a few times on a side stream, as CUDA requires, then once under capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_GRAPH_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> PassResults:
        graph.replay()
        return results

    return replay


def random_tokens(config: RunConfig, *, seed: int) -> Tensor:
    """Return two sequences [b, s + 1] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.model.vocab_size, (2, config.model.seq_length + 1), generator=generator)


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the norm of all differences over the norm of all expected values; NaN if anything is."""
    differences = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(expected, found, strict=True))
    whole = sum(float(a.double().square().sum()) for a in expected)
    if whole == 0.0 and differences == 0.0:
        return 0.0
    return math.sqrt(differences / whole) if whole else math.inf


def _unequal_share(expected: PassResults, found: PassResults) -> float:
    pairs = zip(expected.selected, found.selected, strict=True)
    return float(torch.cat([(a != b).flatten() for a, b in pairs]).float().mean())


def _in_one_process(config: RunConfig, device: torch.device, run: Callable[[RunConfig, Tensor], Any]) -> Any:
    start_parallel(config, process=single_process(device.index or 0))
    try:
        return run(config, random_tokens(config, seed=0).to(device))
    finally:
        stop_parallel()

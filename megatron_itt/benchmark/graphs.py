"""Can a training pass be captured as a CUDA graph? Its replay with other tokens against the same pass run eagerly.

What the graph contains: the whole model's forward pass, the mean loss and the gradients of all parameters, for one
micro-batch on one GPU. What it cannot contain is Python, which runs once, when the graph is captured. So a graph stands
for one `RoutingPlan`: the shares of tokens, the rule of routing and the temperature are its constants, and drawn
budgets (`capacity: {sample: ...}`) need a graph each. Who is picked is computed in the graph, anew at each replay; a
recorder's entries are tensors of the graph, which each replay overwrites. megatron-core's rotary angles are computed
once per length, by the eager passes before the capture, and read by the graph. Updates of the quantile tables, of the
optimizer and of the learning rate are outside, and so is activation recomputation: megatron-core's reads and sets
random states, which no capture allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_itt.benchmark.models import ATTENDS, on_one_rank
from megatron_itt.benchmark.passes import Pass, PassResults, random_tokens, relative_difference, training_pass
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.benchmark.timing import paired_ratio, take_turns
from megatron_itt.config.environment import single_process
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import EvaluationError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

# Root mean square, of the worst parameter. The kernels are the same; sums that the hardware takes in any order differ a
# little, and what a graph computed from other tokens than it was given differs by all of itself.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
MIN_SAME_PICKS = 0.999
NUM_REPLAYS = 3
_WARM_UPS = 3  # Triton compiles, libraries take their workspaces, megatron-core fills its caches


Capture = Callable[[Pass], Pass]  # from a pass to its replay, whose results each replay overwrites


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphReport:
    """Differences over several replays, the share of equal picks, and the replay's time over the eager pass's.

    `gradient_difference` is that of the parameter whose gradient differs most.
    """

    model: str
    attend: str
    dtype: str
    logit_difference: float
    gradient_difference: float
    same_picks: float
    allowed: float
    time_ratio: float

    @property
    def agrees(self) -> bool:
        """Whether a replay computes what an eager pass does."""
        return (
            self.logit_difference <= self.allowed
            and self.gradient_difference <= self.allowed
            and self.same_picks >= MIN_SAME_PICKS
        )


def graphs_section(configs: Mapping[str, RunConfig], device: torch.device, *, parts: str) -> Section:
    """Every configuration with attention to all and to selected tokens. EvaluationError where a replay differs."""
    title = f"CUDA graphs against eager passes, {parts} parts"
    if device.type != "cuda":
        return Section(title=title, rows=[], table="", notes=("CUDA graphs need a GPU; nothing was captured.",))
    reports = [
        compare_replays(name, config, device, dtype=dtype, capture=capture_graph)
        for name, config in graph_cases(configs, parts).items()
        for dtype in TOLERANCES
    ]
    for report in reports:
        if not report.agrees:
            raise EvaluationError(describe_difference(report))
    lines = [
        [
            *(report.model, report.attend, report.dtype),
            *(f"{report.logit_difference:.1e}", f"{report.gradient_difference:.1e}", f"{100 * report.same_picks:.1f}%"),
            f"{report.time_ratio:.2f}",
        ]
        for report in reports
    ]
    columns = ("model", "attend", "type", "logits differ", "gradients differ", "picks equal", "replay / eager time")
    return Section(title=title, rows=[asdict(report) for report in reports], table=markdown_table(columns, lines))


def graph_cases(configs: Mapping[str, RunConfig], parts: Any) -> dict[str, RunConfig]:
    """What is captured: each configuration on one rank, without recomputation, with both kinds of attention."""
    cases = {}
    for name, config in configs.items():
        for attend in ATTENDS:
            thinking = replace(config.thinking, attend=attend, recompute="none")
            precision = replace(config.precision, parts=parts)
            cases[f"{name}, attend {attend}"] = replace(on_one_rank(config, thinking), precision=precision)
    return cases


def compare_replays(
    model: str, config: RunConfig, device: torch.device, *, dtype: torch.dtype, capture: Capture
) -> GraphReport:
    """Capture a pass over some tokens, then replay it over others and run the same eagerly."""
    start_parallel(config, process=single_process(device.index or 0))
    try:
        tokens = random_tokens(config, seed=0).to(device)
        eager = training_pass(config, tokens, dtype=dtype)
        replay = capture(eager)
        expected, found = [], []
        for seed in range(1, NUM_REPLAYS + 1):
            tokens.copy_(random_tokens(config, seed=seed))
            expected.append(eager())
            found.append(_copy(replay()))
        seconds = take_turns(
            {"eager": lambda _: eager(), "replay": lambda _: replay()}, device=device, num_repeats=NUM_REPLAYS
        )
    finally:
        stop_parallel()
    return GraphReport(
        model=model,
        attend=config.thinking.attend,
        dtype=str(dtype).removeprefix("torch."),
        logit_difference=relative_difference([part.logits for part in expected], [part.logits for part in found]),
        gradient_difference=_worst_gradient(expected, found),
        same_picks=_share_of_equal_picks(expected, found),
        allowed=TOLERANCES[dtype],
        time_ratio=paired_ratio(seconds["replay"], seconds["eager"]),
    )


def capture_graph(function: Pass) -> Pass:
    """Run it a few times on a side stream, as CUDA wants it, then once under capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> PassResults:
        graph.replay()
        return results

    return replay


def describe_difference(report: GraphReport) -> str:
    """One line on a replay that is wrong."""
    return (
        f"{report.model}, {report.dtype}: a replayed graph differs from the eager pass by "
        f"{report.logit_difference:.1e} of the logits and {report.gradient_difference:.1e} of a gradient (root mean "
        f"square), with {100 * report.same_picks:.1f}% of the picks equal; at most {report.allowed:.0e} and at least "
        f"{100 * MIN_SAME_PICKS:.1f}% are expected"
    )


def _copy(results: PassResults) -> PassResults:
    """What the next replay does not overwrite."""
    return PassResults(
        logits=results.logits.clone(),
        gradients=[part.clone() for part in results.gradients],
        picks=[part.clone() for part in results.picks],
    )


def _worst_gradient(expected: list[PassResults], found: list[PassResults]) -> float:
    """Of all parameters; NaN where one of them is."""
    by_parameter = zip(
        zip(*(part.gradients for part in expected), strict=True),
        zip(*(part.gradients for part in found), strict=True),
        strict=True,
    )
    return float(torch.tensor([relative_difference(a, b) for a, b in by_parameter]).max())


def _share_of_equal_picks(expected: list[PassResults], found: list[PassResults]) -> float:
    pairs = [pair for a, b in zip(expected, found, strict=True) for pair in zip(a.picks, b.picks, strict=True)]
    return float(torch.cat([(a == b).flatten() for a, b in pairs]).float().mean())

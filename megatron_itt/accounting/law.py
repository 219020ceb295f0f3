"""Loss as a function of size, thinking and training tokens, and when thinking pays by it. No numpy.

L = E + A * N_eff ** -a + B * D ** -b, with N_eff = N_once + r ** phi * N_recurrent. D: training tokens. N_once:
parameters of attention and MLP in plain layers; N_recurrent: in thinking layers, which process a token r times (routed
steps count by their capacity). Source: the form is that of arXiv 2604.21106; `itt study fit` fits it to a ladder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_itt.accounting.flops import count_parameters, forward_flops, routed_layer
from megatron_itt.config import RunConfig
from megatron_itt.config.load import find_recipe
from megatron_itt.config.model import ThinkingConfig
from megatron_itt.errors import DataError
from megatron_itt.tables import markdown_table

# Of routed steps that compute the whole layer, or its attention alone (`thinking.reuse`), as their phi differ.
LAW_FILES = {"layer": "recipes/ladder/law.json", "attention": "recipes/ladder/law_attention.json"}
BASELINES = (
    "the same LLaMA on more tokens (equal FLOPs)",
    "a larger LLaMA (equal FLOPs and tokens)",
    "the FLOPs-optimal LLaMA",
)
INTERVAL = (0.05, 0.95)  # quantiles of the fits to resampled seeds
_MOST_TOKENS_PER_PARAMETER = 1e6
_LONGEST = 100_000  # tokens per parameter: a crossover beyond is no length of a training
_GRID = 80  # points of a scan over tokens or sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """The fitted constants, losses in nats per token."""

    E: float
    A: float
    a: float
    B: float
    b: float
    phi: float

    def loss(self, effective_parameters: float, tokens: float) -> float:
        """Return the loss of a model after so many training tokens."""
        return self.E + self.A * effective_parameters**-self.a + self.B * tokens**-self.b


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the law needs of a model; parameters are those of attention and MLP, FLOPs those of one token forward."""

    once: int
    recurrent: int  # of the thinking layers, what their steps compute with
    passes: float  # r, of the thinking layers
    matrices: float  # FLOPs of the LLaMA of this shape that grow with the square of its width
    other: float  # those that grow with the width: attention and head
    total: float  # FLOPs of the model itself

    @property
    def parameters(self) -> int:
        """Attention and MLP of all layers."""
        return self.once + self.recurrent

    def effective(self, phi: float) -> float:
        """Return N_eff."""
        return self.once + self.passes**phi * self.recurrent

    def llama_flops(self, width: float) -> float:
        """FLOPs of one token of the LLaMA that is `width` times as wide, with width**2 the parameters."""
        return self.matrices * width**2 + self.other * width


def shape_of(config: RunConfig) -> Shape:
    """Return the shape of a recipe."""
    model, thinking = config.model, config.thinking
    own = forward_flops(model, thinking)
    llama = forward_flops(model, ThinkingConfig())
    parameters = count_parameters(model, thinking).matrices
    layer = routed_layer(model, thinking)
    recurrent = (layer.matrices + layer.biases) * len(thinking.layer_indices(model.num_layers))
    return Shape(
        once=parameters - recurrent,
        recurrent=recurrent,
        passes=1 + sum(thinking.nominal_capacity),
        matrices=llama.matrices / model.seq_length,
        other=(llama.attention + llama.head) / model.seq_length,
        total=own.total / model.seq_length,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedLaw:
    """A law, the fits to resampled seeds, and the thinking models and range of the runs that they were fitted to."""

    law: Law
    resampled: tuple[Law, ...]
    variants: tuple[str, ...]
    parameters: tuple[float, float]  # least and most
    tokens_per_parameter: tuple[float, float]
    num_runs: int
    num_seeds: int

    def as_json(self) -> dict[str, Any]:
        """Return plain data for a file of LAW_FILES."""
        return asdict(self)

    def outside(self, parameters: float, tokens_per_parameter: float) -> str:
        """Describe how far a model and its tokens are outside of the fitted range; empty inside."""
        parts = []
        for name, value, (least, most) in (
            ("parameters", parameters, self.parameters),
            ("tokens per parameter", tokens_per_parameter, self.tokens_per_parameter),
        ):
            if not least <= value <= most:
                factor = value / most if value > most else least / value
                parts.append(
                    f"{factor:,.{0 if factor >= 10 else 1}f} times {'above' if value > most else 'below'} in {name}"
                )
        return ", ".join(parts)


def shipped_law(thinking: ThinkingConfig) -> Path:
    """Return the file of the law for these routed steps."""
    return find_recipe(LAW_FILES[thinking.reuse])


def read_law(path: Path) -> FittedLaw | None:
    """Read a fitted law; None where there is none. DataError for a damaged file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return FittedLaw(
            law=Law(**content["law"]),
            resampled=tuple(Law(**each) for each in content["resampled"]),
            variants=tuple(content["variants"]),
            parameters=tuple(content["parameters"]),
            tokens_per_parameter=tuple(content["tokens_per_parameter"]),
            num_runs=content["num_runs"],
            num_seeds=content["num_seeds"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"law {path} cannot be read ({error}); make it again with itt study fit") from None


@cache  # of equal resamplings
def loss_differences(law: Law, shape: Shape, tokens: float) -> tuple[float, float, float]:
    """Return the loss of a model minus that of each of BASELINES, after so many training tokens of the model."""
    own = law.loss(shape.effective(law.phi), tokens)
    width = _width_of_equal_flops(shape)
    return (
        own - law.loss(shape.parameters, tokens * shape.total / shape.llama_flops(1)),
        own - law.loss(shape.parameters * width**2, tokens),
        own - _optimal_loss(law, shape, shape.total * tokens),
    )


@cache
def crossovers(law: Law, shape: Shape) -> tuple[float, float, float]:
    """Return the training tokens from which a model is at least as good as each of BASELINES; infinite if it never is.

    Fewer than 1 token per parameter is 0: better at any length.
    """

    def against_optimal() -> float:
        for tokens in _geometric(shape.parameters, shape.parameters * _MOST_TOKENS_PER_PARAMETER, _GRID):
            if loss_differences(law, shape, tokens)[2] <= 0:
                return 0.0 if tokens == shape.parameters else tokens
        return math.inf

    never = math.inf if loss_differences(law, shape, shape.parameters)[1] > 0 else 0.0
    return _exact_crossover(law, shape), never, against_optimal()


def _exact_crossover(law: Law, shape: Shape) -> float:
    """Against the same LLaMA: A * (N ** -a - N_eff ** -a) = B * D ** -b * (1 - ratio ** -b)."""
    gain = law.A * (shape.parameters**-law.a - shape.effective(law.phi) ** -law.a)
    price = law.B * (1 - (shape.total / shape.llama_flops(1)) ** -law.b)
    if gain <= 0 or price <= 0:
        return math.inf if price > 0 else 0.0
    return (price / gain) ** (1 / law.b)


def _width_of_equal_flops(shape: Shape) -> float:
    """Solve llama_flops(width) = total."""
    half = shape.other / (2 * shape.matrices)
    return math.sqrt(half**2 + shape.total / shape.matrices) - half


def _optimal_loss(law: Law, shape: Shape, flops: float) -> float:
    widths = [*_geometric(0.05, 20.0, _GRID), 1.0, _width_of_equal_flops(shape)]
    return min(law.loss(shape.parameters * width**2, flops / shape.llama_flops(width)) for width in widths)


def _geometric(first: float, last: float, number: int) -> list[float]:
    return [first * (last / first) ** (idx / (number - 1)) for idx in range(number)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of one baseline: the crossover (tokens) and the difference in loss at the recipe's length, with intervals."""

    baseline: str
    crossover: float
    crossover_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]


def predict(fitted: FittedLaw, shape: Shape, tokens: float) -> list[Prediction]:
    """Return a prediction for each of BASELINES."""
    laws = (fitted.law, *fitted.resampled)
    crossing = [crossovers(law, shape) for law in laws]
    differing = [loss_differences(law, shape, tokens) for law in laws]
    return [
        Prediction(
            baseline=baseline,
            crossover=crossing[0][idx],
            crossover_interval=interval([row[idx] for row in crossing[1:]]),
            difference=differing[0][idx],
            difference_interval=interval([row[idx] for row in differing[1:]]),
        )
        for idx, baseline in enumerate(BASELINES)
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the quantiles INTERVAL of values, nearest rank; NaN without values."""
    if not values:
        return math.nan, math.nan
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in INTERVAL)
    return low, high


def format_predictions(fitted: FittedLaw, config: RunConfig) -> str:
    """Return a table of the predictions for a recipe, the verdict for its length, and how far they are extrapolated."""
    shape, tokens = shape_of(config), float(config.tokens_after(config.schedule.steps))
    ratio = tokens / shape.parameters
    cells = []
    for found in predict(fitted, shape, tokens):
        low, high = found.difference_interval
        verdict = "pays" if high < 0 else "does not pay" if low > 0 else "undecided"
        crossing = format_crossover(found.crossover, found.crossover_interval, shape.parameters)
        cells.append((found.baseline, crossing, f"{found.difference:+.4f} [{low:+.4f}, {high:+.4f}]", verdict))
    header = ("baseline", "crossover", f"nats at {ratio:,.3g} tokens per parameter", "verdict there")
    outside = fitted.outside(shape.parameters, ratio)
    return "\n".join(
        [
            f"{shape.parameters:,} parameters of attention and MLP, {tokens / 1e9:,.4g} B tokens; law of "
            f"{fitted.num_runs} runs, phi = {fitted.law.phi:.2f}",
            markdown_table(header, cells),
            f"Extrapolated, {outside}: the numbers are what the law would say, not a prediction."
            if outside
            else "Inside the range of the fitted runs; a crossover beyond it is extrapolated.",
        ]
    )


def pay_off_line(config: RunConfig) -> str | None:
    """Return one line on whether the thinking of a recipe pays by the shipped law; None without thinking or a law."""
    fitted = read_law(shipped_law(config.thinking)) if config.thinking.kind != "none" else None
    if fitted is None:
        return None
    shape = shape_of(config)
    tokens = float(config.tokens_after(config.schedule.steps))
    first = predict(fitted, shape, tokens)[0]
    outside = fitted.outside(shape.parameters, tokens / shape.parameters)
    crossing = format_crossover(first.crossover, first.crossover_interval, shape.parameters)
    return (
        f"{crossing} against {first.baseline}; here {tokens / shape.parameters:,.3g} tokens per parameter: "
        f"{first.difference:+.3f} nats" + (f"; extrapolated, {outside}: not a prediction" if outside else "")
    )


def is_within_reach(crossover: float, parameters: float) -> bool:
    """Whether a crossover, given in tokens, is a length that a model of so many parameters could be trained for."""
    return crossover <= _LONGEST * parameters


def format_crossover(value: float, between: tuple[float, float], parameters: float) -> str:
    """Format a crossover, given in tokens, as tokens per parameter with its interval."""
    low, high = (end / parameters for end in between)
    if not is_within_reach(value, parameters):
        bound = "" if math.isinf(value) else f" below {_LONGEST:,.0f} tokens per parameter"
        reach = f" (or from {_rounded(low)} tokens per parameter on)" if is_within_reach(between[0], parameters) else ""
        return f"does not pay{bound}{reach}"
    shown = ["never" if math.isinf(end) else _rounded(end) for end in (low, high)]
    return f"pays from {_rounded(value / parameters)} [{shown[0]}, {shown[1]}] tokens per parameter on"


def _rounded(value: float) -> str:
    """Two significant digits, without a power of ten."""
    return f"{float(f'{value:.2g}'):,g}"

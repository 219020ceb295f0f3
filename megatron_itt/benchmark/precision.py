"""Does a device compute the model right? Logits, picks and gradients of one model in two precisions on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_itt.benchmark.models import ATTENDS
from megatron_itt.benchmark.passes import random_tokens, relative_difference, training_pass
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.config.environment import single_process
from megatron_itt.config.run import PrecisionConfig, RunConfig
from megatron_itt.errors import EvaluationError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

# bfloat16 keeps 8 bits of a number: logits differ by percents, and near-ties among router logits change hands; a token
# that thinks in one pass and not in the other changes its own gradient altogether.
MAX_LOGIT_DIFFERENCE = 0.1
MAX_GRADIENT_DIFFERENCE = 0.35
MIN_SAME_PICKS = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionReport:
    """Relative root-mean-square differences of logits and gradients, and the share of equal routing decisions."""

    device: str
    parts: str
    attend: str
    logit_difference: float
    gradient_difference: float
    same_picks: float

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.parts} parts, attend {self.attend}: bf16 logits within "
            f"{100 * self.logit_difference:.2f}% of fp32, gradients within {100 * self.gradient_difference:.2f}% "
            f"(root mean square), {100 * self.same_picks:.1f}% of the routing decisions equal"
        )

    @property
    def agrees(self) -> bool:
        """Whether the differences are those of the types."""
        return (
            self.logit_difference <= MAX_LOGIT_DIFFERENCE
            and self.gradient_difference <= MAX_GRADIENT_DIFFERENCE
            and self.same_picks >= MIN_SAME_PICKS
        )


def precision_section(configs: Mapping[str, RunConfig], device: torch.device, *, parts: Any) -> Section:
    """bf16 against fp32, for each configuration with attention to all and to selected tokens; `parts` as in recipes."""
    reports: dict[str, PrecisionReport] = {}
    for name, config in configs.items():
        for attend in ATTENDS:
            precision = PrecisionConfig(dtype=config.precision.dtype, parts=parts)
            case = replace(config, thinking=replace(config.thinking, attend=attend), precision=precision)
            reports[f"{name}, attend {attend}"] = measure_precision(case, device)
    lines = [
        [
            name,
            f"{100 * report.logit_difference:.2f}%",
            f"{100 * report.gradient_difference:.2f}%",
            f"{100 * report.same_picks:.1f}%",
            "yes" if report.agrees else "NO",
        ]
        for name, report in reports.items()
    ]
    wrong = [str(report) for report in reports.values() if not report.agrees]
    if wrong:
        raise EvaluationError(_expected(wrong[0]))
    return Section(
        title=f"bf16 against fp32, {parts} parts",
        rows=[{"case": name, **asdict(report)} for name, report in reports.items()],
        table=markdown_table(("model", "logits differ", "gradients differ", "picks equal", "agree"), lines),
    )


def compare_precisions(config: RunConfig, device: torch.device) -> PrecisionReport:
    """Run the same weights and tokens in float32 and bfloat16. EvaluationError where they differ too much."""
    report = measure_precision(config, device)
    if not report.agrees:
        raise EvaluationError(_expected(str(report)))
    return report


def measure_precision(config: RunConfig, device: torch.device) -> PrecisionReport:
    """Differences between float32 and bfloat16 with the same weights and tokens."""
    start_parallel(config, process=single_process(device.index or 0))
    try:
        tokens = random_tokens(config, seed=0).to(device)
        wide, narrow = (training_pass(config, tokens, dtype=dtype)() for dtype in (torch.float32, torch.bfloat16))
    finally:
        stop_parallel()
    same = torch.cat([(a == b).flatten().float() for a, b in zip(wide.picks, narrow.picks, strict=True)])
    return PrecisionReport(
        device=str(device),
        parts=config.precision.parts,
        attend=config.thinking.attend,
        logit_difference=relative_difference([wide.logits], [narrow.logits]),
        gradient_difference=relative_difference(wide.gradients, narrow.gradients),
        same_picks=float(same.mean()),
    )


def _expected(report: str) -> str:
    return (
        f"{report}; at most {100 * MAX_LOGIT_DIFFERENCE:.0f}% of the logits, {100 * MAX_GRADIENT_DIFFERENCE:.0f}% of "
        f"the gradients and at least {100 * MIN_SAME_PICKS:.0f}% of the picks are expected"
    )

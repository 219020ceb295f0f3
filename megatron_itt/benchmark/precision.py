"""Does a device compute the model right? Compares bfloat16 with float32 on one device, picks included."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_itt.config.environment import ProcessPlace
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import EvaluationError
from megatron_itt.parallel.groups import start_parallel, stop_parallel

# bfloat16 keeps 8 bits of a number: logits differ by percents, and near-ties among router logits change hands.
MAX_RELATIVE_DIFFERENCE = 0.1
MIN_SAME_PICKS = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionReport:
    """Relative root-mean-square difference of the logits, and the share of equal routing decisions."""

    device: str
    logit_difference: float
    same_picks: float

    def __str__(self) -> str:
        return (
            f"{self.device}: bf16 logits within {100 * self.logit_difference:.2f}% of fp32 (root mean square), "
            f"{100 * self.same_picks:.1f}% of the routing decisions equal"
        )


def compare_precisions(config: RunConfig, device: torch.device) -> PrecisionReport:
    """Run the same weights and tokens in float32 and bfloat16. EvaluationError where they differ too much."""
    from megatron_itt.model.builder import build_model, forward_logits
    from megatron_itt.model.trace import RoutingRecorder

    place = ProcessPlace(rank=0, world_size=1, local_rank=device.index or 0, master_address="127.0.0.1", master_port=0)
    start_parallel(config, place=place)
    try:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.model.vocab_size, (2, config.model.seq_length), generator=generator).to(device)
        logits, picks = [], []
        for dtype in (torch.float32, torch.bfloat16):
            built = build_model(config, dtype=dtype, device=device)
            built.control.recorder = RoutingRecorder()
            logits.append(forward_logits(built, tokens).float())
            picks.append([entry.picked for _, entry in sorted(built.control.recorder.records.items())])
        difference = float((logits[0] - logits[1]).norm() / logits[0].norm())
        same = torch.cat([(a == b).flatten().float() for a, b in zip(*picks, strict=True)]).mean()
        report = PrecisionReport(device=str(device), logit_difference=difference, same_picks=float(same))
    finally:
        stop_parallel()
    if report.logit_difference > MAX_RELATIVE_DIFFERENCE or report.same_picks < MIN_SAME_PICKS:
        raise EvaluationError(f"{report}; at most {MAX_RELATIVE_DIFFERENCE} and at least {MIN_SAME_PICKS} are expected")
    return report

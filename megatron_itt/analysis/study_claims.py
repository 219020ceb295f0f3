"""The paper's claims about the method as they can be asked of a study, and the rule for a verdict.

A difference counts when it is larger than two standard errors of the paired differences (same seed: same text in the
same order). With one seed there is no error, and nothing is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_itt.analysis.measurement import mean_and_error

Verdict = Literal["reproduced", "not reproduced", "not testable at this scale"]
NUM_ERRORS = 2.0
MIN_SEEDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """That the last validation loss of `better` is below that of `worse`."""

    text: str
    better: str
    worse: str
    source: str


CLAIMS = (
    Claim(
        text="ITT x4 beats LLaMA at equal tokens",
        better="itt_x4",
        worse="llama",
        source="Table 3: perplexity 10.25 against 11.13",
    ),
    Claim(
        text="ITT x4 beats Loop x4 at equal tokens",
        better="itt_x4",
        worse="loop_x4",
        source="Table 2: perplexity 10.25 to 10.52 against 10.78",
    ),
    Claim(
        text="ITT x4 beats Loop x4 at equal training FLOPs",
        better="itt_x4",
        worse="loop_x4_equal_flops",
        source="section 4.2: 70% of the FLOPs",
    ),
    Claim(
        text="ITT x4 beats LLaMA at equal training FLOPs",
        better="itt_x4",
        worse="llama_equal_flops",
        source="section 4.2: higher performance with the same FLOPs",
    ),
    Claim(text="Loop x4 beats LLaMA at equal tokens", better="loop_x4", worse="llama", source="Table 2: 10.78, 11.13"),
    Claim(text="three routed steps beat two", better="itt_x4", worse="itt_x3", source="Figure 5: x4 above x3"),
    Claim(text="two routed steps beat one", better="itt_x3", worse="itt_x2", source="Figure 5: x3 above x2"),
    Claim(
        text="residual thinking helps",
        better="itt_x4",
        worse="without_residual_thinking",
        source="Table 3: +0.77 without",
    ),
    Claim(text="token routing helps", better="itt_x4", worse="without_token_routing", source="Table 3: +0.19 without"),
    Claim(
        text="step encoding helps",
        better="itt_x4",
        worse="without_step_encoding",
        source="Table 3: +0.31 without",
    ),
    Claim(text="top-k beats top-p", better="itt_x4", worse="top_p_routing", source="Table 3: +0.09 with top-p"),
    Claim(text="sigmoid beats tanh", better="itt_x4", worse="tanh_gate", source="Table 3: +0.13 with tanh"),
    Claim(
        text="reweighting the picked tokens only beats reweighting all",
        better="itt_x4",
        worse="symmetric_reweighting",
        source="Table 3: +0.16 with all",
    ),
)

# What needs the paper's sizes, and cannot be asked of models of some million parameters.
BEYOND_THE_SCALE = (
    ("162M reaches 96.5% of a 466M Transformer's score", "needs both sizes and the ten tasks"),
    ("better at 10 of the tasks of Table 1", "models of this size answer them by chance"),
    ("the advantage grows with width (section 4.4)", "needs several sizes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A claim with its differences (better minus worse, nats per token; negative supports it) and the verdict."""

    text: str
    source: str
    verdict: Verdict
    reason: str
    differences: list[float]
    mean: float | None = None
    stderr: float | None = None


def judge(text: str, source: str, differences: Sequence[float]) -> Judgement:
    """The verdict on paired differences of the loss, one per seed."""
    mean, error = mean_and_error(list(differences))
    verdict: Verdict
    if mean is None:
        verdict, reason = "not testable at this scale", "the runs are not there"
    elif error is None or len(differences) < MIN_SEEDS:
        verdict, reason = "not testable at this scale", f"one seed only ({mean:+.4f}); run more"
    elif abs(mean) <= NUM_ERRORS * error:
        verdict, reason = "not reproduced", f"{mean:+.4f} +/- {error:.4f}: within two standard errors of no difference"
    elif mean < 0:
        verdict, reason = "reproduced", f"{mean:+.4f} +/- {error:.4f}: beyond two standard errors"
    else:
        verdict, reason = "not reproduced", f"{mean:+.4f} +/- {error:.4f}: the opposite, beyond two standard errors"
    return Judgement(
        text=text,
        source=source,
        verdict=verdict,
        reason=reason,
        differences=list(differences),
        mean=mean,
        stderr=error,
    )

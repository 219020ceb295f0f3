"""Which steps may change the weights, and what follows the others."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from megatron_itt.config.run import RuntimeConfig
from megatron_itt.training.guards import MIN_HISTORY, StepGuard
from megatron_itt.training.metrics import StepStatistics


def report(loss: float, grad_norm: float = 1.0, *, broken: tuple[int, ...] = ()) -> StepStatistics:
    return StepStatistics(values={"loss": loss, "grad_norm": grad_norm}, broken_ranks=broken)


def guard_after_steps(policy: str, num_steps: int = 32, **settings: Any) -> StepGuard:
    """A guard that has seen a falling, noisy loss and noisy gradient norms."""
    guard, noise = StepGuard(RuntimeConfig(spike_policy=policy, **settings)), random.Random(0)
    for step in range(num_steps):
        loss, norm = 4.0 - 0.01 * step + noise.gauss(0, 0.03), math.exp(noise.gauss(0, 0.2))
        assert guard.judge(report(loss, norm)).action == "accept"
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(("policy", "action"), [("none", "stop"), ("skip", "skip"), ("rollback", "rollback")])
def test_a_step_that_is_not_finite_is_never_accepted(policy: str, action: str, loss: float) -> None:
    assert guard_after_steps(policy).judge(report(loss)).action == action
    assert guard_after_steps(policy).judge(report(4.0, loss)).action == action


def test_the_rank_with_a_broken_loss_is_named() -> None:
    assert "rank 3" in StepGuard(RuntimeConfig()).judge(report(math.nan, math.nan, broken=(3,))).reason


@pytest.mark.parametrize("spike", [(9.0, 1.0), (3.8, 50.0)], ids=["loss", "gradient norm"])
def test_a_spike_is_caught_where_the_policy_says_so(spike: tuple[float, float]) -> None:
    assert guard_after_steps("none").judge(report(*spike)).action == "accept"
    verdict = guard_after_steps("skip").judge(report(*spike))
    assert verdict.action == "skip"
    assert "deviations above the median" in verdict.reason


def test_a_loss_that_falls_is_no_spike_and_nothing_is_one_at_the_start() -> None:
    assert guard_after_steps("skip").judge(report(0.5, 0.01)).action == "accept"
    assert guard_after_steps("skip", MIN_HISTORY - 1).judge(report(100.0)).action == "accept"


def test_a_flat_history_does_not_make_noise_a_spike() -> None:
    guard = StepGuard(RuntimeConfig(spike_policy="skip"))
    for _ in range(32):
        guard.judge(report(2.0))
    assert guard.judge(report(2.1)).action == "accept"
    assert guard.judge(report(3.0)).action == "skip"


def test_recoveries_are_bounded() -> None:
    skipping = guard_after_steps("skip", max_recoveries=2)
    assert [skipping.judge(report(math.nan)).action for _ in range(3)] == ["skip", "skip", "stop"]
    in_between = guard_after_steps("skip", max_recoveries=1)
    actions = [in_between.judge(report(loss)).action for loss in (math.nan, 3.9, math.nan, math.nan)]
    assert actions == ["skip", "accept", "skip", "stop"]
    rolling = guard_after_steps("rollback", max_recoveries=1)
    assert [rolling.judge(report(loss)).action for loss in (math.nan, 3.9, math.nan)] == ["rollback", "accept", "stop"]


def test_a_restored_guard_judges_as_the_one_it_was_saved_from() -> None:
    guard = guard_after_steps("rollback", max_recoveries=2)
    guard.judge(report(9.0))
    restored = StepGuard(RuntimeConfig(spike_policy="rollback", max_recoveries=2))
    restored.restore(json.loads(json.dumps(guard.state())))
    for loss in (3.9, 9.0, 3.9, 9.0):
        assert restored.judge(report(loss)) == guard.judge(report(loss))

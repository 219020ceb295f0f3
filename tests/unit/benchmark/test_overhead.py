"""What the loop adds to a step: the statistic, and the measurement itself on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.benchmark.overhead import Extra, Overhead, measure_overhead
from tests.helpers.one_rank import tiny_recipe


def overhead(plain_s: float, error_s: float) -> Overhead:
    logged = Extra(median_s=0.012, error_s=0.0)
    plain = Extra(median_s=plain_s, error_s=error_s)
    return Overhead(bare_s=1.0, plain=plain, logged=logged, logging_interval_steps=10)


def test_a_few_disturbed_measurements_change_neither_median_nor_error_much() -> None:
    calm = Extra.of([1.0, 1.1, 0.9, 1.05, 0.95] * 5)
    disturbed = Extra.of([1.0, 1.1, 0.9, 1.05, 0.95] * 5 + [50.0, 60.0])
    assert disturbed.median_s == pytest.approx(calm.median_s, rel=0.05)
    assert calm.error_s == pytest.approx(1.2533 * 1.4826 * 0.05 / 5, rel=1e-6)
    assert disturbed.error_s < 2 * calm.error_s


def test_logged_steps_count_once_in_an_interval() -> None:
    found = overhead(0.002, 0.0)
    assert found.share == pytest.approx((0.012 + 9 * 0.002) / 10)
    assert found.share_error == 0.0


@pytest.mark.parametrize(
    ("plain_s", "error_s", "verdict"),
    [(0.002, 0.001, "within 1%"), (0.02, 0.001, "above 1%"), (0.009, 0.004, "too close to tell from 1%")],
)
def test_a_verdict_needs_two_standard_errors(plain_s: float, error_s: float, verdict: str) -> None:
    assert overhead(plain_s, error_s).describe().endswith(verdict)


def test_the_parts_of_the_loop_are_timed_beside_bare_steps(tmp_path: Path) -> None:
    config = tiny_recipe(logging={"run_dir": str(tmp_path / "run"), "tensorboard": False})
    found = measure_overhead(config, num_turns=3)
    assert 0 < found.plain.median_s < found.logged.median_s  # routing is measured in logged steps
    assert found.bare_s > 0
    records = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(records) == 2 * (3 + 2)  # what the loop writes was written

"""Plans: arithmetic that can be done by hand, and layouts that do not fit."""

from __future__ import annotations

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import GPUS
from megatron_itt.config import load_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.plan import JobShape, format_plan, plan_job
from tests.architecture.sources import ROOT

RECIPE = ROOT / "recipes" / "466m" / "itt_x4.yaml"


def test_time_is_work_over_the_assumed_rate() -> None:
    config = load_config(RECIPE)
    plan = plan_job(config, JobShape(num_nodes=2, tasks_per_node=8), GPUS["a100-80gb"], mfu=0.5)
    work = 3 * forward_flops(config.model, config.thinking).total * 50_000 * 256
    assert plan.seconds == pytest.approx(work / (0.5 * 312e12 * 16), rel=1e-12)
    assert plan.tokens_per_s * plan.seconds == pytest.approx(50_000 * 256 * 4096, rel=1e-12)
    assert plan.gpu_hours == pytest.approx(16 * plan.seconds / 3600, rel=1e-12)
    assert (plan.data_parallel, plan.num_microbatches) == (16, 4)


def test_more_nodes_take_less_time_for_the_same_gpu_hours() -> None:
    config = load_config(RECIPE)
    one, four = (plan_job(config, JobShape(num_nodes=n, tasks_per_node=8), GPUS["h100"], mfu=0.4) for n in (1, 4))
    assert four.seconds == pytest.approx(one.seconds / 4)
    assert four.gpu_hours == pytest.approx(one.gpu_hours)


def test_a_layout_that_does_not_fit_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"3 node\(s\) x 8 task\(s\) = 24 processes"):
        plan_job(load_config(RECIPE), JobShape(num_nodes=3, tasks_per_node=8), GPUS["h100"], mfu=0.4)


@pytest.mark.parametrize("mfu", [0.0, -0.1, 35.0])
def test_an_impossible_utilisation_is_refused(mfu: float) -> None:
    with pytest.raises(ConfigError, match="assumed MFU"):
        plan_job(load_config(RECIPE), JobShape(num_nodes=1, tasks_per_node=8), GPUS["h100"], mfu=mfu)


def test_a_model_that_is_too_large_for_a_gpu_is_warned_of() -> None:
    config = load_config(RECIPE, ["batch.micro=16"])
    plan = plan_job(config, JobShape(num_nodes=1, tasks_per_node=8), GPUS["a100-40gb"], mfu=0.4)
    assert "warning" in format_plan(config, plan, gpu_name="a100-40gb", mfu=0.4)

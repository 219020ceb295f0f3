"""Where the time of routed steps goes: every part is found, forward and backward, and only once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.benchmark.models import ATTENDS, Attend, Shape
from megatron_itt.benchmark.routed import PARTS, SHOWN, _part_flops, measure_routed_steps, routed_section
from megatron_itt.benchmark.scopes import REST, Timeline, watched
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_itt.benchmark.machine._WARM_UP_S", 0.0)
    monkeypatch.setattr("megatron_itt.benchmark.machine._MEASURED_S", 0.01)


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_part_takes_time_in_both_directions(attend: Attend, dtype: str) -> None:
    rows = measure_routed_steps(tiny_recipe(precision={"dtype": dtype}), attend=attend, num_repeats=2)
    assert [row.part for row in rows] == list(SHOWN)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    for row in rows:
        assert row.forward_s > 0, row
        assert (row.backward_s > 0) == (row.part != "pick"), row  # a choice has no gradient


def test_the_parts_have_the_flops_that_thinking_adds() -> None:
    config = tiny_recipe(model={"num_layers": 1}, thinking={"layers": [0]})
    plain = forward_flops(config.model, replace(config.thinking, kind="none", capacity=())).total
    added = forward_flops(config.model, config.thinking).total - plain
    assert sum(_part_flops(config).values()) == pytest.approx(3 * config.batch.micro * added)


def test_the_section_adds_up_what_routing_takes() -> None:
    section = routed_section(Shape(config=tiny_recipe(), cut=""), num_repeats=1)
    assert len(section.rows) == 2 * len(SHOWN)
    assert section.notes[0].startswith("attend all: score + pick + gather + scatter take ")
    with pytest.raises(ConfigError, match="--repeats is 0"):
        routed_section(Shape(config=tiny_recipe(), cut=""), num_repeats=0)


class Slow(torch.autograd.Function):
    """Takes a hundredth of a second forward, and two backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(0.01)
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(0.02)
        return grad * 2


def test_inner_parts_count_for_themselves_and_backward_for_the_part_of_its_forward() -> None:
    timeline = Timeline(CPU)
    inner = timeline.watch(Slow.apply, "inner")
    outer = timeline.watch(lambda x: inner(Slow.apply(x)), "outer")
    x = torch.ones(3, requires_grad=True)
    timeline.start()
    loss = outer(x * 1.0).sum()
    forward = timeline.seconds()
    timeline.start()
    loss.backward()
    backward = timeline.seconds()
    # Sleeps are never shorter; the margins above are for a busy machine.
    for part in ("inner", "outer"):
        assert 0.01 <= forward[part] < 0.2 and 0.02 <= backward[part] < 0.2
    assert x.grad is not None and x.grad.tolist() == [4.0, 4.0, 4.0]


def test_a_closed_part_keeps_what_is_called_within_it() -> None:
    timeline = Timeline(CPU)
    inner = timeline.watch(Slow.apply, "inner")
    base = timeline.watch(lambda x: inner(x), "base")
    timeline.start(closed=frozenset({"base"}))
    base(torch.ones(3, requires_grad=True) * 1.0)
    seconds = timeline.seconds()
    assert "inner" not in seconds and seconds["base"] >= 0.01 and REST in seconds


def test_functions_are_put_back_and_missing_ones_passed_over() -> None:
    from megatron_itt.model import attention, step_update

    before = (step_update.gather_tokens, attention.gather_tokens)
    parts = {"gather": PARTS["gather"], "gone": ("megatron_itt.model.step_update:gone", "megatron_itt.no:such")}
    with watched(Timeline(CPU), parts) as found:
        assert step_update.gather_tokens is attention.gather_tokens is not before[0]
    assert found == {"gather"}
    assert (step_update.gather_tokens, attention.gather_tokens) == before

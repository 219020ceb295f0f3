"""Cutting a pipeline by work."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megatron_itt.accounting.pipeline import cut_pipeline, layer_costs
from megatron_itt.config import load_config
from tests.helpers.one_rank import tiny_recipe

RECIPE = Path(__file__).parents[3] / "recipes/466m/itt_x4.yaml"


# Eight layers and a head cannot be divided into four more evenly than 1.173, in whatever order: see the tests below.
@pytest.mark.parametrize(("num_stages", "limit"), [(2, 1.05), (4, 1.18)])
def test_the_busiest_stage_of_466m_x4_is_close_to_the_mean(num_stages: int, limit: float) -> None:
    cut = cut_pipeline(load_config(RECIPE, [f"parallel.pipeline={num_stages}"]))
    assert cut.imbalance <= limit


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_no_other_cut_has_a_cheaper_busiest_stage(num_stages: int) -> None:
    config = load_config(RECIPE, [f"parallel.pipeline={num_stages}"])
    costs, head = layer_costs(config)
    found = []
    for cuts in itertools.combinations(range(1, 8), num_stages - 1):
        edges = (0, *cuts, 8)
        work = [sum(costs[start:end]) for start, end in itertools.pairwise(edges)]
        work[-1] += head
        found.append(max(work))
    assert max(cut_pipeline(config).stage_costs) == pytest.approx(min(found))


def test_no_assignment_of_466m_x4_to_four_stages_is_more_even() -> None:
    """Not only contiguous cuts: interleaving, or stages of their own for embedding and head, would not help either.

    Each of the four thinking layers costs more than half of what a stage may take, so each stage has one of them; the
    four plain layers and the head are five more, so some stage has two of those.
    """
    config = load_config(RECIPE, ["parallel.pipeline=4"])
    costs, head = layer_costs(config)
    least = sum(costs) + head
    for places in itertools.product(range(4), repeat=len(costs)):  # the stage of each layer; that of the head is 0
        work = [head, 0.0, 0.0, 0.0]
        for place, cost in zip(places, costs, strict=True):
            work[place] += cost
        least = min(least, max(work))
    cut = cut_pipeline(config)
    assert cut.least_cost == pytest.approx(least)
    assert cut.imbalance == pytest.approx(cut.least_imbalance) == pytest.approx(1.173, abs=1e-3)


@pytest.mark.parametrize("num_stages", [2, 3, 5, 8])
@pytest.mark.parametrize("overrides", [[], ["thinking.kind=none", "thinking.capacity=[]", "validation.budgets=[]"]])
def test_the_least_cost_is_below_every_cut(num_stages: int, overrides: list[str]) -> None:
    cut = cut_pipeline(load_config(RECIPE, [f"parallel.pipeline={num_stages}", *overrides]))
    assert 1 <= cut.least_imbalance <= cut.imbalance + 1e-9


def test_every_layer_is_on_one_chunk_in_order_of_depth() -> None:
    config = tiny_recipe(model={"num_layers": 8}, parallel={"pipeline": 2, "virtual_pipeline": 2}, batch={"micro": 1})
    chunks = cut_pipeline(config).chunks
    assert len(chunks) == 4
    assert [layer_idx for chunk in chunks for layer_idx in chunk] == list(range(8))


def test_thinking_layers_cost_more_than_plain_ones() -> None:
    costs, head = layer_costs(load_config(RECIPE))
    assert costs[0] == 1.0
    assert costs[1] == pytest.approx(1 + 1.5, rel=0.15)  # three routed steps for half of the tokens
    assert head > 1.0  # 32000 rows of 2048 are more than one layer's matrices

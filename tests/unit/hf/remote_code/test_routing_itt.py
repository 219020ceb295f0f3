"""Selected tokens of the routing rules, and selections in flat, padded and full layouts."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.hf.remote_code.routing_itt import (
    NUM_QUANTILE_INTERVALS,
    Selection,
    router_logits,
    select_threshold,
    select_topk,
    select_topp,
    thresholds,
)

EVERY = torch.ones(1, 4, dtype=torch.bool)


def test_topk_gives_ties_to_the_earlier_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    assert select_topk(logits, torch.tensor([0.5]), EVERY).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("capacity", "expected"), [(0.0, 0), (0.01, 1), (0.374, 1), (0.375, 2), (0.625, 3), (1.0, 4)])
def test_topk_rounds_half_up_to_one_token_at_least_and_to_none_for_a_capacity_of_zero(
    capacity: float, expected: int
) -> None:
    assert int(select_topk(torch.randn(1, 4), torch.tensor([capacity]), EVERY).sum()) == expected


def test_padding_is_never_selected_and_does_not_count_towards_k() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    selected = select_topk(torch.tensor([[9.0, 9.0, 1.0, 2.0]] * 2), torch.tensor([0.5, 0.5]), mask)
    assert selected.tolist() == [[False, False, False, True], [True, True, False, False]]


def test_topp_keeps_the_smallest_prefix_that_reaches_the_capacity() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert select_topp(logits, torch.tensor([0.65]), EVERY).tolist() == [[False, True, True, False]]
    assert select_topp(logits, torch.tensor([0.05]), EVERY).tolist() == [[False, True, False, False]]
    assert int(select_topp(logits, torch.tensor([0.0]), EVERY).sum()) == 0


def test_threshold_interpolates_the_quantiles_at_one_minus_the_budget() -> None:
    one_step = torch.arange(NUM_QUANTILE_INTERVALS + 1).float()
    budget = torch.tensor([[0.25, 0.25], [0.5 + 0.25 / 1024, 0.25], [1.0, 0.25], [0.0, 0.25]])
    tau = thresholds(torch.stack((one_step, 2 * one_step)), budget)
    assert tau[:, 0].tolist() == pytest.approx([768.0, 511.75, float("-inf"), float("inf")])
    assert tau[:, 1].tolist() == [1536.0] * 4


def test_threshold_looks_at_each_row_with_its_own_tau() -> None:
    selected = select_threshold(torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2), torch.tensor([1.0, 2.5]), EVERY.expand(2, 4))
    assert selected.tolist() == [[False, False, True, True], [False, False, False, True]]


def test_router_logits_are_float32_in_bf16_models_and_float64_in_float64_ones() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert router_logits(torch.randn(2, 3, 8, dtype=dtype), torch.randn(8, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("granule", [1, 4])
def test_selection_puts_back_what_it_takes_and_pads(granule: int) -> None:
    torch.manual_seed(0)
    block = torch.randn(3, 7, 2)
    selection = Selection.from_mask(torch.rand(3, 7) > 0.5, granule)
    rows = selection.take(block)
    assert torch.equal(selection.put(block, rows), block)
    assert torch.equal(selection.unpad(selection.pad(rows)), rows)
    assert selection.width % granule == 0
    assert selection.pad_rows(rows).shape[0] % granule == 0


def test_selection_of_no_token_is_empty() -> None:
    selection = Selection.from_mask(torch.zeros(2, 5, dtype=torch.bool))
    assert selection.num_tokens == 0
    assert selection.put(torch.ones(2, 5, 3), torch.zeros(0, 3)).sum() == 30

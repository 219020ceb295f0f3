"""Tokens with equal hidden states tie in spite of rounding, and the earlier one is selected."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.hf.remote_code import routing_itt
from megatron_itt.model.routing import positions_to_mask, select_topk, select_topp

SEQ_LENGTH, NUM_SELECTED, CAPACITY = 256, 65, 0.4567


def _select_as_trained(rule: str, logits: torch.Tensor) -> torch.Tensor:
    if rule == "topk":
        return positions_to_mask(select_topk(logits, NUM_SELECTED), SEQ_LENGTH)
    return select_topp(logits, CAPACITY)


def _select_as_exported(rule: str, logits: torch.Tensor) -> torch.Tensor:
    """Rows of the batch come first there; the last column is padding."""
    padded = torch.nn.functional.pad(logits.t(), (0, 1), value=1e9)
    padding_mask = torch.arange(SEQ_LENGTH + 1).expand(padded.shape) < SEQ_LENGTH
    capacity = torch.full((padded.shape[0],), NUM_SELECTED / SEQ_LENGTH if rule == "topk" else CAPACITY)
    select = routing_itt.select_topk if rule == "topk" else routing_itt.select_topp
    return select(padded, capacity, padding_mask)[:, :SEQ_LENGTH].t()


SELECT = {"trained": _select_as_trained, "exported": _select_as_exported}


@pytest.mark.parametrize("select", ["trained", "exported"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rule", ["topk", "topp"])
def test_equal_tokens_are_selected_by_position_in_spite_of_rounding(
    rule: str, scale: float, dtype: torch.dtype, select: str
) -> None:
    """Every logit occurs twice, as in two documents of the same text; another layout adds other rounding errors."""
    generator = torch.Generator().manual_seed(0)
    once = scale * torch.randn(SEQ_LENGTH // 2, 64, generator=generator, dtype=torch.float64)
    exact = torch.cat([once, once])
    error = torch.finfo(dtype).eps * exact.abs().amax(dim=0)
    layouts = [exact + error * (torch.rand(exact.shape, generator=generator, dtype=exact.dtype) - 0.5) for _ in (0, 1)]
    first, second = (SELECT[select](rule, logits.to(dtype)) for logits in layouts)
    differing = (first != second).any(dim=0).double().mean()
    assert differing <= 0.05  # of 64 sequences; a comparison of every bit makes it a third and more
    # Of two equal tokens, never the later one alone.
    later_alone = (first[SEQ_LENGTH // 2 :] & ~first[: SEQ_LENGTH // 2]).any(dim=0).double().mean()
    assert later_alone <= 0.05


def test_tokens_that_differ_are_selected_by_their_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(SEQ_LENGTH, generator=generator) for _ in range(8)], dim=1).float() - 100.0
    assert positions_to_mask(select_topk(logits, 100), SEQ_LENGTH).equal(logits >= SEQ_LENGTH - 200)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_logits_that_are_all_equal_select_the_first_tokens(value: float) -> None:
    assert select_topk(torch.full((8, 1), value), 3).flatten().tolist() == [0, 1, 2]


def test_tokens_of_minus_infinity_come_last() -> None:
    logits = torch.tensor([float("-inf"), -3.0, float("-inf"), 2.0, -5.0]).unsqueeze(1)
    assert select_topk(logits, 3).flatten().tolist() == [1, 3, 4]

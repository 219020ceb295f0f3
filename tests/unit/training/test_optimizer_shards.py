"""Cutting a flat range of a tensor into boxes."""

from __future__ import annotations

from operator import add

import pytest
import torch

from megatron_itt.training.optimizer_state import split_into_boxes


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 6), (6, 1)])
def test_every_range_is_covered_in_order_by_few_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            boxes = split_into_boxes(shape, start, stop)
            cut = [whole[tuple(map(slice, box.offset, map(add, box.offset, box.shape)))] for box in boxes]
            found = [int(value) for part in cut for value in part.flatten()]
            assert found == list(range(start, stop)), (start, stop)
            assert len(boxes) <= max(1, 2 * len(shape) - 1)

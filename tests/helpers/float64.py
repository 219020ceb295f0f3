"""Whole trainers in float64, for tests that compare layouts: what remains is a wrong number, not another rounding.

In float32 five steps of AdamW multiply rounding: a router's gradient cancels to a thousandth of its summands, and one
token that is selected in one layout alone changes everything after it. How much is left depends on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from megatron_itt.config import RunConfig


def build_in_float64(config: RunConfig, *, dtype: torch.dtype, device: torch.device) -> Any:
    """In place of `build_model`, for recipes in fp32."""
    from megatron_itt.model.builder import build_model

    assert dtype == torch.float32, "bf16 is rounded by intent"
    return build_model(config, dtype=torch.float64, device=device)


@contextmanager
def float64_is_float32() -> Iterator[None]:
    """megatron-core casts logits and gradients to float32 and asks for its type: within this block float64 will do."""
    cast, type_of = torch.Tensor.float, torch.Tensor.type

    def keep_float64(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor.clone() if tensor.dtype == torch.float64 else cast(tensor, *args, **kwargs)

    def name_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(tensor, *args, **kwargs)
        return answer.replace("DoubleTensor", "FloatTensor") if isinstance(answer, str) else answer

    with patch.object(torch.Tensor, "float", keep_float64), patch.object(torch.Tensor, "type", name_type):
        yield

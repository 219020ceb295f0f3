"""Several documents in one sequence, each computed as if it stood alone: positions and attention begin anew.

The position ids of a batch say it all: they count from the start of each token's document, so a token's document begins
at its place minus its position. Every pipeline stage reads the batch, so nothing else has to travel.
Shapes: s sequence, b batch, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_itt.model.thinking import take_rows


class SeparateDocumentsModel(GPTModel):  # type: ignore[misc]
    """A `GPTModel` whose rotary angles and causal mask follow the position ids; its parameters are the same."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """As `GPTModel.forward`: input_ids and position_ids [b, s]; without a mask the documents' own is made."""
        if attention_mask is None:
            attention_mask = forbid_other_documents(position_ids)
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        return decoder_input, angles_at(rotary, position_ids), *rest


def forbid_other_documents(position_ids: Tensor) -> Tensor:
    """Causal mask within documents. position_ids [b, s] -> bool [b, 1, s, s], true where attention is forbidden."""
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    starts = places - position_ids  # [b, s]: where each token's document begins
    later = places > places.unsqueeze(-1)
    before = places < starts.unsqueeze(-1)
    return (later | before).unsqueeze(1)


def angles_at(rotary: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary angles of every token's own position. rotary [s, 1, 1, d], position_ids [b, s] -> [s, b, 1, d]."""
    return take_rows(rotary.expand(-1, position_ids.shape[0], -1, -1), position_ids.t())

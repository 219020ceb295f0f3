"""What a model puts into a checkpoint: its tensors under their global names, and nothing of how it was made."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.one_rank import built_model, tiny_recipe


def test_a_model_saves_its_tensors_and_nothing_else() -> None:
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        from megatron_itt.checkpoint.state import sharded_model_state

        (chunk,) = built.chunks
        tensors = {name for name, value in chunk.state_dict().items() if isinstance(value, torch.Tensor)}
        assert set(sharded_model_state(built.chunks)["model"]) == tensors
        assert len(tensors) == 4 * 6 + 2 * 3 + 3  # per layer, per thinking layer, and around the layers


def test_a_state_with_a_tensor_too_few_or_too_many_is_not_taken() -> None:
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        from megatron_itt.checkpoint.state import load_model_state

        (chunk,) = built.chunks
        own = {name: value for name, value in chunk.state_dict().items() if isinstance(value, torch.Tensor)}
        load_model_state(built.chunks, {"model": own})
        name, value = next(iter(own.items()))
        for wrong in ({**own, "extra": value}, {key: own[key] for key in own if key != name}):
            with pytest.raises(AssertionError, match="state of another model"):
                load_model_state(built.chunks, {"model": wrong})

"""The table of router-logit quantiles: its sample, its accuracy and its moving average."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_itt.model.quantiles import pool_quantiles, summarise_sequences, update_quantiles
from megatron_itt.model.routing import NUM_QUANTILES, select_above, threshold_for
from megatron_itt.model.routing_control import RoutingRecorder
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

DECAY = 0.75


def quantiles_of_all(logits: torch.Tensor) -> torch.Tensor:
    """The table by torch.quantile of all logits at once."""
    levels = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64)
    return torch.quantile(logits.double().flatten(), levels).float()


@pytest.mark.parametrize("seq_length", [64, 256, 257])
def test_the_table_of_short_sequences_is_the_quantiles_of_all_tokens(seq_length: int) -> None:
    logits = torch.randn(seq_length, 12, generator=torch.Generator().manual_seed(0))
    table = pool_quantiles(summarise_sequences(logits))
    torch.testing.assert_close(table, quantiles_of_all(logits), rtol=0, atol=1e-4)  # positions in float32


@pytest.mark.parametrize("seq_length", [64, 256, 300, 1024, 4096])
@pytest.mark.parametrize("kind", ["alike", "shifted"])
def test_a_threshold_selects_its_capacity_of_tokens(seq_length: int, kind: str) -> None:
    """Extremes of a sequence must not weigh more than their token; that selected 0.0182 instead of 0.02."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(seq_length, 64, generator=generator)
    if kind == "shifted":  # sequences differ
        logits = logits + torch.randn(64, generator=generator)
    table = pool_quantiles(summarise_sequences(logits))
    for capacity in (0.02, 0.1, 0.5, 0.9, 0.98):
        above = select_above(logits, threshold_for(capacity, table)).float().mean()
        assert float(above) == pytest.approx(capacity, abs=1 / (NUM_QUANTILES - 1))  # resolution of the table


def test_the_first_batch_sets_the_table_and_later_ones_move_it() -> None:
    config = tiny_recipe(batch={"global": 4, "micro": 2})
    with built_model(config, dtype=torch.float32) as built:
        from megatron_itt.model.builder import forward_logits

        layers, expected = built.thinking_layers(), {}
        for batch in range(3):
            recorder = RoutingRecorder()
            built.control.recorder = recorder
            for microbatch in range(2):
                recorder.microbatch = microbatch
                forward_logits(built, random_tokens(config, seed=10 * batch + microbatch))
            update_quantiles(layers, recorder, group=dist.group.WORLD, decay=DECAY)
            for layer in layers:
                for step in (1, 2, 3):
                    entries = recorder.of_step(layer.layer_idx, step)
                    fresh = quantiles_of_all(torch.cat([entry.logits for entry in entries], dim=1))
                    before = expected.get((layer.layer_idx, step))
                    moved = fresh if before is None else DECAY * before + (1 - DECAY) * fresh
                    expected[layer.layer_idx, step] = moved
                    table = layer.thinking.logit_quantiles[step - 1]
                    torch.testing.assert_close(table, moved, rtol=1e-5, atol=1e-6)
    assert len(expected) == 2 * 3


def test_a_batch_that_skips_a_step_leaves_its_table() -> None:
    config = tiny_recipe()
    with built_model(config, dtype=torch.float32) as built:
        from megatron_itt.model.builder import forward_logits

        built.control.recorder = RoutingRecorder()
        forward_logits(built, random_tokens(config), thinking_budget=(0.5, 0.0, 0.5))
        update_quantiles(built.thinking_layers(), built.control.recorder, group=dist.group.WORLD, decay=DECAY)
        for layer in built.thinking_layers():
            assert [bool(row.any()) for row in layer.thinking.logit_quantiles] == [True, False, True]

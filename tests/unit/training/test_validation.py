"""Which rule of routing a validation follows, what padding changes, and whether thresholds keep up with training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.data.batches.loader import Batch
from megatron_itt.model.quantiles import summarise_sequences
from megatron_itt.training.step import averaging_decay, train_step, validation_loss
from megatron_itt.training.validation import validation_routing
from tests.helpers.one_rank import opened, random_tokens, tiny_recipe
from tests.helpers.random_weights import make_weights
from tests.helpers.reference import reference_forward


@pytest.mark.parametrize(
    ("rule", "thinking", "has_thresholds", "expected"),
    [
        ("threshold", {}, True, "threshold"),
        ("threshold", {}, False, None),
        ("as_trained", {}, True, None),
        ("threshold", {"routing": "topp"}, True, None),
        ("threshold", {"kind": "loop", "capacity": [1.0, 1.0, 1.0]}, True, None),
    ],
    ids=["top-k", "before training", "as trained", "top-p", "no routing"],
)
def test_thresholds_stand_for_top_k_once_there_are_any(
    rule: str, thinking: dict[str, Any], has_thresholds: bool, expected: str | None
) -> None:
    config = tiny_recipe(validation={"routing": rule}, thinking=thinking)
    assert validation_routing(config, has_thresholds=has_thresholds) == expected


def test_thresholds_follow_logits_that_move_early_in_a_run() -> None:
    """Logits that grow with the step: the share above an average's threshold stays near the one asked for."""
    average, plain = torch.zeros(()), torch.zeros(())
    for step in range(1, 201):
        median = torch.tensor(2.0 * math.sin(math.pi / 2 * step / 200))  # flattens out, as a learning rate does
        average = median if step == 1 else torch.lerp(median, average, averaging_decay(0.99, step))
        plain = median if step == 1 else torch.lerp(median, plain, 0.99)
    assert averaging_decay(0.99, 100_000) == 0.99
    shares = [float(torch.distributions.Normal(2.0, 1.0).cdf(value)) for value in (average, plain)]
    assert 0.5 - shares[0] < 0.02
    assert 0.5 - shares[1] > 0.2


LENGTHS = (24, 11)  # tokens of the two rows of a micro-batch; the second is a last sample, padded to 24
PADDED: list[dict[str, Any]] = [
    {},
    {"attend": "selected"},
    {"reweight": "symmetric"},
    {"skip": "literal"},
    {"capacity": [0.05, 1.0]},
    {"routing": "topp", "capacity": [0.9, 0.6]},
    {"routing": "topp", "capacity": [1.0, 0.6], "attend": "selected"},
    {"routing": "threshold"},
    {"routing": "none"},
]


def padded_batch(config: Any, *, padding: int = 0) -> Batch:
    """As megatron-core pads a last sample: any token, and a loss mask of zeros from the last real token on."""
    tokens = random_tokens(config)
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": torch.ones(2, 24),
        "position_ids": torch.arange(24).expand(2, 24),
    }
    batch["tokens"] = tokens.clone()
    batch["tokens"][1, LENGTHS[1] :] = padding
    batch["loss_mask"][0, -1] = 1.0
    batch["loss_mask"][1, LENGTHS[1] - 1 :] = 0.0
    return batch


def fill_model(trainer: Any, weights: dict[str, Any]) -> None:
    state = {name: torch.as_tensor(value) for name, value in weights.items()}
    trainer.built.chunks[0].load_state_dict(state, strict=False)


@pytest.mark.parametrize("switches", PADDED, ids=str)
def test_a_padded_sample_is_validated_as_if_it_ended_there(switches: dict[str, Any]) -> None:
    config = tiny_recipe(thinking=switches)
    weights = make_weights(config.model, config.thinking, seed=7)
    batch = padded_batch(config)
    with opened(config) as trainer:
        fill_model(trainer, weights)
        losses = {padding: validation_loss(trainer, [padded_batch(config, padding=padding)]) for padding in (0, 5, 63)}
        assert trainer.built.control.padding_mask is None
    total = 0.0
    for row, length in enumerate(LENGTHS):
        sequence = batch["tokens"][row, :length].tolist()
        logits = reference_forward(weights, config.model, config.thinking, sequence)["logits"]
        for place in range(int(batch["loss_mask"][row].sum())):
            exponentials = np.exp(logits[place] - logits[place].max())
            total -= math.log(exponentials[int(batch["labels"][row, place])] / exponentials.sum())
    # Float32 against float64; where padding competed, the loss moved by 1e-3 and more.
    assert losses[0] == pytest.approx(total / (24 + 10), rel=1e-6)
    assert set(losses.values()) == {losses[0]}


@pytest.mark.parametrize("switches", [{}, {"routing": "topp"}, {"routing": "threshold"}], ids=str)
def test_padding_is_in_no_record_of_routing(switches: dict[str, Any]) -> None:
    config = tiny_recipe(thinking=switches)
    lengths = torch.tensor(LENGTHS)
    with opened(config) as trainer:
        fill_model(trainer, make_weights(config.model, config.thinking, seed=8))
        for layer in trainer.built.thinking_layers():
            layer.thinking.logit_quantiles.zero_()  # as before the first step
        result = train_step(trainer, iter([padded_batch(config)] * 2), 1, log_routing=True)
        tables = {layer.layer_idx: layer.thinking.logit_quantiles for layer in trainer.built.thinking_layers()}
    real = torch.arange(24)[:, None] < lengths
    assert result.recorder is not None and result.recorder.records
    for (_, layer_idx, step), record in result.recorder.records.items():
        assert not bool(record.selected[~real].any())
        if config.thinking.routing == "topk":
            shares = config.thinking.nominal_capacity
            assert record.selected.sum(dim=0).tolist() == [math.floor(shares[step - 1] * n + 0.5) for n in LENGTHS]
        # Thresholds of the first batch are quantiles of its tokens: none is beyond what a token had.
        own = record.logits[real]
        assert own.min() <= tables[layer_idx][step - 1][0] and tables[layer_idx][step - 1][-1] <= own.max()


def test_a_padded_sequence_is_summed_up_by_its_tokens() -> None:
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    real = torch.arange(24)[:, None] < torch.tensor(LENGTHS)
    summary = summarise_sequences(logits.masked_fill(~real, 1e4), real)
    assert summary.shape == (2, 24)
    assert torch.allclose(summary[0], logits[:, 0].sort().values)
    alone = logits[: LENGTHS[1], 1]
    assert summary[1].min() >= alone.min() and summary[1].max() <= alone.max()
    assert float(summary[1].median()) == pytest.approx(float(alone.median()), abs=0.2)

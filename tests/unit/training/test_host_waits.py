"""How often a training step makes the host wait for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from megatron_itt.model import attention
from megatron_itt.training.routing_metrics import routing_entries
from megatron_itt.training.step import train_step
from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.steps import microbatches
from tests.helpers.waiting import WatchOperations

# The gradient norm, which decides whether weights change, and the step's statistics.
WAITS = ["aten::_local_scalar_dense", "cpu"]


@pytest.mark.parametrize("precision", [{"dtype": "fp32"}, {"dtype": "bf16"}], ids=str)
def test_a_training_step_waits_twice_and_a_logged_one_once_more(
    precision: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU without Triton: blocked attention reads its block limits from the data.
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: None)
    with opened(tiny_recipe(precision=precision)) as trainer:
        for step, log_routing in ((1, True), (2, False), (3, True)):  # the first one makes the optimizer's states
            batches = microbatches(trainer, step)
            on_host = [batch["loss_mask"] for batch in batches]
            for optimizer in trainer.optimizer.chained_optimizers:
                states = optimizer.optimizer.state.values()
                on_host += [state["step"] for state in states if isinstance(state.get("step"), Tensor)]
            with WatchOperations(on_host) as watch:
                result = train_step(trainer, iter(batches), step, log_routing=log_routing)
                if result.recorder is not None:
                    assert routing_entries(trainer, result.recorder, step)
            assert len(watch.shapes) > 300  # the watch did see the step
            assert step == 1 or watch.waiting == WAITS + ["cpu"] * log_routing

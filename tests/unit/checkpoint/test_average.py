"""The mean of checkpoints is a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_itt.checkpoint.average import average_checkpoints
from megatron_itt.checkpoint.compatibility import check_resumable
from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, read_run_state
from megatron_itt.errors import CheckpointError
from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.steps import microbatches

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three checkpoints, optimizer state included."""
    from megatron_itt.training.checkpointing import trainer_state
    from megatron_itt.training.step import train_step

    folder, config = tmp_path_factory.mktemp("run"), tiny_recipe()
    with opened(config) as trainer:
        for step in STEPS:
            train_step(trainer, iter(microbatches(trainer, step)), step)
            state = new_run_state(config, step=step, validation_loss=4.0)
            save_checkpoint(trainer_state(trainer, loading=False), state, folder / "checkpoints", keep_last=3)
    return folder


def weights_of(checkpoint: Path) -> dict[str, Any]:
    with load_model_for_inference(checkpoint) as (built, _, _):
        return {name: value.clone() for name, value in built.chunks[0].state_dict().items() if value is not None}


def test_an_average_holds_the_mean_of_weights_and_quantiles(run: Path, tmp_path: Path) -> None:
    parts = [weights_of(run / "checkpoints" / f"step_{step:07d}") for step in STEPS]
    for chosen, options in (((0, 1, 2), {"last": 3}), ((0, 2), {"steps": (1, 3)})):
        checkpoint = average_checkpoints(run, tmp_path / str(len(chosen)), **options)
        mean = weights_of(checkpoint)
        assert any(name.endswith("logit_quantiles") for name in mean)
        for name, value in mean.items():
            expected = torch.stack([parts[index][name].double() for index in chosen]).mean(dim=0)
            assert (value - expected).abs().max() <= 1e-6 * expected.abs().max(), name
        state = read_run_state(checkpoint)
        assert (state.step, state.averaged_steps, state.validation_loss) == (3, [STEPS[i] for i in chosen], None)
    with pytest.raises(CheckpointError, match=r"average of steps \[1, 3\].*checkpoint\.initial_weights"):
        check_resumable(state, tiny_recipe(), fingerprint_at=lambda _: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 4}, "--last is 4, but .* of steps 1, 2, 3; raise checkpoint.keep_last"),
        ({"steps": (1, 7)}, "--steps has 7, but .* of steps 1, 2, 3"),
        ({"last": 1}, "one checkpoint has no average"),
        ({}, "give either --last or --steps"),
    ],
)
def test_checkpoints_that_are_not_there_are_named(
    run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        average_checkpoints(run, tmp_path / "output", **options)
    assert not (tmp_path / "output").exists()


def test_an_output_that_holds_checkpoints_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        average_checkpoints(run, run, last=2)

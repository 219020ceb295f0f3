"""A trainer's checkpoints: from what a run continues, loading it, saving. Files and formats are in `checkpoint/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.checkpoint.compatibility import check_resumable
from megatron_itt.checkpoint.layout import checkpoint_root, find_latest
from megatron_itt.checkpoint.load import load_sharded_state
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import (
    RunState,
    load_model_state,
    new_run_state,
    read_run_state,
    sharded_model_state,
)
from megatron_itt.config.run import RunConfig
from megatron_itt.log import get_logger
from megatron_itt.training.assemble import Trainer
from megatron_itt.training.optimizer import load_optimizer_state, sharded_optimizer_state


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """A checkpoint that a run may continue from."""

    folder: Path
    state: RunState


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks at the same point."""

    def __init__(self, config: RunConfig, run_dir: Path, *, data_fingerprint: str, tokenizer_sha256: str) -> None:
        self._config = config
        self._root = checkpoint_root(run_dir)
        self._facts = {"data_fingerprint": data_fingerprint, "tokenizer_sha256": tokenizer_sha256}

    def find_resume_point(self) -> ResumePoint | None:
        """Where the run continues; None: it starts anew. CheckpointError when the recipe does not fit."""
        folder = find_latest(self._root)
        if folder is None:
            return None
        state = read_run_state(folder)
        check_resumable(state, self._config, data_fingerprint=self._facts["data_fingerprint"])
        return ResumePoint(folder=folder, state=state)

    def resume(self, trainer: Trainer, point: ResumePoint) -> None:
        """Bring a new trainer to the state of a checkpoint."""
        load_trainer(trainer, point.folder)
        get_logger().info("resumed from %s", point.folder)

    def save(
        self,
        trainer: Trainer,
        step: int,
        *,
        validation_loss: float | None = None,
        loop: dict[str, Any] | None = None,
    ) -> None:
        """Save after optimizer step `step`; `validation_loss` is that of this very step, if it was measured.

        `loop` is what the loop remembers from step to step, as plain data.
        """
        state = new_run_state(self._config, step=step, loop=loop or {}, **self._facts)
        keep_last = self._config.checkpoint.keep_last
        folder = save_checkpoint(trainer_state(trainer, loading=False), state, self._root, keep_last=keep_last)
        get_logger().info("saved %s", folder)

    def poll(self) -> None:
        """Between steps: publish a save that ended in the background. Raises what went wrong there."""

    def finish(self) -> None:
        """Before the run ends or stops: wait for saves in the background and publish them."""


def load_trainer(trainer: Trainer, checkpoint: Path) -> None:
    """Fill model, optimizer and schedule from a checkpoint written under any layout."""
    loaded = load_sharded_state(trainer_state(trainer, loading=True), checkpoint)
    load_model_state(trainer.built.chunks, loaded)
    load_optimizer_state(trainer.optimizer, loaded["optimizer"])
    trainer.schedule.load_state_dict(loaded["schedule"])


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Fill the model alone from a checkpoint written under any layout; optimizer and schedule stay at their start."""
    load_model_state(trainer.built.chunks, load_sharded_state(sharded_model_state(trainer.built.chunks), checkpoint))
    trainer.optimizer.reload_model_params()  # the float32 copies that bf16 training steps


def trainer_state(trainer: Trainer, *, loading: bool) -> dict[str, object]:
    """The sharded state of model, optimizer and schedule, to save or to be filled by a load."""
    model_state = sharded_model_state(trainer.built.chunks)
    optimizer_state = sharded_optimizer_state(trainer.optimizer, model_state, loading=loading)
    return {**model_state, "optimizer": optimizer_state, "schedule": trainer.schedule.state_dict()}

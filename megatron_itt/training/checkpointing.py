"""A trainer's checkpoints: from what a run continues, loading it, saving. Files and formats are in `checkpoint/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.checkpoint.compatibility import check_resumable
from megatron_itt.checkpoint.layout import checkpoint_root
from megatron_itt.checkpoint.load import load_sharded_state
from megatron_itt.checkpoint.random_states import KEY as RANDOM_STATES
from megatron_itt.checkpoint.random_states import restore_random_states, sharded_random_states
from megatron_itt.checkpoint.retention import Retention
from megatron_itt.checkpoint.save import CheckpointWriter
from megatron_itt.checkpoint.state import (
    RunState,
    load_model_state,
    new_run_state,
    read_run_state,
    sharded_model_state,
)
from megatron_itt.checkpoint.verify import find_intact
from megatron_itt.config.run import RunConfig
from megatron_itt.log import get_logger
from megatron_itt.training.assemble import Trainer
from megatron_itt.training.optimizer import load_optimizer_state, resume_schedule, sharded_optimizer_state


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """A checkpoint that a run may continue from."""

    folder: Path
    state: RunState


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks at the same point."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        fingerprint_at: Callable[[int], str],
        tokenizer_sha256: str,
        end_of_document: int | None = None,
        allow_changed: Sequence[str] = (),
    ) -> None:
        self._config, self._allow_changed = config, tuple(allow_changed)
        self._root = checkpoint_root(run_dir)
        self._fingerprint_at = fingerprint_at
        self._facts: dict[str, Any] = {
            "data_fingerprint": fingerprint_at(config.num_training_samples),
            "tokenizer_sha256": tokenizer_sha256,
            "end_of_document": end_of_document,
        }
        wanted = config.checkpoint
        retention = Retention(
            keep_last=wanted.keep_last, keep_every_steps=wanted.keep_every_steps, keep_best=wanted.keep_best
        )
        self._writer = CheckpointWriter(self._root, retention, asynchronous=wanted.asynchronous)

    def find_resume_point(self) -> ResumePoint | None:
        """Where the run continues: at its newest intact checkpoint; None: it starts anew.

        CheckpointError when the recipe does not fit, or when there are checkpoints and all are damaged.
        """
        self._writer.finish()
        folder = find_intact(self._root, contents=self._config.checkpoint.verify)
        if folder is None:
            return None
        state = read_run_state(folder)
        check_resumable(
            state,
            self._config,
            fingerprint_at=self._fingerprint_at,
            end_of_document=self._facts["end_of_document"],
            allow_changed=self._allow_changed,
        )
        return ResumePoint(folder=folder, state=state)

    def resume(self, trainer: Trainer, point: ResumePoint) -> None:
        """Bring a new trainer to the state of a checkpoint."""
        state, place = point.state, trainer.place
        fits = (
            state.world_size == place.world_size
            and state.device in (None, place.device.type)  # None: of a version that did not record it
            and state.config.parallel == self._config.parallel
        )
        load_trainer(trainer, point.folder, with_random_states=fits)
        get_logger().info("resumed from %s%s", point.folder, "" if fits else "; random states start anew from the seed")

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
        state = new_run_state(
            self._config,
            step=step,
            loop=loop or {},
            validation_loss=validation_loss,
            world_size=trainer.place.world_size,
            device=trainer.place.device.type,
            **self._facts,
        )
        self._writer.save(trainer_state(trainer, loading=False), state)

    def poll(self) -> None:
        """Between steps: publish a save that ended in the background. CheckpointError when it failed."""
        self._writer.poll()

    def finish(self) -> None:
        """Before the run ends or stops: wait for a background save and publish it. CheckpointError when it failed."""
        self._writer.finish()


def load_trainer(trainer: Trainer, checkpoint: Path, *, with_random_states: bool = False) -> None:
    """Fill model, optimizer and schedule from a checkpoint written under any layout; random states from one's own."""
    wanted = trainer_state(trainer, loading=True)
    if not with_random_states:
        del wanted[RANDOM_STATES]
    loaded = load_sharded_state(wanted, checkpoint)
    load_model_state(trainer.built.chunks, loaded)
    load_optimizer_state(trainer.optimizer, loaded["optimizer"])
    resume_schedule(trainer.schedule, loaded["schedule"])
    if with_random_states:
        restore_random_states(loaded[RANDOM_STATES])


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Fill the model alone from a checkpoint written under any layout; optimizer and schedule stay at their start."""
    load_model_state(trainer.built.chunks, load_sharded_state(sharded_model_state(trainer.built.chunks), checkpoint))
    trainer.optimizer.reload_model_params()  # the float32 copies that bf16 training steps


def trainer_state(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """The sharded state of model, optimizer, schedule and random generators, to save or to be filled by a load."""
    model_state = sharded_model_state(trainer.built.chunks)
    optimizer_state = sharded_optimizer_state(trainer.optimizer, model_state, loading=loading)
    return {
        **model_state,
        "optimizer": optimizer_state,
        "schedule": trainer.schedule.state_dict(),
        RANDOM_STATES: sharded_random_states(),
    }

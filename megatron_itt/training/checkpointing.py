"""Checkpoints of a trainer: resume point, load, save, and initial weights from another run or an imported model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_itt.checkpoint.branch import find_branch_point, record_branch
from megatron_itt.checkpoint.compatibility import check_resumable
from megatron_itt.checkpoint.integrity import Retention, prune
from megatron_itt.checkpoint.load import SafeShardedStrategy, check_together, find_intact, load_sharded_state
from megatron_itt.checkpoint.save import CheckpointWriter
from megatron_itt.checkpoint.state import (
    RANDOM_STATES,
    RunState,
    load_model_state,
    new_run_state,
    read_run_state,
    restore_random_states,
    sharded_model_state,
    sharded_random_states,
)
from megatron_itt.checkpoint.store import LocalStore, checkpoint_root, resolve_checkpoint
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import CheckpointError
from megatron_itt.log import get_logger
from megatron_itt.parallel.collectives import gather_objects, on_rank_zero
from megatron_itt.training.exports import BackgroundExports, Export
from megatron_itt.training.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_itt.training.trainer import Trainer


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
        export: Export | None = None,
    ) -> None:
        self._config, self._allow_changed = config, tuple(allow_changed)
        self._store = LocalStore(checkpoint_root(run_dir))
        self._fingerprint_at = fingerprint_at
        self._facts: dict[str, Any] = {
            "data_fingerprint": fingerprint_at(config.num_training_samples),
            "tokenizer_sha256": tokenizer_sha256,
            "end_of_document": end_of_document,
        }
        wanted = config.checkpoint
        retention = Retention(
            keep_last=wanted.keep_last,
            keep_every_steps=wanted.keep_every_steps,
            keep_steps=wanted.keep_steps,
            keep_best=wanted.keep_best,
        )
        self.exports = BackgroundExports(
            config, run_dir, export, release=lambda in_use: prune(self._store, retention, in_use=in_use)
        )
        self._writer = CheckpointWriter(
            self._store, retention, asynchronous=wanted.asynchronous, on_published=self.exports.add
        )

    def find_initial_weights(self) -> Path | None:
        """Return the checkpoint of `checkpoint.initial_weights`, if it is set. CheckpointError if there is none."""
        if self._config.checkpoint.initial_weights is None:
            return None
        try:
            folder = resolve_checkpoint(self._config.checkpoint.initial_weights)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.initial_weights: {error}") from None
        self._facts["source"] = read_run_state(folder).source
        return folder

    def find_resume_point(self) -> ResumePoint | None:
        """Return the newest intact checkpoint, at which the run continues, or None for a new run.

        CheckpointError when the recipe does not fit, or when there are checkpoints and all are damaged.
        """
        self._writer.finish()
        folder = find_intact(self._store, contents=self._config.checkpoint.verify)
        on_rank_zero(lambda: self.exports.recover(self._store.published()))
        return None if folder is None else self._checked(folder, self._allow_changed)

    def find_branch_point(self) -> ResumePoint | None:
        """Return the checkpoint that a new run branches from, if it is a branch. CheckpointError if it cannot."""
        folder = find_branch_point(self._config)
        if folder is None:
            return None
        check_together(folder, contents=self._config.checkpoint.verify)
        point = self._checked(folder, ("schedule", *self._allow_changed))
        on_rank_zero(lambda: record_branch(self._config, point.state.step))
        return point

    def _checked(self, folder: Path, allow_changed: Sequence[str]) -> ResumePoint:
        state = read_run_state(folder)
        check_resumable(
            state,
            self._config,
            fingerprint_at=self._fingerprint_at,
            end_of_document=self._facts["end_of_document"],
            allow_changed=allow_changed,
        )
        self._facts["source"] = state.source
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
        get_logger().info("resumed from %s%s", point.folder, "" if fits else "; random states restart from the seed")

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
        self.exports.poll()

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
    trainer.schedule.load_state_dict(loaded["schedule"])
    if with_random_states:
        restore_random_states(loaded[RANDOM_STATES])


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


# A plain model has no router and no step encoding; those of a thinking recipe then start as the recipe says.
OPTIONAL_PART = ".thinking."
NOT_WEIGHTS = ("optimizer", RANDOM_STATES)
SHOWN_TENSORS = 12

Shapes = dict[str, tuple[int, ...]]


def load_initial_weights(trainer: Trainer, folder: Path) -> list[str]:
    """Fill the model of a new trainer; every rank calls this. Returns the thinking tensors that the folder lacks.

    CheckpointError lists every tensor whose shape differs or that is missing.
    """
    chunks = trainer.built.chunks
    wanted = sharded_model_state(chunks)
    stored = _stored_shapes(folder)
    problems, fresh = _compare(_gather(_shapes_of(wanted)), stored)
    if problems:
        more = f" and {len(problems) - SHOWN_TENSORS} more" if len(problems) > SHOWN_TENSORS else ""
        raise CheckpointError(
            f"checkpoint.initial_weights is {folder}, whose weights do not fit this recipe: "
            f"{'; '.join(problems[:SHOWN_TENSORS])}{more}; make model and thinking in the recipe match"
        )
    absent = set(fresh)
    known = {
        part: {name: value for name, value in state.items() if _key(value) not in absent}
        for part, state in wanted.items()
    }
    loaded = load_sharded_state(known, folder)
    for chunk, name in zip(chunks, known, strict=True):  # a training checkpoint brings optimizer and schedule as well
        chunk.load_state_dict(loaded[name], strict=False)
    trainer.optimizer.reload_model_params()  # the float32 copies that bf16 training steps
    get_logger().info("weights of %s", folder)
    if fresh:
        get_logger().info("%d tensors start as the recipe says: %s", len(fresh), ", ".join(fresh[:SHOWN_TENSORS]))
    return fresh


def _key(value: Any) -> str:
    return str(getattr(value, "key", ""))


def _shapes_of(state: dict[str, Any]) -> Shapes:
    """Global shapes of the tensors of a sharded state, by their names on disk."""
    return {tensor.key: tuple(tensor.global_shape) for part in state.values() for tensor in _tensors(part.values())}


def _tensors(values: Any) -> Iterator[ShardedTensor]:
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            built = value.build()
            yield from _tensors(built.values() if isinstance(built, dict) else built)
        elif isinstance(value, ShardedTensor):
            yield value


def _stored_shapes(folder: Path) -> Shapes:
    try:
        metadata = dist_checkpointing.load_tensors_metadata(str(folder), SafeShardedStrategy())
    except Exception as error:  # whatever megatron-core or torch meets in a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint.initial_weights is {folder}, which cannot be read ({reason})") from None
    return {key: tuple(tensor.global_shape) for key, tensor in metadata.items() if not key.startswith(NOT_WEIGHTS)}


def _gather(shapes: Shapes) -> Shapes:
    """Those of all ranks: each holds a part of the model, and all must come to the same conclusion."""
    return {key: shape for part in gather_objects(shapes) for key, shape in part.items()}


def _compare(wanted: Shapes, stored: Shapes) -> tuple[list[str], list[str]]:
    """What does not fit, in words; and thinking tensors that a plain checkpoint lacks."""
    thinks = any(OPTIONAL_PART in key for key in stored)
    problems, fresh = [], []
    for key, shape in sorted(wanted.items()):
        if key in stored:
            if stored[key] != shape:
                problems.append(f"{key} is {list(stored[key])} there and {list(shape)} here")
        elif OPTIONAL_PART in key and not thinks:
            fresh.append(key)
        else:
            problems.append(f"{key} is missing there")
    problems += [f"{key} has no place here" for key in sorted(stored) if key not in wanted]
    return problems, fresh

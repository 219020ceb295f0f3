"""Averaged weights: the mean of several checkpoints of a run, as a checkpoint. One process, no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_itt.checkpoint.load import check_together, load_model_for_inference, load_sharded_state
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import load_model_state, sharded_model_state
from megatron_itt.checkpoint.store import checkpoint_root, list_checkpoints, resolve_checkpoint, step_of
from megatron_itt.errors import CheckpointError
from megatron_itt.log import get_logger


def average_checkpoints(
    run: str | Path, output: str | Path, *, last: int | None = None, steps: Sequence[int] = ()
) -> Path:
    """Write the mean weights of a run's `last` checkpoints, or of those of `steps`, into the run folder `output`.

    Router-logit quantiles are averaged as well. The result is float32, has no optimizer state, and is exported,
    evaluated and used for `checkpoint.initial_weights` like any other. Returns the checkpoint. CheckpointError when
    checkpoints are missing or damaged, or `output` holds some already.
    """
    folders = _choose(Path(run), last, steps)
    if checkpoint_root(output).exists():
        raise CheckpointError(f"{output} holds checkpoints already; choose another --output")
    with load_model_for_inference(folders[-1]) as (built, _, state):
        (chunk,) = built.chunks
        own: dict[str, Tensor] = {name: value for name, value in chunk.state_dict().items() if value is not None}
        mean = {name: value.clone() for name, value in own.items()}
        for count, folder in enumerate(reversed(folders[:-1]), start=2):
            check_together(folder)
            load_model_state(built.chunks, load_sharded_state(sharded_model_state(built.chunks), folder))
            for name, value in own.items():
                mean[name] += (value - mean[name]) / count
        for name, value in own.items():
            value.copy_(mean[name])
        averaged = replace(state, averaged_steps=[step_of(folder) for folder in folders], validation_loss=None, loop={})
        save_checkpoint(sharded_model_state(built.chunks), averaged, checkpoint_root(output), keep_last=1)
    get_logger().info("averaged steps %s", ", ".join(str(step) for step in averaged.averaged_steps))
    return resolve_checkpoint(output)


def _choose(run: Path, last: int | None, steps: Sequence[int]) -> list[Path]:
    """The checkpoints to average, oldest first."""
    found = {step_of(path): path for path in list_checkpoints(checkpoint_root(run))}
    there = f"{run} has checkpoints of steps {', '.join(map(str, found)) or 'none'}"
    if (last is None) == (not steps):
        raise CheckpointError(f"give either --last or --steps; {there}")
    if last is not None and len(found) < last:
        raise CheckpointError(f"--last is {last}, but {there}; raise checkpoint.keep_last, or average fewer")
    missing = sorted(set(steps) - set(found))
    if missing:
        raise CheckpointError(f"--steps has {missing[0]}, but {there}; checkpoint.keep_every_steps keeps more")
    chosen = sorted(set(steps)) or sorted(found)[-(last or 0) :]
    if len(chosen) < 2:
        raise CheckpointError(f"one checkpoint has no average; give two or more; {there}")
    return [found[step] for step in chosen]

"""Starting a run from the weights of a checkpoint: of another run, or of an imported Hugging Face folder.

Weights only: the run starts at step 0 with a new optimizer, its own data and its own schedule. The layouts of the two
jobs have nothing to do with each other. Resuming the run itself is `checkpointing.py`, and goes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_itt.checkpoint.layout import resolve_checkpoint
from megatron_itt.checkpoint.load import load_sharded_state
from megatron_itt.checkpoint.random_states import KEY as RANDOM_STATES
from megatron_itt.checkpoint.safe_read import SafeShardedStrategy
from megatron_itt.checkpoint.state import read_run_state, sharded_model_state
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import CheckpointError
from megatron_itt.log import get_logger
from megatron_itt.training.assemble import Trainer

# A plain model has no router and no step encoding; those of a thinking recipe then start as the recipe says.
OPTIONAL_PART = ".thinking."
NOT_WEIGHTS = ("optimizer", RANDOM_STATES)
SHOWN_TENSORS = 12

Shapes = dict[str, tuple[int, ...]]


def find_initial_weights(config: RunConfig) -> Path | None:
    """The checkpoint that `checkpoint.initial_weights` names, if it is set. CheckpointError if there is none."""
    if config.checkpoint.initial_weights is None:
        return None
    try:
        folder = resolve_checkpoint(config.checkpoint.initial_weights)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.initial_weights: {error}") from None
    read_run_state(folder)
    return folder


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
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, shapes)
    return {key: shape for part in parts for key, shape in part.items()}


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

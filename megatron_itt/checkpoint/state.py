"""Checkpoint contents besides the optimizer: `run_state.json`, model state, random states."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_itt import __version__
from megatron_itt.checkpoint.store import STATE_FILE
from megatron_itt.config import RunConfig, dump_config, parse_config
from megatron_itt.errors import CheckpointError

FORMAT_VERSION = 1
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """How far a run is, and what it reads. `recipe` is the resolved recipe as plain data.

    `loop` is what the training loop remembers from step to step; `validation_loss` was measured at this very step;
    the random states are those of `world_size` ranks under the recipe's layout, on devices of type `device`.
    """

    recipe: dict[str, Any]
    step: int
    consumed_samples: int
    consumed_tokens: int
    data_fingerprint: str | None = None
    tokenizer_sha256: str | None = None
    end_of_document: int | None = None  # the token id that ends the documents of the data
    loop: dict[str, Any] = field(default_factory=dict)
    validation_loss: float | None = None
    world_size: int | None = None
    device: str | None = None
    source: dict[str, Any] | None = None  # of an imported model: what its export keeps of the pretrained folder
    averaged_steps: list[int] = field(default_factory=list)  # of an average: the steps of its checkpoints
    project_version: str = __version__
    format_version: int = FORMAT_VERSION

    @property
    def config(self) -> RunConfig:
        """The recipe as a checked config."""
        return parse_config(self.recipe, source=STATE_FILE)


def new_run_state(config: RunConfig, *, step: int, **facts: Any) -> RunState:
    """State after `step` optimizer steps; consumed samples and tokens follow from the recipe."""
    return RunState(
        recipe=dump_config(config),
        step=step,
        consumed_samples=config.batch.samples_after(step),
        consumed_tokens=config.tokens_after(step),
        **facts,
    )


def write_run_state(state: RunState, checkpoint: Path) -> None:
    """Write `run_state.json` into a checkpoint folder."""
    text = json.dumps(dataclasses.asdict(state), indent=2) + "\n"
    (checkpoint / STATE_FILE).write_text(text, encoding="utf-8")


def read_run_state(checkpoint: Path) -> RunState:
    """Read `run_state.json`; CheckpointError when it is missing, damaged, or of another format."""
    path = checkpoint / STATE_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(RunState)}
        state = RunState(**{key: value for key, value in data.items() if key in known})
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {checkpoint} is not a complete checkpoint") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use an earlier checkpoint") from None
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {state.format_version}, this version reads {FORMAT_VERSION}; use the version "
            f"of the project that wrote it ({state.project_version})"
        )
    return state


def sharded_model_state(chunks: list[GPTModel]) -> dict[str, Any]:
    """megatron-core's sharded state of the model chunks; keys are global names, so any layout loads any other."""
    if len(chunks) == 1:
        return {"model": _sharded_state(chunks[0])}
    return {f"model{position}": _sharded_state(chunk) for position, chunk in enumerate(chunks)}


def load_model_state(chunks: list[GPTModel], state: dict[str, Any]) -> None:
    """Copy loaded tensors into the model chunks."""
    for position, chunk in enumerate(chunks):
        own = state["model" if len(chunks) == 1 else f"model{position}"]
        found = chunk.load_state_dict(own, strict=False)
        missing = [key for key in found.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not missing and not found.unexpected_keys, f"state of another model: {missing}, {found.unexpected_keys}"


def _sharded_state(chunk: GPTModel) -> dict[str, Any]:
    """Tensors alone, so that checkpoints are the same whatever the layers are made of.

    Extra states are empty for native parts; TransformerEngine keeps fp8 scales there, which no recipe uses.
    """
    return {key: value for key, value in chunk.sharded_state_dict().items() if not key.endswith(_EXTRA_STATE)}


RANDOM_STATES = "random_states"


def sharded_random_states() -> dict[str, Any]:
    """This rank's states; row `rank` of tensors [world size, n]. To be saved, or to be filled by a load."""
    rows = (0, dist.get_rank(), dist.get_world_size())
    states = _capture()
    return {
        name: ShardedTensor.from_rank_offsets(f"{RANDOM_STATES}.{name}", state.reshape(1, -1), rows)
        for name, state in states.items()
    }


def restore_random_states(loaded: dict[str, Any]) -> None:
    """Continue all generators of this rank where `sharded_random_states` found them."""
    states = {name: row.reshape(-1) for name, row in loaded.items()}
    python, numpy = states["python"].tolist(), states["numpy"]
    gauss = _to_float(python[-1]) if python[-2] else None
    random.setstate((3, tuple(python[:-2]), gauss))
    key, position, has_gauss = numpy[:-3].numpy().astype(np.uint32), int(numpy[-3]), int(numpy[-2])
    np.random.set_state(("MT19937", key, position, has_gauss, _to_float(int(numpy[-1]))))
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])  # after the device's: on a CPU both are one
    prefix = "tracker_"
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _capture() -> dict[str, Tensor]:
    _, python, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    _, key, position, has_gauss, cached = numpy
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "python": torch.tensor([*python, int(gauss is not None), _to_int(gauss or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor([*key.tolist(), position, has_gauss, _to_int(cached)], dtype=torch.int64),
        "torch": torch.get_rng_state().clone(),
        "device": torch.cuda.get_rng_state().clone(),
        **{f"tracker_{name}": state.clone() for name, state in tracked.items()},
    }


def _to_int(value: float) -> int:
    """The bits of a float64 as an int64."""
    return int(np.float64(value).view(np.int64))


def _to_float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))

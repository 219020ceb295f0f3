"""What a checkpoint says about its run beside the weights (`run_state.json`), and the sharded state of the model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_itt import __version__
from megatron_itt.checkpoint.layout import STATE_FILE
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
        consumed_samples=step * config.batch.global_size,
        consumed_tokens=step * config.tokens_per_step,
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

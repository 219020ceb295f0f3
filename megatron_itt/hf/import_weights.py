"""Import of a Hugging Face folder as a megatron-core checkpoint: an export, or a LLaMA as a warm start.

Only safetensors are read. A LLaMA has no router and no step encoding; those are initialised as the recipe says, so that
with one thinking step, or with `thinking.step_init: 0`, the logits are those of the LLaMA.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.checkpoint.load import single_process_config
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.checkpoint.store import checkpoint_root, resolve_checkpoint
from megatron_itt.config import RunConfig, ThinkingConfig
from megatron_itt.config.environment import single_process
from megatron_itt.config.switches import field_names
from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import FIXED_FIELDS, SHAPE_FIELDS, model_settings
from megatron_itt.hf.load import read_weights
from megatron_itt.hf.weight_map import hf_to_megatron
from megatron_itt.model.builder import build_model
from megatron_itt.parallel.groups import start_parallel, stop_parallel

NOT_COMPARED = ("max_position_embeddings", "initializer_range", "rope_theta")  # free, or compared in another way
# Recipe keys of attributes that have another name in a recipe.
RECIPE_KEYS = {"num_key_value_heads": "num_query_groups", "head_size": "hidden_size / model.num_attention_heads"}


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """The written checkpoint; `fresh`: tensors that the folder lacks, initialised as the recipe says.

    changed: switches of `thinking` that change what the weights compute, and differ from the folder's.
    """

    checkpoint: Path
    fresh: list[str]
    changed: list[str]


def import_folder(folder: str | Path, config: RunConfig, output: str | Path) -> ImportReport:
    """Write a checkpoint of step 0 under `output`/checkpoints with the weights of a Hugging Face folder.

    One process, no GPU. ExportError if the folder's shape differs from the recipe's (every difference is named), if a
    tensor is not in the table, if weights are damaged or pickled, or if `output` holds a checkpoint already.
    """
    folder, output = Path(folder), Path(output)
    if checkpoint_root(output).exists():
        raise ExportError(f"{output} holds checkpoints already; choose another --output.")
    hf_config = _read_config(folder)
    changed = _compare_config(hf_config, config)
    state = hf_to_megatron(read_weights(folder), config.model)
    single = single_process_config(config)
    parallel_place = start_parallel(single, process=single_process())
    try:
        built = build_model(single, dtype=torch.float32, device=parallel_place.device)
        fresh = _fill(built.chunks[0], state)
        run_state = new_run_state(config, step=0)
        save_checkpoint(sharded_model_state(built.chunks), run_state, checkpoint_root(output), keep_last=1)
    finally:
        stop_parallel()
    return ImportReport(checkpoint=resolve_checkpoint(output), fresh=fresh, changed=changed)


def _fill(model: torch.nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load mapped tensors and return the names of the thinking tensors that are not among them."""
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wrong = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    fresh = sorted(set(expected) - set(state))
    lacking = [name for name in fresh if ".thinking." not in name]
    if wrong or lacking:
        raise ExportError(
            f"the folder's tensors do not fit the recipe: wrong or unexpected {sorted(wrong)[:12]}, missing "
            f"{lacking[:12]}. Check model and thinking in the recipe."
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    return fresh


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}/config.json cannot be read ({error}); name a Hugging Face model folder.") from None


def _compare_config(hf: dict[str, Any], config: RunConfig) -> list[str]:
    """Return the differing switches of `thinking`. ExportError names every difference of shape; absent fields pass."""
    wanted = model_settings(config.model, config.thinking)
    problems = [
        f"model.{RECIPE_KEYS.get(attribute, attribute)} is {wanted[key]} but {key} is {hf[key]}"
        for key, attribute in SHAPE_FIELDS.items()
        if key not in NOT_COMPARED and hf.get(key) is not None and hf[key] != wanted[key]
    ]
    rope = hf.get("rope_parameters") or {}
    rope_theta = hf.get("rope_theta", rope.get("rope_theta"))
    if rope_theta is not None and float(rope_theta) != float(config.model.rope_base):
        problems.append(f"model.rope_base is {config.model.rope_base} but rope_theta is {rope_theta}")
    scaling = hf.get("rope_scaling") or rope
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type != "default":
        problems.append(f"rope scaling {rope_type!r} is not supported")
    for key, value in FIXED_FIELDS.items():
        if key != "attention_dropout" and hf.get(key) not in (None, value):
            problems.append(f"{key} is {hf[key]!r}, which is not supported")
    if problems:
        raise ExportError(f"the folder does not fit the recipe: {'; '.join(problems)}. Change the recipe to match.")
    before, after = hf.get("thinking") or {}, wanted.get("thinking", {})
    compared = [key for key in before if key not in field_names(ThinkingConfig, "free_on_resume")]
    return [
        f"thinking.{key} is {after[key]!r} and was {before[key]!r}"
        for key in compared
        if key in after and before[key] != after[key]
    ]

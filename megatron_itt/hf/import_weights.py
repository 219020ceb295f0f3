"""From a Hugging Face folder to a megatron-core checkpoint: an ITT export back again, or a LLaMA as a warm start.

Only safetensors are read. A LLaMA brings no router and no step encoding; those start as the recipe says, so that with
one thinking step, or with `thinking.step_init: 0`, the warm-started model gives the LLaMA's logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.checkpoint.layout import checkpoint_root, resolve_checkpoint
from megatron_itt.checkpoint.load import single_process_config
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.config import RunConfig
from megatron_itt.config.environment import single_process
from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import model_settings
from megatron_itt.hf.weight_map import hf_to_megatron
from megatron_itt.hf.weights_file import read_weights
from megatron_itt.model.builder import build_model
from megatron_itt.parallel.groups import start_parallel, stop_parallel

# config.json key -> recipe key. What is absent in config.json is not compared.
SHAPE_KEYS = {
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups",
    "head_dim": "model.hidden_size / model.num_attention_heads",
    "vocab_size": "model.vocab_size",
    "rms_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tie_embeddings",
}
# What a LLaMA may have and our layers do not.
UNSUPPORTED = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)}
OPTIONAL_PART = ".thinking."


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Where the checkpoint is, and which tensors started as the recipe says because the folder had none."""

    checkpoint: Path
    fresh: list[str]


def import_folder(folder: str | Path, config: RunConfig, output: str | Path) -> ImportReport:
    """Write a checkpoint of step 0 under `output`/checkpoints with the weights of a Hugging Face folder.

    One process, no GPU. ExportError when the folder's shape differs from the recipe's (every difference is named), a
    tensor has no place, weights are damaged or pickled, or `output` holds a checkpoint already.
    """
    folder, output = Path(folder), Path(output)
    if checkpoint_root(output).exists():
        raise ExportError(f"{output} holds checkpoints already; choose another --output.")
    _check_shape(_read_config(folder), config)
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
    return ImportReport(checkpoint=resolve_checkpoint(output), fresh=fresh)


def _fill(model: torch.nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load mapped tensors; returns the thinking tensors that were not among them."""
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wrong = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    fresh = sorted(set(expected) - set(state))
    lacking = [name for name in fresh if OPTIONAL_PART not in name]
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


def _rope_base(hf: dict[str, Any]) -> float | None:
    parameters = hf.get("rope_parameters") or {}
    return hf.get("rope_theta", parameters.get("rope_theta"))


def _check_shape(hf: dict[str, Any], config: RunConfig) -> None:
    """Name every setting in which the folder and the recipe differ, or that our layers do not have."""
    wanted = model_settings(config.model, config.thinking)
    problems = [
        f"{recipe_key} is {wanted[key]} but {key} is {hf[key]}"
        for key, recipe_key in SHAPE_KEYS.items()
        if hf.get(key) is not None and hf[key] != wanted[key]
    ]
    if _rope_base(hf) is not None and float(_rope_base(hf) or 0) != float(config.model.rope_base):
        problems.append(f"model.rope_base is {config.model.rope_base} but rope_theta is {_rope_base(hf)}")
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        problems.append(f"rope scaling {kind!r} is not supported")
    problems += [
        f"{key} is {hf[key]!r}, which is not supported" for key, fine in UNSUPPORTED.items() if hf.get(key) not in fine
    ]
    if problems:
        raise ExportError(f"the folder does not fit the recipe: {'; '.join(problems)}. Change the recipe to match.")

"""Import of a Hugging Face folder as a megatron-core checkpoint: an export, or a pretrained model that learns to think.

Only safetensors are read. A pretrained model has no router and no step encoding. `--start identity` sets the step
encodings of the routed steps to 0, so that the logits are the source's for every budget; the gradient reaches them,
and after one update the routers too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from megatron_itt.config.load import config_to_yaml, load_config
from megatron_itt.config.switches import exported_thinking, field_names
from megatron_itt.data.text.tokenizer import check_vocabulary, load_tokenizer
from megatron_itt.errors import ConfigError, ExportError
from megatron_itt.hf.calibration import calibrate
from megatron_itt.hf.families import find_differences, model_section, read_source_config
from megatron_itt.hf.folder import read_source
from megatron_itt.hf.load import read_weights
from megatron_itt.hf.options import ImportOptions
from megatron_itt.hf.weight_map import hf_to_megatron, refuse_mismatch
from megatron_itt.model.builder import build_model
from megatron_itt.parallel.groups import start_parallel, stop_parallel

STEPS = 1000  # of the written recipe, which the user changes


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """The written checkpoint; `fresh`: tensors that the folder lacks, initialised as the recipe says.

    changed: switches of `thinking` that change what the weights compute, and differ from the folder's; calibrated: the
    text behind the quantiles of router logits, None without new ones; recipe: written without a recipe of the caller.
    """

    checkpoint: Path
    fresh: list[str]
    changed: list[str]
    calibrated: str | None = None
    recipe: Path | None = None


def import_model(
    folder: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Iterable[str] = (),
    options: ImportOptions | None = None,
) -> ImportReport:
    """Import with the shape of the folder's config.json and the thinking steps of `options`.

    Keys of `recipe` and `overrides` have the last word. Without a recipe `output`/recipe.yaml is written.
    """
    folder, output, options = Path(folder), Path(output), options or ImportOptions()
    path = output / "recipe.yaml"
    if recipe is None and path.exists():
        raise ExportError(f"{path} exists already; choose another --output, or import with --recipe {path}.")
    config = retrofit_config(folder, output, recipe=recipe, overrides=overrides, options=options)
    report = import_folder(folder, config, output, options=options)
    if recipe is not None:
        return report
    path.write_text(config_to_yaml(config), encoding="utf-8")
    return replace(report, recipe=path)


def retrofit_config(
    folder: Path, output: Path, *, recipe: str | Path | None, overrides: Iterable[str], options: ImportOptions
) -> RunConfig:
    """Return the recipe of an import: the folder's shape and the options, then `recipe`, then `overrides`."""
    options.refuse_idle()
    hf, overrides = read_source_config(folder), list(overrides)
    length = next((text.partition("=")[2] for text in overrides if text.startswith("model.seq_length=")), None)
    section = model_section(hf, int(length) if length and length.isdigit() else None)
    below: dict[str, Any] = {"model": section}
    if recipe is None:
        below |= {"schedule": {"steps": STEPS}, "logging": {"run_dir": str(output)}}
    given_tokenizer = recipe is not None or any(text.startswith("data.tokenizer=") for text in overrides)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        below["data"] = {"tokenizer": str(folder.resolve())}
    elif not given_tokenizer and hf["model_type"] != "itt":
        raise ExportError(f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model); add data.tokenizer=DIR.")
    thinks = hf["model_type"] == "itt" and hf["thinking"]["kind"] != "none"
    if options.think is not None and thinks:
        raise ExportError(f"--think is {options.think}, but the model in {folder} thinks already; leave it out.")
    if thinks and recipe is None:
        below["thinking"] = dict(hf["thinking"])
    elif options.think is not None:
        below["thinking"] = options.thinking(section["num_layers"])
    config = load_config(recipe, overrides, below=below)
    _refuse_start(config.thinking, options)
    if config.data.tokenizer is not None and (recipe is None or config.data.tokenizer == str(folder.resolve())):
        check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
    return config


def _refuse_start(thinking: ThinkingConfig, options: ImportOptions) -> None:
    """ConfigError where --start identity cannot preserve the function of the source."""
    if options.think is None or options.start != "identity":
        return
    preserving = {"kind": "itt", "residual": "accumulate", "step_encoding": True, "reweight": "selected"}
    for key, value in preserving.items():
        if getattr(thinking, key) != value:
            raise ConfigError(
                f"thinking.{key} is {getattr(thinking, key)}, with which the added steps change the logits from the "
                f"start; set it to {str(value).lower()}, or use --start scaled=0.1"
            )


def import_folder(
    folder: str | Path, config: RunConfig, output: str | Path, *, options: ImportOptions | None = None
) -> ImportReport:
    """Write a checkpoint of step 0 under `output`/checkpoints with the weights of a Hugging Face folder.

    One process, no GPU. ExportError if the folder's shape differs from the recipe's (every difference is named), if a
    tensor is not in the table, if weights are damaged or pickled, or if `output` holds a checkpoint already.
    """
    folder, output, options = Path(folder), Path(output), options or ImportOptions()
    if checkpoint_root(output).exists():
        raise ExportError(f"{output} holds checkpoints already; choose another --output.")
    hf = read_source_config(folder)
    if problems := find_differences(model_section(hf, config.model.seq_length), config.model):
        raise ExportError(f"the folder does not fit the recipe: {'; '.join(problems)}. Change the recipe to match.")
    weights = read_weights(folder)
    source = read_source(folder, hf, weights)
    state = hf_to_megatron(weights, config.model)
    del weights
    single = single_process_config(config)
    parallel_place = start_parallel(single, process=single_process())
    calibrated = None
    try:
        built = build_model(single, dtype=torch.float32, device=parallel_place.device)
        fresh = _fill(built.chunks[0], state)
        del state
        if any(name.endswith("logit_quantiles") for name in fresh):
            calibrated = calibrate(built, folder, config, options.calibrate)
        elif options.calibrate != ImportOptions.calibrate:
            raise ConfigError(f"--calibrate is {options.calibrate}, but no new layer has thresholds; leave it out")
        run_state = new_run_state(config, step=0, source=source)
        save_checkpoint(sharded_model_state(built.chunks), run_state, checkpoint_root(output), keep_last=1)
    finally:
        stop_parallel()
    return ImportReport(
        checkpoint=resolve_checkpoint(output), fresh=fresh, changed=_changed(hf, config), calibrated=calibrated
    )


def _fill(model: torch.nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load mapped tensors and return the names of the thinking tensors that are not among them."""
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    fresh = sorted(set(expected) - set(state))
    refuse_mismatch(
        "megatron-core",
        unknown=set(state) - set(expected),
        missing=[name for name in fresh if ".thinking." not in name],
        misshapen=[name for name in state if name in expected and state[name].shape != expected[name].shape],
    )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    return fresh


def _changed(hf: dict[str, Any], config: RunConfig) -> list[str]:
    """Switches of `thinking` that differ from the folder's and change what its weights compute."""
    before = hf["thinking"] if hf["model_type"] == "itt" else {}
    after = {} if config.thinking.kind == "none" else exported_thinking(config.thinking, config.model.num_layers)
    compared = [key for key in before if key not in field_names(ThinkingConfig, "free_on_resume")]
    return [
        f"thinking.{key} is {after[key]!r} and was {before[key]!r}"
        for key in compared
        if key in after and before[key] != after[key]
    ]

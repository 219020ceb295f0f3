"""From a training checkpoint to a Hugging Face folder, checked against the training model before it appears."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.checkpoint.state import RunState
from megatron_itt.config.run import RunConfig
from megatron_itt.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_itt.data.text.tokenizer_folder import check_tokenizer_folder, load_with_transformers
from megatron_itt.errors import ExportError
from megatron_itt.hf.folder import (
    copy_tokenizer,
    model_settings,
    special_token_ids,
    write_configs,
)
from megatron_itt.hf.model_card import CardFacts, render_card
from megatron_itt.hf.options import ExportOptions
from megatron_itt.hf.parity import ParityResult, build_hf_model, check_parity
from megatron_itt.hf.weight_map import megatron_to_hf
from megatron_itt.hf.weights_file import FLOAT32_SUFFIX, cast_weights, read_weights, write_weights
from megatron_itt.model.builder import BuiltModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how closely it follows the checkpoint (None: not checked)."""

    folder: Path
    step: int
    num_parameters: int
    weight_files: list[str]
    parity: ParityResult | None


def export_checkpoint(checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None) -> ExportReport:
    """Write the folder `output` for a checkpoint (or the newest of a run folder); one process, no GPU.

    The folder appears complete or not at all. ExportError when it exists, when a tensor has no place, when the
    tokenizer is missing or too large, or when the logits differ from the training model's.
    """
    options = options or ExportOptions()
    output = Path(output)
    if options.dtype not in DTYPES:
        raise ExportError(f"dtype is {options.dtype!r}; use one of {sorted(DTYPES)}.")
    if output.exists():
        raise ExportError(f"{output} exists already; choose another --output or remove it.")
    with load_model_for_inference(checkpoint, dtype=torch.float32) as (built, config, run_state):
        return _export(built, config, run_state, output, options)


def _export(
    built: BuiltModel, config: RunConfig, run_state: RunState, output: Path, options: ExportOptions
) -> ExportReport:
    state = megatron_to_hf(_tensors(built.chunks[0].state_dict()), config.model)
    settings = model_settings(config.model, config.thinking)
    special_tokens: dict[str, Any] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        tokenizer = _add_tokenizer(staging, config, run_state, options)
        if tokenizer is not None:
            settings["tokenizer_sha256"] = load_tokenizer(staging).sha256  # evaluation refuses another in its place
            special_tokens = special_token_ids(load_with_transformers(staging), config.model.vocab_size)
        write_configs(staging, settings, dtype=options.dtype, special_tokens=special_tokens)
        exported_tokenizer = None if tokenizer is None else check_tokenizer_folder(tokenizer, staging)
        parity = None
        if options.check:
            parity = check_parity(built, build_hf_model(settings, state), config, exported_tokenizer)
        files = _write_weights(staging, state, options)
        facts = _card_facts(state, run_state, options.dtype, parity)
        (staging / "README.md").write_text(render_card(settings, facts), encoding="utf-8")
        staging.chmod(0o755)
        staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportReport(
        folder=output, step=run_state.step, num_parameters=facts.num_parameters, weight_files=files, parity=parity
    )


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a state dict, without megatron-core's empty bookkeeping entries."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _add_tokenizer(folder: Path, config: RunConfig, run_state: RunState, options: ExportOptions) -> Tokenizer | None:
    """Write the tokenizer of the data into the folder; None if none is wanted."""
    if not options.with_tokenizer:
        return None
    source = options.tokenizer or config.data.tokenizer
    if source is None:
        raise ExportError(
            "the recipe has no data.tokenizer; pass --tokenizer DIR, or --no-tokenizer to do without one."
        )
    if options.tokenizer is None and ("/" in source or source.startswith(".")) and not Path(source).exists():
        raise ExportError(f"data.tokenizer of the recipe is {source}, which is not there; pass --tokenizer DIR.")
    tokenizer = copy_tokenizer(source, folder, eod=run_state.end_of_document)
    trained_with = run_state.tokenizer_sha256
    if trained_with is not None and tokenizer.sha256 != trained_with:
        raise ExportError(
            f"tokenizer {source} is not the one that the model was trained with ({trained_with[:12]}); pass that one "
            "with --tokenizer, or --no-tokenizer to export without one."
        )
    return tokenizer


def _write_weights(folder: Path, state: dict[str, Tensor], options: ExportOptions) -> list[str]:
    weights = cast_weights(state, DTYPES[options.dtype])
    files = write_weights(folder, weights, max_shard_bytes=options.max_shard_bytes)
    if options.check:
        _verify_files(folder, weights)
    return files


def _card_facts(state: dict[str, Tensor], run_state: RunState, dtype: str, parity: ParityResult | None) -> CardFacts:
    return CardFacts(
        recipe=Path(run_state.config.logging.run_dir).name,
        step=run_state.step,
        consumed_tokens=run_state.consumed_tokens,
        data_fingerprint=run_state.data_fingerprint,
        num_parameters=sum(tensor.numel() for name, tensor in state.items() if not name.endswith(FLOAT32_SUFFIX)),
        dtype=dtype,
        parity="not checked" if parity is None else f"logits within {parity.max_relative_difference:.1e} (float32)",
    )


def _verify_files(folder: Path, weights: dict[str, Tensor]) -> None:
    """Read the weights back; ExportError unless every bit is as written."""
    stored = read_weights(folder)
    wrong = sorted(
        name
        for name in stored.keys() | weights.keys()
        if name not in stored or name not in weights or not torch.equal(stored[name], weights[name])
    )
    if wrong:
        raise ExportError(f"tensors read back differently than written: {', '.join(wrong[:12])}; check the disk.")

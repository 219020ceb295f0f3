"""Export of a training checkpoint to a Hugging Face folder, checked against the training model before it appears."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_itt.checkpoint.load import load_model_for_inference
from megatron_itt.checkpoint.state import RunState
from megatron_itt.config.run import RunConfig
from megatron_itt.data.text.tokenizer import NO_TOKEN, Tokenizer, check_vocabulary, load_tokenizer
from megatron_itt.data.text.tokenizer_folder import (
    check_tokenizer_folder,
    with_end_of_document,
    write_tokenizer_folder,
)
from megatron_itt.errors import DataError, ExportError
from megatron_itt.files import publishing
from megatron_itt.hf.folder import (
    FLOAT32_SUFFIX,
    SPECIAL_TOKENS,
    keep_special_tokens,
    model_settings,
    write_configs,
    write_weights,
)
from megatron_itt.hf.load import register_auto_classes
from megatron_itt.hf.model_card import render_card
from megatron_itt.hf.options import ExportOptions
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM
from megatron_itt.hf.weight_map import megatron_to_hf
from megatron_itt.model.builder import BuiltModel, forward_logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1.0e-4
# Top-k compares logits: where the models differ in the last bits, a tie can select another token, which then differs
# visibly. A real fault changes almost every token.
TIED_TOKENS = 0.02
PASSAGE = (
    "Some questions are answered at once, others deserve a second look. A reader who meets an easy word moves on; "
    "at a hard one the eye returns, and the sentence is read again until it makes sense.\n"
)


@dataclass(frozen=True)
class ParityResult:
    """Largest difference of logits relative to the largest logit, and the compared cases."""

    max_relative_difference: float
    cases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The written folder; `parity` is None if it was not checked."""

    folder: Path
    step: int
    num_parameters: int
    dtype: str
    weight_files: list[str]
    parity: ParityResult | None


def export_checkpoint(checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None) -> ExportReport:
    """Write the folder `output` for a checkpoint (or the newest of a run folder); one process, no GPU.

    The folder appears complete or not at all. ExportError if it exists, if a tensor is not in the table, if the
    tokenizer is missing or too large, or if the logits differ from the training model's.
    """
    options, output = options or ExportOptions(), Path(output)
    if options.dtype not in ("auto", *DTYPES):
        raise ExportError(f"dtype is {options.dtype!r}; use one of {['auto', *sorted(DTYPES)]}.")
    if output.exists():
        raise ExportError(f"{output} exists already; choose another --output or remove it.")
    register_auto_classes()  # AutoTokenizer reads config.json too
    with (
        load_model_for_inference(checkpoint, dtype=torch.float32) as (built, config, run_state),
        publishing(output) as staging,
    ):
        report = _write_folder(staging, built, config, run_state, options=options)
    return replace(report, folder=output)


def _write_folder(
    folder: Path, built: BuiltModel, config: RunConfig, run_state: RunState, *, options: ExportOptions
) -> ExportReport:
    state = megatron_to_hf(
        {name: value for name, value in built.chunks[0].state_dict().items() if isinstance(value, Tensor)}, config.model
    )
    source = run_state.source or {}
    dtype = source.get("dtype") if options.dtype == "auto" else options.dtype
    dtype = dtype if dtype in DTYPES else "float32"
    settings = model_settings(config.model, config.thinking)
    settings["max_position_embeddings"] = max(config.model.seq_length, source.get("max_position_embeddings", 0))
    tokenizer = _add_tokenizer(folder, config, run_state, options)
    special_tokens: dict[str, Any] = {}
    if tokenizer is not None:
        settings["tokenizer_sha256"] = load_tokenizer(folder).sha256  # evaluation accepts no other tokenizer
        ids = zip(SPECIAL_TOKENS, (tokenizer.bos, tokenizer.eod, tokenizer.pad), strict=True)
        special_tokens = {name: token for name, token in ids if token != NO_TOKEN}
    special_tokens, generation = keep_special_tokens(source, special_tokens)
    write_configs(folder, settings, dtype=dtype, special_tokens=special_tokens, generation=generation)
    hf_tokenizer = None if tokenizer is None else check_tokenizer_folder(tokenizer, folder)
    parity = check_parity(built, build_hf_model(settings, state), config, hf_tokenizer) if options.check else None
    types = {name: torch.float32 if name.endswith(FLOAT32_SUFFIX) else DTYPES[dtype] for name in state}
    weights = {name: tensor.detach().to(types[name]).contiguous() for name, tensor in state.items()}
    files = write_weights(folder, weights, max_shard_bytes=options.max_shard_bytes, verify=options.check)
    num_parameters = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(FLOAT32_SUFFIX))
    fingerprint = run_state.data_fingerprint
    facts = {
        "recipe": f"`{Path(run_state.config.logging.run_dir).name}`",
        "training": f"{run_state.step:,} steps, {run_state.consumed_tokens:,} tokens",
        "data fingerprint": f"`{fingerprint}`" if fingerprint else "not recorded",
        "weights": f"{dtype}, safetensors",
        "parity with the training model": "not checked"
        if parity is None
        else f"logits within {parity.max_relative_difference:.1e} (float32)",
    }
    (folder / "README.md").write_text(render_card(settings, num_parameters, facts), encoding="utf-8")
    return ExportReport(
        folder=folder,
        step=run_state.step,
        num_parameters=num_parameters,
        dtype=dtype,
        weight_files=files,
        parity=parity,
    )


def _add_tokenizer(folder: Path, config: RunConfig, run_state: RunState, options: ExportOptions) -> Tokenizer | None:
    """Write the tokenizer so that AutoTokenizer encodes and ends as the training data; None if none is wanted."""
    if not options.with_tokenizer:
        return None
    source = options.tokenizer or config.data.tokenizer
    if source is None:
        raise ExportError(
            "the recipe has no data.tokenizer; pass --tokenizer DIR, or --no-tokenizer to do without one."
        )
    if options.tokenizer is None and ("/" in source or source.startswith(".")) and not Path(source).exists():
        raise ExportError(f"data.tokenizer of the recipe is {source}, which does not exist; pass --tokenizer DIR.")
    try:
        tokenizer = with_end_of_document(load_tokenizer(source), run_state.end_of_document)
    except DataError as error:
        raise ExportError(f"{error}; pass --tokenizer DIR, or --no-tokenizer to export without one.") from None
    trained_with = run_state.tokenizer_sha256
    if trained_with is not None and tokenizer.sha256 != trained_with:
        raise ExportError(
            f"tokenizer {source} is not the one that the model was trained with ({trained_with[:12]}); pass that one "
            "with --tokenizer, or --no-tokenizer to export without one."
        )
    check_vocabulary(tokenizer, config.model.vocab_size)
    write_tokenizer_folder(tokenizer, folder)
    return tokenizer


def build_hf_model(settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Build the Hugging Face model from mapped float32 tensors, in evaluation mode."""
    fields = {key: value for key, value in settings.items() if key not in ("architectures", "model_type", "auto_map")}
    if settings["model_type"] == "itt":
        model: nn.Module = ITTForCausalLM(ITTConfig(**fields))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings["model_type"], **fields))
    result = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if settings["tie_word_embeddings"] else set()
    missing = sorted(set(result.missing_keys) - tied)
    if missing or result.unexpected_keys:
        raise ExportError(f"the exported tensors do not fill the model: missing {missing}, {result.unexpected_keys}.")
    return model.eval()


def check_parity(built: BuiltModel, hf_model: nn.Module, config: RunConfig, tokenizer: Any | None) -> ParityResult:
    """Compare the logits of both models on random tokens and, with a tokenizer, on text. ExportError if they differ."""
    worst, cases = 0.0, []
    for text_name, tokens in _token_cases(config, tokenizer):
        for routing, budget in routing_cases(config, hf_model):
            expected = forward_logits(built, tokens, thinking_budget=budget, routing=routing)
            given = {} if routing is None else {"routing": routing, "thinking_budget": budget}
            with torch.no_grad():
                logits = hf_model(tokens, use_cache=False, **given).logits
            name = f"{text_name}, {routing or 'no routing'}" + (f" at {list(budget)}" if budget else "")
            worst = max(worst, _compare(expected, logits, name, ties=routing is not None))
            cases.append(name)
    return ParityResult(worst, tuple(cases))


def _token_cases(config: RunConfig, tokenizer: Any | None) -> list[tuple[str, Tensor]]:
    length = min(config.model.seq_length, 96)
    generator = torch.Generator().manual_seed(0)
    cases = [("random tokens", torch.randint(0, config.model.vocab_size, (2, length), generator=generator))]
    ids = [] if tokenizer is None else tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:length]
    return [*cases, ("text", torch.tensor([ids]))] if ids else cases


def routing_cases(config: RunConfig, hf_model: nn.Module) -> list[tuple[str | None, tuple[float, ...] | None]]:
    """Routing rules and budgets to compare: the trained ones, and thresholds where there are quantiles."""
    thinking, capacity = config.thinking, config.thinking.nominal_capacity
    if thinking.kind != "itt" or thinking.routing == "none" or not capacity:
        return [(None, None)]
    cases: list[tuple[str | None, tuple[float, ...] | None]] = []
    if thinking.routing != "threshold":
        cases.append((thinking.routing, capacity))
    if all(bool(buffer.any()) for name, buffer in hf_model.named_buffers() if name.endswith(FLOAT32_SUFFIX)):
        cases += [("threshold", capacity), ("threshold", tuple(each / 2 for each in capacity))]
    return cases


def _compare(expected: Tensor, logits: Tensor, case: str, *, ties: bool) -> float:
    """Return the largest relative difference, a few tied tokens aside. ExportError above the tolerance."""
    scale = expected.abs().max().clamp(min=1e-30)
    per_token = ((expected - logits).abs().amax(dim=-1) / scale).flatten()
    beyond = per_token > TOLERANCE
    allowed = int(per_token.numel() * TIED_TOKENS) if ties else 0
    if not bool(per_token.isfinite().all()) or int(beyond.sum()) > allowed:
        raise ExportError(
            f"parity check failed for {case}: logits differ by {float(per_token.max()):.2e} of the largest, allowed "
            f"{TOLERANCE:.0e}; nothing was written. Report this, or use --no-check to write the folder anyway."
        )
    return float(per_token[~beyond].max())

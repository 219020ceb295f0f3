"""Quantiles of router logits for an imported model, so that thresholds work before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_itt.config import RunConfig
from megatron_itt.data.text.tokenizer_folder import load_with_transformers
from megatron_itt.errors import ExportError
from megatron_itt.hf.load import register_auto_classes
from megatron_itt.model.builder import BuiltModel, forward_logits
from megatron_itt.model.quantiles import pool_quantiles, update_quantiles
from megatron_itt.model.routing_control import RoutingRecorder

NUM_SEQUENCES, NUM_TOKENS = 16, 48  # of samples: decoding takes as long for many sequences as for one
TEXT_TOKENS = 96  # of one sequence of a text


def calibrate(built: BuiltModel, folder: Path, config: RunConfig, source: str) -> str:
    """Set the quantile tables of all thinking layers, and return what they are from.

    source: "samples" (text that the model in `folder` samples), "normal" (standard-normal logits), or a text file.
    """
    generator = torch.Generator().manual_seed(config.runtime.seed)
    if source == "normal" or not config.thinking.nominal_capacity:
        normal = pool_quantiles(torch.randn(64, 257, generator=generator))
        for layer in built.thinking_layers():
            if layer.thinking.logit_quantiles is not None:
                layer.thinking.logit_quantiles.copy_(normal.expand_as(layer.thinking.logit_quantiles))
        return "standard-normal logits"
    longest, samples = config.model.seq_length, source == "samples"
    batch = (
        _sample(folder, min(NUM_TOKENS, longest), generator)
        if samples
        else _read(Path(source), config, min(TEXT_TOKENS, longest))
    )
    recorder = RoutingRecorder()
    built.control.recorder = recorder
    for recorder.microbatch, tokens in enumerate(batch.split(NUM_SEQUENCES)):
        forward_logits(built, tokens, routing="topk")
    built.control.recorder = None
    group = parallel_state.get_data_parallel_group()
    update_quantiles(built.thinking_layers(), recorder, group=group, decay=0.0)
    return f"{batch.numel()} tokens of {'its own samples' if samples else source}"


def _read(path: Path, config: RunConfig, length: int) -> Tensor:
    """Up to 64 sequences of `length` tokens of a text file, [n, length]."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--calibrate is {path}, which cannot be read as text ({error}); name a text file.") from None
    if config.data.tokenizer is None:
        raise ExportError(f"--calibrate is {path}, but there is no tokenizer; add data.tokenizer=DIR.")
    tokenizer = load_with_transformers(Path(config.data.tokenizer))
    ids = tokenizer(text[: 64 * length * 16], add_special_tokens=False)["input_ids"][: 64 * length]
    if len(ids) < length:
        raise ExportError(f"--calibrate is {path} with {len(ids)} tokens; give a text of at least {length}.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def _sample(folder: Path, length: int, generator: torch.Generator) -> Tensor:
    """Sequences [n, length] that the model in `folder` samples, each from a random first token."""
    register_auto_classes()
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True).eval()
    tokens = torch.randint(0, model.config.vocab_size, (NUM_SEQUENCES, 1), generator=generator)
    past, parts = None, [tokens]
    for _ in range(length - 1):
        output = model(tokens, past_key_values=past, use_cache=True)
        past = output.past_key_values
        tokens = torch.multinomial(output.logits[:, -1].softmax(dim=-1), 1, generator=generator)
        parts.append(tokens)
    return torch.cat(parts, dim=1)

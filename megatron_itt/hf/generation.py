"""Continuing a prompt with an exported model, and telling how long it thought about each token. No megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_itt.errors import ExportError
from megatron_itt.hf.load import open_export
from megatron_itt.hf.options import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class TokenThinking:
    """Routed steps that one token took in each thinking layer; `prompt` tells given tokens from generated ones."""

    text: str
    steps: list[int]
    prompt: bool


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation, and one entry per token where asked for."""

    text: str
    thinking: list[TokenThinking]


def generate_text(folder: str | Path, prompt: str, options: GenerationOptions) -> Generated:
    """Continue `prompt` with the model in `folder`. ExportError for a folder, prompt or budget that cannot work."""
    if options.max_new_tokens < 1:
        raise ExportError(f"max_new_tokens is {options.max_new_tokens}; give at least 1.")
    if options.temperature < 0:
        raise ExportError(f"temperature is {options.temperature}; give 0 for greedy or a positive number.")
    model, tokenizer = open_export(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise ExportError("the prompt is empty; give at least one token of text.")
    if options.budget is not None and not hasattr(model.config, "thinking"):
        raise ExportError(f"--budget was given, but {folder} is a plain LLaMA that never thinks again.")
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    budget = {} if options.budget is None else {"thinking_budget": list(options.budget)}
    try:
        output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, **sampling, **budget)
        thinking = _count_steps(model, tokenizer, output, inputs, budget) if options.show_thinking else []
    except ValueError as error:
        raise ExportError(" ".join(str(error).split())) from None
    continuation = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Generated(text=continuation, thinking=thinking)


@torch.no_grad()
def _count_steps(model: Any, tokenizer: Any, output: torch.Tensor, inputs: Any, budget: dict) -> list[TokenThinking]:
    """One full pass over the finished text; thresholds look at one token only, so it repeats what decoding did.

    A last token beyond the trained length was generated, but never read.
    """
    if not hasattr(model.config, "thinking"):
        raise ExportError("--show-thinking was given, but the model is a plain LLaMA that never thinks again.")
    output = output[:, : model.config.max_position_embeddings]
    routing = model(output, output_routing=True, use_cache=False, **budget).routing
    counts = (
        torch.stack([picked[0].sum(dim=0) for picked in routing]) if routing else output.new_zeros(0, output.shape[1])
    )
    num_prompt = inputs["input_ids"].shape[1]
    return [
        TokenThinking(text=tokenizer.decode([token]), steps=counts[:, place].tolist(), prompt=place < num_prompt)
        for place, token in enumerate(output[0].tolist())
    ]

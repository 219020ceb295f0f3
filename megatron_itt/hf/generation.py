"""Text generation with an exported model, and the number of thinking steps of each token. No megatron."""

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
    """Routed steps of one token in each thinking layer; `prompt` marks tokens of the prompt."""

    text: str
    steps: list[int]
    prompt: bool


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation, and one entry per token on request."""

    text: str
    thinking: list[TokenThinking]


def generate_text(folder: str | Path, prompt: str, options: GenerationOptions) -> Generated:
    """Continue `prompt` with the model in `folder`. ExportError for an unusable folder, prompt or budget."""
    if options.max_new_tokens < 1:
        raise ExportError(f"max_new_tokens is {options.max_new_tokens}; give at least 1.")
    if options.temperature < 0:
        raise ExportError(f"temperature is {options.temperature}; give 0 for greedy or a positive number.")
    model, tokenizer = open_export(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    num_prompt = inputs["input_ids"].shape[1]
    if num_prompt == 0:
        raise ExportError("the prompt is empty; give at least one token of text.")
    for flag, wanted in {"--budget": options.budget is not None, "--show-thinking": options.show_thinking}.items():
        if wanted and not hasattr(model.config, "thinking"):
            raise ExportError(f"{flag} was given, but {folder} is a plain LLaMA without thinking layers.")
    torch.manual_seed(options.seed)
    keys: dict[str, Any] = {"do_sample": options.temperature > 0, "max_new_tokens": options.max_new_tokens}
    if options.temperature > 0:
        keys["temperature"] = options.temperature
    budget = {} if options.budget is None else {"thinking_budget": list(options.budget)}
    try:
        output = model.generate(**inputs, **keys, **budget)
        steps = _count_routed_steps(model, output, budget) if options.show_thinking else output.new_zeros(0, 0)
    except ValueError as error:
        raise ExportError(" ".join(str(error).split())) from None
    thinking = [
        TokenThinking(text=tokenizer.decode([token]), steps=counts, prompt=index < num_prompt)
        for index, (token, counts) in enumerate(zip(output[0].tolist(), steps.t().tolist(), strict=False))
    ]
    return Generated(text=tokenizer.decode(output[0, num_prompt:], skip_special_tokens=True), thinking=thinking)


@torch.no_grad()
def _count_routed_steps(model: Any, output: torch.Tensor, budget: dict[str, Any]) -> torch.Tensor:
    """Routed steps [thinking layers, tokens] of output [1, tokens], from one pass over the whole text.

    Thresholds are causal, so the pass selects what decoding selected. A last token beyond the trained length was never
    processed.
    """
    output = output[:, : model.config.max_position_embeddings]
    routing = model(output, output_routing=True, use_cache=False, **budget).routing
    return torch.stack([selected[0].sum(dim=0) for selected in routing]) if routing else output[:0]

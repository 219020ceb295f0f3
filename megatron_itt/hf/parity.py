"""Does an export compute what the checkpoint computes? Logits of both models on the same tokens, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM
from megatron_itt.model.builder import BuiltModel, forward_logits

TOLERANCE = 1.0e-4
# Top-k compares scores; where two models differ in the last bits a tie can fall either way, and that token then differs
# visibly without a fault. A real fault moves almost every token.
TIED_TOKENS = 0.02
PASSAGE = (
    "Some questions are answered at once, others deserve a second look. A reader who meets an easy word moves on; "
    "at a hard one the eye returns, and the sentence is read again until it makes sense.\n"
)


@dataclass(frozen=True)
class ParityResult:
    """Largest difference of logits relative to the largest logit, and what was compared."""

    max_relative_difference: float
    cases: tuple[str, ...]


def build_hf_model(settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The Hugging Face model of mapped float32 tensors, in memory, in evaluation mode."""
    fields = {key: value for key, value in settings.items() if key not in ("architectures", "model_type", "auto_map")}
    model: nn.Module
    if settings["model_type"] == "itt":
        model = ITTForCausalLM(ITTConfig(**fields))
    else:
        model = LlamaForCausalLM(LlamaConfig(**fields))
    result = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if settings["tie_word_embeddings"] else set()
    missing = sorted(set(result.missing_keys) - tied)
    if missing or result.unexpected_keys:
        raise ExportError(f"the exported tensors do not fill the model: missing {missing}, {result.unexpected_keys}.")
    return model.eval()


def check_parity(built: BuiltModel, hf_model: nn.Module, config: RunConfig, tokenizer: Any | None) -> ParityResult:
    """Compare both models on random tokens and, with a tokenizer, on real text. ExportError where they differ."""
    worst, cases = 0.0, []
    for text_name, tokens in _token_cases(config, tokenizer):
        for routing, budget in _routing_cases(config, hf_model):
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
    if tokenizer is not None:
        ids = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"][:length]
        if ids:
            cases.append(("text", torch.tensor([ids])))
    return cases


def _routing_cases(config: RunConfig, hf_model: nn.Module) -> list[tuple[str | None, tuple[float, ...] | None]]:
    """The trained rule at the trained budget, and thresholds at it and at half of it where there is a table."""
    thinking, capacity = config.thinking, config.thinking.nominal_capacity
    if thinking.kind != "itt" or thinking.routing == "none" or not capacity:
        return [(None, None)]
    cases: list[tuple[str | None, tuple[float, ...] | None]] = []
    if thinking.routing != "threshold":
        cases.append((thinking.routing, capacity))
    if all(bool(buffer.any()) for name, buffer in hf_model.named_buffers() if name.endswith("logit_quantiles")):
        cases += [("threshold", capacity), ("threshold", tuple(share / 2 for share in capacity))]
    return cases


def _compare(expected: Tensor, logits: Tensor, case: str, *, ties: bool) -> float:
    """Largest relative difference, a few tied tokens left out; ExportError above the tolerance."""
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

"""The one table between megatron-core and Hugging Face tensors, used in both directions.

Pure tensor functions: nothing here reads files or builds models. A tensor without a place in the table, on either
side, is an ExportError that lists the names.

Shape legend: h hidden, d head size, g key/value heads, n attention heads, V vocabulary, T thinking steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ExportError

# megatron-core keeps bookkeeping of fp8 layers under such names; it is no weight.
IGNORED_SUFFIX = "_extra_state"
SHOWN_NAMES = 12

Split = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Merge = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


def _same(tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor,)


def _only(tensors: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    return tensors[0]


def split_qkv(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[(n + 2g) d, h], grouped per key/value head as its queries, its key, its value -> q [n d, h], k, v [g d, h]."""
    per_group = model.num_attention_heads // model.num_key_value_heads
    grouped = fused.reshape(model.num_key_value_heads, per_group + 2, model.head_size, fused.shape[-1])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, fused.shape[-1]) for part in parts)


def merge_qkv(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    groups, hidden = model.num_key_value_heads, parts[0].shape[-1]
    grouped = [part.reshape(groups, -1, model.head_size, hidden) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def split_gate_up(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[2 ffn, h], gate rows then up rows -> gate, up [ffn, h]."""
    return fused.chunk(2, dim=0)


def merge_gate_up(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """The inverse of `split_gate_up`."""
    return torch.cat(parts, dim=0)


@dataclass(frozen=True)
class Rule:
    """One megatron-core tensor and the Hugging Face tensors it holds. `optional`: absent in some models."""

    megatron: str
    hf: tuple[str, ...]
    split: Split = _same
    merge: Merge = _only
    optional: bool = False


GLOBAL_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
# Absent where the embedding is tied.
HEAD_RULE = Rule("output_layer.weight", ("lm_head.weight",))
LAYER_RULES = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        split_qkv,
        merge_qkv,
    ),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), split_gate_up, merge_gate_up),
    Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Rule("thinking.router", ("thinking.router",), optional=True),
    Rule("thinking.step_encoding", ("thinking.step_encoding",), optional=True),
    Rule("thinking.logit_quantiles", ("thinking.logit_quantiles",), optional=True),
)


def rules_of_model(model: ModelConfig) -> list[Rule]:
    """The table for one shape, layers spelled out."""
    rules = [*GLOBAL_RULES, *([] if model.tie_embeddings else [HEAD_RULE])]
    for layer_idx in range(model.num_layers):
        for rule in LAYER_RULES:
            hf = tuple(f"model.layers.{layer_idx}.{name}" for name in rule.hf)
            rules.append(Rule(f"decoder.layers.{layer_idx}.{rule.megatron}", hf, rule.split, rule.merge, rule.optional))
    return rules


def megatron_to_hf(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename and split every tensor of a whole model's state dict. ExportError lists what has no place."""
    left = {name: tensor for name, tensor in state.items() if not name.endswith(IGNORED_SUFFIX)}
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    for rule in rules_of_model(model):
        if rule.megatron in left:
            parts = rule.split(left.pop(rule.megatron), model)
            result.update((name, part.contiguous()) for name, part in zip(rule.hf, parts, strict=True))
        elif not rule.optional:
            missing.append(rule.megatron)
    _refuse_leftovers(list(left), missing, "megatron-core")
    return result


def hf_to_megatron(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `megatron_to_hf`; also takes a plain LLaMA. ExportError lists what has no place."""
    left = dict(state)
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    if model.tie_embeddings:
        _drop_tied_head(left)
    for rule in rules_of_model(model):
        absent = [name for name in rule.hf if name not in left]
        if not absent:
            result[rule.megatron] = rule.merge(tuple(left.pop(name) for name in rule.hf), model).contiguous()
        elif not rule.optional or len(absent) < len(rule.hf):
            missing.extend(absent)
    _refuse_leftovers([name for name in left if not re.search(r"rotary_emb\.inv_freq$", name)], missing, "Hugging Face")
    return result


def _drop_tied_head(state: dict[str, Tensor]) -> None:
    """Some writers store a tied head twice; drop the copy, refuse one that differs."""
    head, embedding = state.pop(HEAD_RULE.hf[0], None), state.get(GLOBAL_RULES[0].hf[0])
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ExportError(
            "lm_head.weight differs from model.embed_tokens.weight, but model.tie_embeddings is true; set it to false."
        )


def _refuse_leftovers(unknown: list[str], missing: list[str], side: str) -> None:
    if not unknown and not missing:
        return
    parts = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:SHOWN_NAMES])}{', ...' if len(names) > SHOWN_NAMES else ''})"
        for what, names in (("without a place in the table", unknown), ("missing", missing))
        if names
    ]
    raise ExportError(
        f"the {side} tensors do not fit the recipe's shape: {'; '.join(parts)}. Check model and thinking in the recipe."
    )

"""Tensor table between megatron-core and Hugging Face, used in both directions.

Pure functions of tensors. A tensor that the table lacks, on either side, is an ExportError that lists the names.

Shape legend: h hidden, d head size, g key/value heads, n attention heads, V vocabulary, T thinking steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ExportError

IGNORED_SUFFIXES = ("_extra_state", "rotary_emb.inv_freq")  # fp8 bookkeeping of megatron-core, a buffer of old LLaMAs
MAX_NAMES = 12  # in messages


@dataclass(frozen=True)
class Rule:
    """A megatron-core tensor and the Hugging Face tensors fused in it.

    `optional`: absent from some models; `switch`: key of `model` without which no model has it.
    """

    megatron: str
    hf: tuple[str, ...]
    fused: Literal["qkv", "gate_up"] | None = None
    optional: bool = False
    switch: str | None = None


GLOBAL_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
HEAD_RULE = Rule("output_layer.weight", ("lm_head.weight",))  # absent from models with tied embeddings
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
LAYER_RULES = (
    Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    Rule("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in QKV), fused="qkv"),
    Rule("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in QKV), fused="qkv", switch="qkv_bias"),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), switch="qk_norm"),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), switch="qk_norm"),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), fused="gate_up"),
    Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Rule("thinking.router", ("thinking.router",), optional=True),
    Rule("thinking.step_encoding", ("thinking.step_encoding",), optional=True),
    Rule("thinking.logit_quantiles", ("thinking.logit_quantiles",), optional=True),
)


def rules_of_model(model: ModelConfig) -> list[Rule]:
    """Return the table for one shape, with the rules of every layer."""
    rules = [*GLOBAL_RULES, *([] if model.tie_embeddings else [HEAD_RULE])]
    of_layer = [rule for rule in LAYER_RULES if rule.switch is None or getattr(model, rule.switch)]
    for layer_idx in range(model.num_layers):
        for rule in of_layer:
            hf = tuple(f"model.layers.{layer_idx}.{name}" for name in rule.hf)
            rules.append(replace(rule, megatron=f"decoder.layers.{layer_idx}.{rule.megatron}", hf=hf))
    return rules


def _blocks(rule: Rule, model: ModelConfig) -> tuple[int, list[int]]:
    """Groups of a fused weight, and the relative number of rows of each tensor in a group."""
    if rule.fused == "qkv":  # per key/value head: its queries, its key, its value
        return model.num_key_value_heads, [model.num_attention_heads // model.num_key_value_heads, 1, 1]
    return 1, [1, 1]


def split(rule: Rule, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """Split a megatron-core tensor: [(n + 2g) d, h] -> q [n d, h], k, v [g d, h]; [2 ffn, h] -> gate, up [ffn, h].

    A bias has no dimension h.
    """
    if rule.fused is None:
        return [tensor]
    groups, sizes = _blocks(rule, model)
    grouped = tensor.reshape(groups, sum(sizes), -1, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in grouped.split(sizes, dim=1)]


def merge(rule: Rule, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """Fuse Hugging Face tensors; the inverse of `split`."""
    if rule.fused is None:
        return tensors[0]
    groups, hidden = _blocks(rule, model)[0], tensors[0].shape[1:]
    grouped = [tensor.reshape(groups, -1, *hidden) for tensor in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, *hidden)


def megatron_to_hf(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename and split the tensors of a whole model. ExportError lists tensors that do not fit the table."""
    left = _known(state)
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    for rule in rules_of_model(model):
        if rule.megatron in left:
            parts = split(rule, left.pop(rule.megatron), model)
            result.update((name, part.contiguous()) for name, part in zip(rule.hf, parts, strict=True))
        elif not rule.optional:
            missing.append(rule.megatron)
    refuse_mismatch("megatron-core", unknown=left, missing=missing)
    return result


def hf_to_megatron(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `megatron_to_hf`; also accepts a plain LLaMA."""
    left = _known(state)
    result: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    _check_values(left)
    _check_head(left, model)
    if model.tie_embeddings:  # some writers store a tied head as well
        left.pop(HEAD_RULE.hf[0], None)
    for rule in rules_of_model(model):
        absent = [name for name in rule.hf if name not in left]
        if not absent:
            try:
                result[rule.megatron] = merge(rule, [left.pop(name) for name in rule.hf], model).contiguous()
            except (RuntimeError, IndexError):  # of torch
                misshapen.extend(rule.hf)
        elif not rule.optional:
            missing.extend(absent)
    refuse_mismatch("Hugging Face", unknown=left, missing=missing, misshapen=misshapen)
    return result


def _check_values(state: Mapping[str, Tensor]) -> None:
    """ExportError for weights that are quantised or not finite."""
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ExportError(f"{name} is quantised ({kind}); dequantize() the model and save_pretrained() it.")
        if not bool(tensor.isfinite().all()):
            raise ExportError(f"{name} holds values that are not finite; the weights are damaged, copy them again.")


def _check_head(state: Mapping[str, Tensor], model: ModelConfig) -> None:
    """ExportError for a head that does not fit the embedding or `model.tie_embeddings`."""
    head, embedding = state.get(HEAD_RULE.hf[0]), state.get(GLOBAL_RULES[0].hf[0])
    if embedding is None:
        return
    if head is None and not model.tie_embeddings:
        raise ExportError("lm_head.weight is missing, but the embeddings are not tied; set model.tie_embeddings=true.")
    if head is not None and head.shape != embedding.shape:
        raise ExportError(
            f"lm_head.weight has {head.shape[0]} rows and model.embed_tokens.weight {embedding.shape[0]}: they are "
            "padded differently; cut both to the vocabulary and save the model again."
        )
    if embedding.shape[0] != model.vocab_size:
        raise ExportError(
            f"model.embed_tokens.weight has {embedding.shape[0]} rows but vocab_size of the folder is "
            f"{model.vocab_size}; set vocab_size in config.json to the rows."
        )
    if head is not None and model.tie_embeddings and not torch.equal(head, embedding):
        raise ExportError(
            "lm_head.weight differs from model.embed_tokens.weight, but model.tie_embeddings is true; set it to false."
        )


def _known(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(IGNORED_SUFFIXES)}


def refuse_mismatch(
    side: str, *, unknown: Iterable[str], missing: Iterable[str], misshapen: Iterable[str] = ()
) -> None:
    """Raise ExportError if a list of tensor names of one `side` is not empty."""
    faults = {"not in the table": sorted(unknown), "missing": sorted(missing), "of another shape": sorted(misshapen)}
    lists = [
        f"{len(names)} {what} ({', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''})"
        for what, names in faults.items()
        if names
    ]
    if lists:
        raise ExportError(
            f"the {side} tensors do not fit the shape: {'; '.join(lists)}. Check config.json of the folder, and model "
            "and thinking of the recipe."
        )

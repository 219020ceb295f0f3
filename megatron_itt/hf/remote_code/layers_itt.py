"""Layers of the Inner Thinking Transformer: attention, MLP, and the thinking steps around them.

A thinking layer computes (f is the whole layer; keys and values from the context C, original positions, causal):

    y = phi_0 * f(x; x)                                         # base pass
    for t in 1 .. T-1:                                          # routed steps
        logit = <r_t, y>                                        # at least float32
        M = select(logit, capacity_t)                           # padding is never selected and does not count
        y[M] = y[M] + (alpha_t * w) * (phi_t * f(y[M]; C))      # w = gate(logit)

| key of config.thinking | value | meaning |
|---|---|---|
| residual | accumulate / replace | as above / y[M] <- f(y[M]; C), without w, alpha and phi, phi_0 = 1 too |
| routing | topk, topp, threshold / none | rule of training (inference: threshold) / all tokens selected, w = 1 |
| step_encoding | true / false | learned phi / phi = 1 |
| gate | sigmoid / tanh | w |
| reweight | selected / symmetric | as above / also y[not M] <- y[not M] * w[not M] |
| attend | all / selected | C = y, all tokens / C = y[M] |
| update | full / delta | as above / f(y[M]; C) - y[M] in place of f(y[M]; C) |
| skip | keep / literal | tokens not in M stay / y[not M] <- y[not M] + phi_t * y[not M] |
| kind | itt / loop / none | as above / x <- f(x; x), T times, no weights of its own / LLaMA |

A capacity of 0 skips the step for its row. Paper: silent on padding and on C. Ours: as above. Source: paper, Eq 1 to 7.

Shape legend: b rows, s tokens of this call, n selected tokens, m >= n rows after padding, k most selected tokens of a
row, h hidden, H heads, g key/value heads, d head size, P keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_itt import CallKeyValues, ITTCache, KeyValues
from .configuration_itt import ITTConfig
from .routing_itt import (
    NUM_QUANTILE_INTERVALS,
    RESIDUALS,
    ROUTING_RULES,
    UNUSED,
    CallInputs,
    Selection,
    gate,
    router_logits,
    thresholds,
)

# oneDNN's product, as torch.compile calls it; None where PyTorch is built without oneDNN.
FEW_ROWS_PRODUCT = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
FEW_ROWS = 8


class ITTLinear(nn.Linear):
    """nn.Linear, whose products of a few float32 rows on a CPU are oneDNN's.

    MKL, PyTorch's choice in float32, is slower for one row on AMD's processors, and needs more time for 2 or 3 rows
    than for 8; a routed step of cached decoding has fewer rows than the batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_plain = input.is_cpu and input.dtype == torch.float32 and type(self.weight) is nn.Parameter
        if (
            FEW_ROWS_PRODUCT is None
            or not (is_plain and self.weight.dtype == torch.float32 and input.dim() == 2)
            or not 0 < input.shape[0] <= FEW_ROWS
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        return FEW_ROWS_PRODUCT(input, self.weight, self.bias, "none", [], "")


def rotary_frequencies(config: ITTConfig, device: torch.device) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] in float32, and the factor of cos and sin."""
    scaling = config.rotary_scaling
    if not scaling:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / config.rope_theta**exponent, 1.0
    shape = LlamaConfig(
        hidden_size=config.head_dim,
        num_attention_heads=1,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling=dict(scaling),
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](shape, device)


def rotary_cos_sin(
    position_ids: Tensor, frequencies: tuple[Tensor, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [b, s, d] of position_ids [b, s], computed in float32."""
    inverse, factor = frequencies
    angles = position_ids[..., None].float() * inverse
    angles = torch.cat((angles, angles), dim=-1)
    tables = angles.cos(), angles.sin()
    cos, sin = tables if factor == 1.0 else (factor * table for table in tables)
    return cos.to(dtype), sin.to(dtype)


class ITTAttention(nn.Module):
    """Attention with its QKV projection, rotary embedding and masks. Queries and keys may be of different tokens."""

    is_causal = True

    def __init__(self, config: ITTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = ITTLinear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = ITTLinear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = ITTLinear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = ITTLinear(query_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module | None = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm: nn.Module | None = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def key_values(self, hidden_states: Tensor, tokens: Selection, call: CallInputs) -> tuple[Tensor, Tensor]:
        """Project normed hidden_states [m, h] of `tokens` to k, v [n, g, d], k rotated."""
        v = self.v_proj(hidden_states)[: tokens.num_tokens].unflatten(-1, (-1, self.head_dim))
        return self._rotated(self.k_proj(hidden_states), self.k_norm, tokens, call), v

    def forward(self, hidden_states: Tensor, queries: Selection, kv: KeyValues, call: CallInputs) -> Tensor:
        """Attend from normed hidden_states [m, h] of `queries` to `kv` -> [m, h]."""
        q = self._rotated(self.q_proj(hidden_states), self.q_norm, queries, call)
        q = queries.pad(q).transpose(1, 2)
        output = queries.unpad(self._attend(q, kv, self._mask(queries, kv, call)).flatten(2))
        return self.o_proj(queries.pad_rows(output))

    def _rotated(self, projected: Tensor, norm: nn.Module | None, tokens: Selection, call: CallInputs) -> Tensor:
        """projected [m, heads * d] -> heads [n, heads, d] with norm and rotary embedding, halves paired as in LLaMA."""
        heads = projected[: tokens.num_tokens].unflatten(-1, (-1, self.head_dim))
        heads = heads if norm is None else norm(heads)
        cos, sin = (tokens.take(table)[:, None] for table in call.position_embeddings)
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    def _mask(self, queries: Selection, kv: KeyValues, call: CallInputs) -> Tensor | None:
        """Mask [b, 1, k, P], true where a query attends: to keys of its document, up to its own position.

        Unused query places attend to everything: their result is discarded and only has to stay finite, for gradients.
        """
        if kv.positions is None:
            return None
        positions = queries.pad(queries.take(call.cache_position), UNUSED)[:, :, None]
        keys = kv.positions[:, None, :]
        mask = (keys <= positions) & (keys >= 0)
        if call.document_starts is not None:
            mask = mask & (keys >= queries.pad(queries.take(call.document_starts), UNUSED)[:, :, None])
        return (mask | (positions < 0))[:, None]

    def _attend(self, q: Tensor, kv: KeyValues, mask: Tensor | None) -> Tensor:
        """q [b, H, k, d] -> [b, k, H, d]."""
        k, v = kv.k, kv.v
        if mask is None and self.config._attn_implementation not in (None, "sdpa", "eager"):
            attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            output, _ = attend(self, q, k, v, None, dropout=0.0, scaling=self.scaling, is_causal=kv.is_causal)
            return output
        if q.shape[2] == 1:
            # The heads of a group share keys and take the place of positions, so that keys are not repeated.
            grouped = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
            output = nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=self.scaling)
            return output.reshape(q.shape).transpose(1, 2)
        enable_gqa = self.num_key_value_groups > 1
        if enable_gqa and mask is not None:
            k, v = (tensor.repeat_interleave(self.num_key_value_groups, dim=1) for tensor in (k, v))
            enable_gqa = False
        output = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=kv.is_causal, scale=self.scaling, enable_gqa=enable_gqa
        )
        return output.transpose(1, 2)


class ITTMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ITTConfig) -> None:
        super().__init__()
        self.gate_proj = ITTLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = ITTLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ITTLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ITTThinking(nn.Module):
    """Weights of a thinking layer: router [T-1, h], step_encoding [T, h], logit_quantiles [T-1, 1025] (float32).

    With one thinking step (T = 1) there are no router and no quantiles.
    """

    router: Tensor | None
    logit_quantiles: Tensor | None

    def __init__(self, config: ITTConfig) -> None:
        super().__init__()
        steps = config.num_routed_steps
        self.register_parameter("router", nn.Parameter(torch.empty(steps, config.hidden_size)) if steps else None)
        self.step_encoding = nn.Parameter(torch.empty(steps + 1, config.hidden_size))
        quantiles = torch.zeros(steps, NUM_QUANTILE_INTERVALS + 1) if steps else None
        self.register_buffer("logit_quantiles", quantiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ITTThinking:
        # bf16 thresholds would shift the realised capacity by percents, so a cast of the model keeps them in float32.
        before = self.logit_quantiles
        super()._apply(fn, recurse)
        after = self.logit_quantiles
        if before is not None and after is not None and after.dtype != torch.float32 and not after.is_meta:
            self.logit_quantiles = before.to(after.device, torch.float32)
        return self

    def limits(self, call: CallInputs) -> Tensor:
        """What the routing rule compares with, [b, T-1]: thresholds, or the budget itself."""
        assert self.logit_quantiles is not None, "a routed step has quantiles"
        budget = call.thinking_budget
        return thresholds(self.logit_quantiles, budget) if call.routing == "threshold" else budget

    def select(self, hidden_states: Tensor, step: int, call: CallInputs, limits: Tensor) -> tuple[Selection, Tensor]:
        """Selection and router logits [b, s] of routed step `step` for hidden_states [b, s, h]."""
        assert self.router is not None, "a routed step has a router"
        logits = router_logits(hidden_states, self.router[step - 1])
        mask = ROUTING_RULES[call.routing](logits, limits[:, step - 1], call.unpadded.mask)
        if call.is_static:
            return call.all_tokens.masked(mask), logits
        selected = Selection.from_mask(mask, call.multiple_of)
        is_all = selected.num_tokens == call.all_tokens.num_tokens and call.multiple_of == 1
        return call.all_tokens if is_all else selected, logits


class ITTDecoderLayer(GradientCheckpointingLayer):
    """One layer: plain LLaMA, looped, or thinking."""

    def __init__(self, config: ITTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.switches = config.thinking
        thinks = layer_idx in self.switches["layers"]
        self.kind = self.switches["kind"] if thinks else "none"
        self.num_steps = config.num_routed_steps + 1 if thinks else 1
        self.self_attn = ITTAttention(config, layer_idx)
        self.mlp = ITTMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.kind == "itt":
            self.thinking = ITTThinking(config)
        changes_unselected = self.switches["skip"] == "literal" or self.switches["reweight"] == "symmetric"
        changes_all = changes_unselected and self.switches["residual"] == "accumulate"
        selects_all = self.kind == "loop" or self.switches["routing"] == "none"
        self.keeps_keys = self.switches["attend"] == "all" and not changes_all and not selects_all

    def forward(
        self, hidden_states: Tensor, call: CallInputs, past_key_values: ITTCache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states [b, s, h] -> [b, s, h]; of a thinking layer also selected and router logits, [b, T-1, s]."""
        kv = CallKeyValues(call)
        if past_key_values is not None:
            kv = past_key_values.key_values(call, self.layer_idx, self.num_steps)
        hidden_states = self._pass_all(hidden_states, 0, call, kv)
        if self.kind == "itt":
            return self._think(hidden_states, call, kv)
        for step in range(1, self.num_steps):  # loop. Source: Ng and Wang 2024
            hidden_states = self._pass_all(hidden_states, step, call, kv)
        return hidden_states, None, None

    def _key_values(self, hidden_states: Tensor, tokens: Selection, call: CallInputs) -> tuple[Tensor, Tensor]:
        """Keys and values [n, g, d] of `tokens` of hidden_states [b, s, h]."""
        normed = self.input_layernorm(tokens.pad_rows(tokens.take(hidden_states)))
        return self.self_attn.key_values(normed, tokens, call)

    def _f(
        self, hidden_states: Tensor, tokens: Selection, call: CallInputs, kv: KeyValues, *, has_mlp: bool = True
    ) -> Tensor:
        """The base layer, or its attention, with residual connections on hidden_states [n, h] of `tokens`."""
        rows = tokens.pad_rows(hidden_states)
        rows = rows + self.self_attn(self.input_layernorm(rows), tokens, kv, call)
        if has_mlp:
            rows = rows + self.mlp(self.post_attention_layernorm(rows))
        return rows[: tokens.num_tokens]

    def _pass_all(self, hidden_states: Tensor, step: int, call: CallInputs, kv: CallKeyValues) -> Tensor:
        """f(x; x) on all tokens of hidden_states [b, s, h]."""
        tokens = call.all_tokens
        keys = kv.append(step, tokens, *self._key_values(hidden_states, tokens, call), tokens)
        return tokens.put(hidden_states, self._f(tokens.take(hidden_states), tokens, call, keys))

    def _phi(self, step: int) -> Tensor | None:
        """Step encoding [h], None for 1."""
        unused = self.switches["residual"] == "replace" or not self.switches["step_encoding"]
        return None if unused else self.thinking.step_encoding[step]

    def _think(self, y: Tensor, call: CallInputs, kv: CallKeyValues) -> tuple[Tensor, Tensor, Tensor | None]:
        """The routed steps on y = f(x; x) [b, s, h]. Source: paper, Eq 4 to 7."""
        phi = self._phi(0)
        y = y if phi is None else y * phi.to(y.dtype)
        if self.keeps_keys and self.num_steps > 1:
            kv.set_current(*self._key_values(y, call.all_tokens, call))
        limits = None
        if self.switches["routing"] != "none" and self.num_steps > 1:
            limits = self.thinking.limits(call)
        masks, all_logits = [], []
        for step in range(1, self.num_steps):
            selected, logits = call.all_tokens, None
            if limits is not None:
                selected, logits = self.thinking.select(y, step, call, limits)
                all_logits.append(logits)
            y = self._routed_step(y, step, call, kv, selected=selected, logits=logits)
            masks.append(selected.mask & call.unpadded.mask)
        empty = call.all_tokens.mask.new_zeros((y.shape[0], 0, y.shape[1]))
        stacked_logits = torch.stack(all_logits, dim=1) if all_logits else None
        return y, torch.stack(masks, dim=1) if masks else empty, stacked_logits

    def _routed_step(
        self, y: Tensor, step: int, call: CallInputs, kv: CallKeyValues, *, selected: Selection, logits: Tensor | None
    ) -> Tensor:
        """One routed step on y [b, s, h]; logits [b, s] are None without a router."""
        weight = None if logits is None else gate(logits, self.switches["gate"])
        context = selected if self.switches["attend"] == "selected" else call.all_tokens
        if not self.keeps_keys and context.num_tokens:
            keys = kv.append(step, context, *self._key_values(y, context, call), selected)
        unselected = self._update_unselected(y, step, call, selected=selected, weight=weight)
        if selected.num_tokens == 0:
            return unselected
        if self.keeps_keys:
            keys = kv.read_current(step)
        tokens = selected.take(y)
        output = self._f(tokens, selected, call, keys, has_mlp=self.switches["reuse"] == "layer")
        y = selected.put(unselected, self._combine(tokens, output, step, selected, weight))
        if self.keeps_keys and step + 1 < self.num_steps:
            kv.update_current(step, selected, *self._key_values(y, selected, call))
        return y

    def _combine(self, tokens: Tensor, output: Tensor, step: int, selected: Selection, weight: Tensor | None) -> Tensor:
        """Combine hidden states `tokens` [n, h] with the layer's output [n, h]; weight [b, s] or None for 1."""
        residual = RESIDUALS[self.switches["residual"]]
        if self.switches["update"] == "delta" and residual is RESIDUALS["accumulate"]:
            output = output - tokens
        alpha = self.switches["alpha"][step - 1]
        if weight is not None:
            weight = alpha * selected.take(weight)
        elif alpha != 1.0:
            weight = tokens.new_full((tokens.shape[0],), alpha)
        return residual(tokens, output, weight=weight, step_encoding=self._phi(step))

    def _update_unselected(
        self, y: Tensor, step: int, call: CallInputs, *, selected: Selection, weight: Tensor | None
    ) -> Tensor:
        """Apply `skip` and `reweight` to the tokens that are not selected; a budget of 0 leaves the row unchanged."""
        if self.switches["residual"] == "replace":
            return y
        if self.switches["skip"] == "literal":
            phi = self._phi(step)
            changed = y + (y if phi is None else phi.to(y.dtype) * y)
        elif self.switches["reweight"] == "symmetric" and weight is not None:
            changed = y * weight.to(y.dtype)[..., None]
        else:
            return y
        stays = selected.mask | (call.thinking_budget[:, step - 1, None] == 0)
        return torch.where(stays[..., None], y, changed)

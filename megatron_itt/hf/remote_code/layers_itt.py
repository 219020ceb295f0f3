"""One layer of the Inner Thinking Transformer: attention, MLP, and the thinking steps around them.

Who thinks is decided in thinking_itt.py, what attention sees in memory_itt.py. Imports torch and transformers only;
this file is copied into every export and works there alone.

What a thinking layer computes (f is the whole layer; keys and values from the context C, original positions, causal):

    y = phi_0 * f(x; x)
    for t in 1 .. T-1:
        logit = <r_t, y>                 # at least float32
        M = pick(logit, share_t)         # padding is never picked and does not count
        y[M] = y[M] + gain * (phi_t * f(y[M]; C))        # gain = (alpha_t * w).to(dtype), w = gate(logit)

| key of config.thinking | value | meaning |
|---|---|---|
| residual | accumulate / replace | as above / y[M] <- f(y[M]; C), nothing else: no w, alpha or phi, phi_0 = 1 too |
| routing | topk, topp, threshold / none | rule of training (inference: threshold) / all tokens are picked with w = 1 |
| step_encoding | true / false | learned phi / phi = 1 |
| gate | sigmoid / tanh | w |
| reweight | selected / symmetric | as above / also y[not M] <- y[not M] * w[not M] |
| attend | all / selected | C = y, all tokens / C = y[M] |
| update | full / delta | as above / f(y[M]; C) - y[M] in place of f(y[M]; C) |
| skip | keep / literal | tokens not in M stay / y[not M] <- y[not M] + phi_t * y[not M] |
| kind | itt / loop / none | as above / x <- f(x; x), T times, no weights of its own / LLaMA |

A share of 0 skips the step for its row. Paper: silent on padding and on C. Ours: see above. Source: paper, Eq 1 to 7.

Shape legend: b rows, c tokens of this call, n selected tokens, h hidden, H heads, g key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_itt import ITTCache, Keys
from .configuration_itt import ITTConfig
from .memory_itt import CachedMemory, DenseMemory
from .thinking_itt import (
    NUM_QUANTILE_INTERVALS,
    Selection,
    add_thought,
    gate,
    pick_threshold,
    pick_topk,
    pick_topp,
    router_logits,
    thresholds,
)


@dataclass(frozen=True)
class Call:
    """What every layer of one forward call shares.

    cos, sin [b, c, d]; positions, columns [b, c]; real [b, c] (false = padding) or None without padding; starts [b, c]:
    the column where each token's document begins, or None without packed documents; shares [b, T-1]; granule: see
    `Selection`.
    """

    cos: Tensor
    sin: Tensor
    real: Tensor | None
    positions: Tensor
    columns: Tensor
    starts: Tensor | None
    everyone: Selection
    everyone_real: Selection
    shares: Tensor
    routing: str
    granule: int


class ITTRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class ITTLinear(nn.Linear):
    """A linear layer without bias that multiplies a handful of rows on the CPU from the other side.

    BLAS kernels for few rows pack the weights anew at each call; with the operands exchanged they do not, which takes
    4 to 31 float32 rows to about 0.7 of the time (MKL). Full passes come in multiples of 32 rows and never get here.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        if rows.dim() == 2 and 4 <= rows.shape[0] < 32 and rows.device.type == "cpu" and rows.dtype == torch.float32:
            return (self.weight @ rows.t()).t().contiguous()
        return nn.functional.linear(rows, self.weight)


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of rows [n, heads, d] with cos, sin [n, d], halves paired as in LLaMA."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class ITTAttention(nn.Module):
    """Attention whose queries and keys may come from different sets of tokens."""

    is_causal = True

    def __init__(self, config: ITTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size, key_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = ITTLinear(config.hidden_size, query_size)
        self.k_proj = ITTLinear(config.hidden_size, key_size)
        self.v_proj = ITTLinear(config.hidden_size, key_size)
        self.o_proj = ITTLinear(query_size, config.hidden_size)

    def keys_values(self, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """normed [m, h] whose first n rows count, cos, sin [n, d] -> k, v [n, g, d], k rotated."""
        num_tokens = cos.shape[0]
        k = self.k_proj(normed)[:num_tokens].unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(normed)[:num_tokens].unflatten(-1, (-1, self.head_dim))
        return rotate(k, cos, sin), v

    def forward(self, normed: Tensor, cos: Tensor, sin: Tensor, queries: Selection, keys: Keys) -> Tensor:
        """normed [m, h] whose first n rows are `queries`, cos, sin [n, d] -> [m, h], attending to `keys`."""
        q = rotate(self.q_proj(normed)[: cos.shape[0]].unflatten(-1, (-1, self.head_dim)), cos, sin)
        if keys.lengths is not None and q.device.type == "cpu":
            out = self._attend_row_by_row(q, queries.rows(), keys)
        else:
            out = queries.unpad(self._attend(queries.pad(q).transpose(1, 2), keys).flatten(2))
        return self.o_proj(queries.fill_up(out))

    def _attend(self, q: Tensor, keys: Keys) -> Tensor:
        """q [b, H, k, d] -> [b, k, H, d]."""
        k, v = keys.k, keys.v
        if keys.mask is None and self.config._attn_implementation not in (None, "sdpa", "eager"):
            attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out, _ = attend(self, q, k, v, None, dropout=0.0, scaling=self.scaling, is_causal=keys.causal)
            return out
        if q.shape[2] == 1:
            # The queries of a group share their keys, so they stand in for several positions; nothing is repeated.
            grouped = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
            out = nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=keys.mask, scale=self.scaling)
            return out.reshape(q.shape).transpose(1, 2)
        enable_gqa = self.num_key_value_groups > 1
        if enable_gqa and keys.mask is not None:
            k, v = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (k, v))
            enable_gqa = False
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=keys.mask, is_causal=keys.causal, scale=self.scaling, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)

    def _attend_row_by_row(self, q: Tensor, rows: list[int], keys: Keys) -> Tensor:
        """One query in each of `rows`: q [n, H, d] -> [n, H d]; reads these rows' keys only, each to its length."""
        assert keys.lengths is not None, "the caller looked"
        outs = []
        for index, row in enumerate(rows):
            used = slice(0, keys.lengths[row])
            mask = None if keys.mask is None else keys.mask[row : row + 1, :, :, used]
            alone = Keys(keys.k[row : row + 1, :, used], keys.v[row : row + 1, :, used], mask)
            outs.append(self._attend(q[index : index + 1, :, None], alone).flatten(2)[:, 0])
        return torch.cat(outs)


class ITTMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ITTConfig) -> None:
        super().__init__()
        self.gate_proj = ITTLinear(config.hidden_size, config.intermediate_size)
        self.up_proj = ITTLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = ITTLinear(config.intermediate_size, config.hidden_size)

    def forward(self, normed: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


class ITTThinking(nn.Module):
    """Weights of a thinking layer: router [T-1, h], step_encoding [T, h], logit_quantiles [T-1, 1025] (float32).

    With one thinking step (T = 1) there is no router and no table.
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
        # bf16 thresholds would move the realised share by percents, so a cast of the model leaves them in float32.
        before = self.logit_quantiles
        super()._apply(fn, recurse)
        after = self.logit_quantiles
        if before is not None and after is not None and after.dtype != torch.float32 and not after.is_meta:
            self.logit_quantiles = before.to(after.device, torch.float32)
        return self

    def bars(self, call: Call) -> Tensor:
        """What the rule of this call compares with, [b, T-1]: thresholds, or shares of the sequence."""
        assert self.logit_quantiles is not None, "a routed step has a table"
        return thresholds(self.logit_quantiles, call.shares) if call.routing == "threshold" else call.shares

    def choose(self, hidden: Tensor, step: int, call: Call, bars: Tensor) -> tuple[Selection, Tensor]:
        """Who thinks at routed step `step` in 1 .. T-1: hidden [b, c, h], `bars` above -> selection, logits [b, c]."""
        assert self.router is not None, "a routed step has a router"
        logits = router_logits(hidden, self.router[step - 1])
        pick = {"threshold": pick_threshold, "topk": pick_topk, "topp": pick_topp}[call.routing]
        picked = Selection.from_mask(pick(logits, bars[:, step - 1], call.everyone_real.mask), call.granule)
        everyone = picked.num_tokens == call.everyone.num_tokens and call.granule == 1
        return call.everyone if everyone else picked, logits


class ITTDecoderLayer(GradientCheckpointingLayer):
    """One layer: plain LLaMA, looped, or thinking."""

    def __init__(self, config: ITTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        thinks = layer_idx in config.thinking["layers"]
        self.kind = config.thinking["kind"] if thinks else "none"
        self.switches = config.thinking
        self.num_steps = config.num_routed_steps + 1 if thinks else 1
        self.self_attn = ITTAttention(config, layer_idx)
        self.mlp = ITTMLP(config)
        self.input_layernorm = ITTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ITTRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.kind == "itt":
            self.thinking = ITTThinking(config)
        treats_skipped = self.switches["skip"] == "literal" or self.switches["reweight"] == "symmetric"
        changes_all = treats_skipped and self.switches["residual"] == "accumulate"
        picks_all = self.kind == "loop" or self.switches["routing"] == "none"
        self.keeps_keys = self.switches["attend"] == "all" and not changes_all and not picks_all

    def forward(
        self, hidden: Tensor, call: Call, past_key_values: ITTCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [b, c, h] -> the layer's result [b, c, h] and, if it thinks, who was picked [b, T-1, c]."""
        memory: DenseMemory | CachedMemory = DenseMemory(call.real, call.columns, call.starts)
        if past_key_values is not None:
            layer_cache = past_key_values.layers[self.layer_idx]
            memory = CachedMemory(
                layer_cache,
                call.columns,
                call.starts,
                num_steps=self.num_steps,
                everyone_real=call.everyone_real,
                real=call.real,
            )
        everyone = call.everyone
        keys = memory.exchange(0, everyone, *self._keys_values(hidden, everyone, call), everyone)
        state = everyone.put(hidden, self._f(everyone.take(hidden), everyone, call, keys))
        if self.kind == "none":
            return state, None
        if self.kind == "loop":
            return self._loop(state, call, memory), None
        return self._think(state, call, memory)

    def _keys_values(self, hidden: Tensor, tokens: Selection, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values [n, g, d] of `tokens` of hidden [b, c, h]."""
        normed = self.input_layernorm(tokens.fill_up(tokens.take(hidden)))
        return self.self_attn.keys_values(normed, tokens.take(call.cos), tokens.take(call.sin))

    def _f(self, rows: Tensor, tokens: Selection, call: Call, keys: Keys) -> Tensor:
        """The base layer, inner residuals included, on rows [n, h] of `tokens`."""
        num_tokens, rows = rows.shape[0], tokens.fill_up(rows)
        cos, sin = tokens.take(call.cos), tokens.take(call.sin)
        rows = rows + self.self_attn(self.input_layernorm(rows), cos, sin, tokens, keys)
        return (rows + self.mlp(self.post_attention_layernorm(rows)))[:num_tokens]

    def _loop(self, state: Tensor, call: Call, memory: DenseMemory | CachedMemory) -> Tensor:
        """x <- f(x) for the steps after the first. Source: Ng and Wang 2024."""
        everyone = call.everyone
        for step in range(1, self.num_steps):
            keys = memory.exchange(step, everyone, *self._keys_values(state, everyone, call), everyone)
            state = everyone.put(state, self._f(everyone.take(state), everyone, call, keys))
        return state

    def _phi(self, step: int) -> Tensor | None:
        """Gain [h] of a step, None for 1."""
        unused = self.switches["residual"] == "replace" or not self.switches["step_encoding"]
        return None if unused else self.thinking.step_encoding[step]

    def _think(self, state: Tensor, call: Call, memory: DenseMemory | CachedMemory) -> tuple[Tensor, Tensor]:
        """The routed steps on state [b, c, h] = f(x; x). Source: paper, Eq 4 to 7."""
        phi = self._phi(0)
        state = state if phi is None else state * phi.to(state.dtype)
        if self.keeps_keys and self.num_steps > 1:
            memory.begin_states(call.everyone, *self._keys_values(state, call.everyone, call))
        routed = self.switches["routing"] != "none" and self.num_steps > 1
        bars = self.thinking.bars(call) if routed else None
        picks: list[Tensor] = []
        for step in range(1, self.num_steps):
            state, picked = self._think_once(state, step, call, memory, bars=bars)
            picks.append(picked.mask & call.everyone_real.mask)
        if not picks:
            return state, call.everyone.mask.new_zeros((state.shape[0], 0, state.shape[1]))
        return state, torch.stack(picks, dim=1)

    def _think_once(
        self, state: Tensor, step: int, call: Call, memory: DenseMemory | CachedMemory, *, bars: Tensor | None
    ) -> tuple[Tensor, Selection]:
        """One routed step: the new state [b, c, h] and who was picked."""
        weight: Tensor | None = None
        picked = call.everyone
        if bars is not None:
            picked, logits = self.thinking.choose(state, step, call, bars)
            weight = gate(logits, self.switches["gate"])
        context = picked if self.switches["attend"] == "selected" else call.everyone
        if self.keeps_keys:
            keys = memory.read_states(step, picked) if picked.num_tokens else None
        elif context.num_tokens:
            keys = memory.exchange(step, context, *self._keys_values(state, context, call), picked)
        before = self._treat_skipped(state, step, call, picked=picked, weight=weight)
        if picked.num_tokens == 0:
            return before, picked
        assert keys is not None, "there is a query"
        rows = picked.take(state)
        new_rows = self._update(rows, self._f(rows, picked, call, keys), step, picked, weight)
        state = picked.put(before, new_rows)
        if self.keeps_keys and step + 1 < self.num_steps:
            memory.change_states(step, picked, *self._keys_values(state, picked, call))
        return state, picked

    def _update(self, rows: Tensor, thought: Tensor, step: int, picked: Selection, weight: Tensor | None) -> Tensor:
        """Combine rows [n, h] with their thought [n, h]."""
        if self.switches["residual"] == "replace":
            return thought
        if self.switches["update"] == "delta":
            thought = thought - rows
        alpha = self.switches["alpha"][step - 1]
        if weight is not None:
            gain = alpha * picked.take(weight)
        else:
            gain = None if alpha == 1.0 else rows.new_tensor(alpha).expand(rows.shape[0])
        return add_thought(rows, thought, gain=gain, phi=self._phi(step))

    def _treat_skipped(
        self, state: Tensor, step: int, call: Call, *, picked: Selection, weight: Tensor | None
    ) -> Tensor:
        """What tokens that are not picked become; state [b, c, h]. A share of 0 leaves the whole row alone."""
        if self.switches["residual"] == "replace":
            return state
        if self.switches["skip"] == "literal":
            phi = self._phi(step)
            skipped = state + (state if phi is None else phi.to(state.dtype) * state)
        elif self.switches["reweight"] == "symmetric" and weight is not None:
            skipped = state * weight.to(state.dtype)[..., None]
        else:
            return state
        stays = picked.mask | (call.shares[:, step - 1, None] == 0)
        return torch.where(stays[..., None], state, skipped)

"""Float64 reference of the method, token by token, with which every implementation and export is compared.

It follows the equations and shares no code with the package: Python loops over tokens, no batching. It reads weights by
their megatron-core names and the fields of the recipe's `model` and `thinking` sections (any object with those
attributes); everything derived from them is derived here again.

    result = reference_forward(weights, config.model, config.thinking, tokens)
    result["logits"]         # [s, V]
    result["selected"]       # {(layer_idx, step): sorted positions}, step = 1 .. T-1
    result["router_logits"]  # {(layer_idx, step): router logits [s]}, before any selection
    result["hidden_states"]  # one [s, h] per layer, after all its steps

Rotary angles and norms are float64: an implementation with rotary frequencies in float32 differs by about 1e-7, so give
it float64 frequencies before a closer comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Rows = dict[int, Array]  # position in the sequence -> vector


def reference_forward(
    weights: Mapping[str, Any],
    shape: Any,
    thinking: Any,
    tokens: Sequence[int],
    *,
    capacity: Sequence[float] | None = None,
    routing: str | None = None,
    temperature: float = 1.0,
    starts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Run one sequence through the whole model.

    `capacity` replaces `thinking.capacity`, `routing` replaces `thinking.routing`. The gate divides router logits by
    `temperature`; the selection and the logits that are returned do not. `starts` holds, per token, the position where
    its document begins: it attends to nothing before that, and counts positions from there.
    """
    matrices = {name: _as_array(value) for name, value in weights.items()}
    capacity = list(thinking.capacity if capacity is None else capacity)
    rule = thinking.routing if routing is None else routing
    rows: Rows = {
        position: matrices["embedding.word_embeddings.weight"][int(token)] for position, token in enumerate(tokens)
    }
    selected: dict[tuple[int, int], list[int]] = {}
    router_logits: dict[tuple[int, int], Array] = {}
    hidden_states: list[Array] = []
    for layer_idx in range(shape.num_layers):
        layer = BaseLayer(matrices, layer_idx, shape, starts)
        if not _thinks(layer_idx, thinking, shape.num_layers):
            rows = layer.apply(rows, rows)
        elif thinking.kind == "loop":
            for _ in range(len(thinking.capacity) + 1):
                rows = layer.apply(rows, rows)
        else:
            rows, selected_by_step, logits_by_step = _think(
                layer, rows, thinking, capacity, rule, temperature=temperature
            )
            selected |= {(layer_idx, step): positions for step, positions in selected_by_step.items()}
            router_logits |= {(layer_idx, step): values for step, values in logits_by_step.items()}
        hidden_states.append(np.stack([rows[position] for position in range(len(tokens))]))
    head = matrices.get("output_layer.weight", matrices["embedding.word_embeddings.weight"])
    final = matrices["decoder.final_layernorm.weight"]
    logits = np.stack([head @ _rms_norm(row, final, shape.norm_eps) for row in hidden_states[-1]])
    return {"logits": logits, "selected": selected, "router_logits": router_logits, "hidden_states": hidden_states}


def select_tokens(
    logits: Sequence[float], capacity: float, rule: str, quantiles: Sequence[float] | None = None
) -> list[int]:
    """Positions of the selected tokens: `logits` are one sequence's router logits, `capacity` is rho of the step.

    topk: the k = max(1, floor(rho s + 1/2)) largest. topp: the largest ones until their softmax adds up to rho.
    threshold: all above the quantile 1 - rho of the table. none: all. Ties go to the earlier token. Under every rule
    but none a capacity of 0 selects no token, and a capacity of 1 or more selects all.
    """
    positions = list(range(len(logits)))
    best_first = sorted(positions, key=lambda position: (-logits[position], position))
    if rule == "none":
        return positions
    if capacity == 0:
        return []
    if capacity >= 1:
        return positions
    if rule == "topk":
        return sorted(best_first[: max(1, math.floor(capacity * len(logits) + 0.5))])
    if rule == "threshold":
        assert quantiles is not None, "threshold routing needs the quantile table of the step"
        threshold = _threshold(quantiles, capacity)
        return [position for position in positions if logits[position] > threshold]
    assert rule == "topp", f"unknown routing {rule}"
    largest = logits[best_first[0]]
    total = math.fsum(math.exp(logit - largest) for logit in logits)
    selected: list[int] = []
    for position in best_first:
        selected.append(position)
        if math.fsum(math.exp(logits[other] - largest) for other in selected) / total >= capacity:
            break
    return sorted(selected)


def _threshold(quantiles: Sequence[float], capacity: float) -> float:
    """tau(rho): the table, linearly interpolated at 1 - rho; at the ends all tokens are selected, or none."""
    if capacity >= 1:
        return -math.inf
    if capacity <= 0:
        return math.inf
    index = (1 - capacity) * (len(quantiles) - 1)
    below = min(math.floor(index), len(quantiles) - 2)
    fraction = index - below
    return float(quantiles[below] * (1 - fraction) + quantiles[below + 1] * fraction)


def _think(
    layer: BaseLayer, rows: Rows, thinking: Any, capacities: Sequence[float], rule: str, *, temperature: float
) -> tuple[Rows, dict[int, list[int]], dict[int, Array]]:
    """All thinking steps of one layer: the base pass over every token, then one routed step per capacity."""
    num_tokens = len(rows)
    y = {position: layer.phi(0, thinking) * row for position, row in layer.apply(rows, rows).items()}
    selected_by_step: dict[int, list[int]] = {}
    logits_by_step: dict[int, Array] = {}
    for step, capacity in enumerate(capacities, start=1):
        logits = np.array([float(layer.router[step - 1] @ y[position]) for position in range(num_tokens)])
        if capacity == 0 and rule != "none":  # the step is omitted: no token is selected, none is skipped
            selected_by_step[step], logits_by_step[step] = [], logits
            continue
        quantiles = layer.quantiles[step - 1] if rule == "threshold" else None
        selected = select_tokens(logits.tolist(), capacity, rule, quantiles)
        gates = [1.0 if rule == "none" else _gate(logit / temperature, thinking.gate) for logit in logits]
        again = {position: y[position] for position in selected}
        context = y if thinking.attend == "all" else again  # y before this step
        refined = layer.apply(again, context, has_mlp=thinking.reuse == "layer")
        updated = {}
        for position in range(num_tokens):
            phi = layer.phi(step, thinking)
            if position not in refined:
                updated[position] = _skip(y[position], gates[position], phi, thinking)
            elif thinking.residual == "replace":
                updated[position] = refined[position]
            else:
                increment = refined[position] - (y[position] if thinking.update == "delta" else 0.0)
                factor = _alpha(thinking.alpha, step) * gates[position] * phi
                updated[position] = y[position] + factor * increment
        y, selected_by_step[step], logits_by_step[step] = updated, selected, logits
    return y, selected_by_step, logits_by_step


def _skip(row: Array, gate: float, phi: Array, thinking: Any) -> Array:
    """The update of a token that this step does not select."""
    if thinking.reweight == "symmetric":
        row = row * gate
    if thinking.skip == "literal":
        row = row + phi * row
    return row


def _gate(logit: float, kind: str) -> float:
    if kind == "tanh":
        return math.tanh(logit)
    assert kind == "sigmoid", f"unknown gate {kind}"
    return 1 / (1 + math.exp(-logit))


def _alpha(alpha: float | Sequence[float], step: int) -> float:
    return float(alpha[step - 1] if isinstance(alpha, Sequence) else alpha)


def _thinks(layer_idx: int, thinking: Any, num_layers: int) -> bool:
    assert num_layers > layer_idx
    if thinking.kind == "none":
        return False
    return layer_idx % 2 == 1 if thinking.layers == "every_other" else layer_idx in thinking.layers


class BaseLayer:
    """One base layer f(Q; C), with the weights of thinking if it has any."""

    def __init__(
        self, matrices: Mapping[str, Array], layer_idx: int, shape: Any, starts: Sequence[int] | None = None
    ) -> None:
        self.starts = starts
        prefix = f"decoder.layers.{layer_idx}."
        own = {name.removeprefix(prefix): value for name, value in matrices.items() if name.startswith(prefix)}
        self.num_heads = shape.num_attention_heads
        self.num_groups = shape.num_query_groups or shape.num_attention_heads
        self.head_size = shape.head_dim or shape.hidden_size // shape.num_attention_heads
        self.eps = shape.norm_eps
        self.frequencies, self.rotary_factor = rotary_frequencies(self.head_size, shape.rope_base, shape.rope_scaling)
        self.input_norm, self.mlp_norm = own["input_layernorm.weight"], own["pre_mlp_layernorm.weight"]
        self.qkv, self.projection = own["self_attention.linear_qkv.weight"], own["self_attention.linear_proj.weight"]
        self.qkv_bias = own.get("self_attention.linear_qkv.bias", 0.0)
        self.query_norm = own.get("self_attention.q_layernorm.weight")
        self.key_norm = own.get("self_attention.k_layernorm.weight")
        missing = np.empty((0, shape.hidden_size))  # a plain layer has none of these
        self.fc1, self.fc2 = own["mlp.linear_fc1.weight"], own["mlp.linear_fc2.weight"]
        self.router = own.get("thinking.router", missing)
        self.step_encoding = own.get("thinking.step_encoding", missing)
        self.quantiles = own.get("thinking.logit_quantiles", missing)

    def phi(self, step: int, thinking: Any) -> Array:
        """Step encoding, per channel; 1 if it is off, and where steps replace."""
        if not thinking.step_encoding or thinking.residual == "replace":
            return np.ones_like(self.input_norm)
        return self.step_encoding[step]

    def apply(self, queries: Rows, context: Rows, *, has_mlp: bool = True) -> Rows:
        """f(Q; C): attention of the rows Q over the rows C at or before them, MLP if any, the inner residuals."""
        cache = {position: self._project(row, position) for position, row in context.items()}
        outputs = {}
        for position, row in queries.items():
            attended = row + self.projection @ self._attend(self._project(row, position)[0], position, cache)
            outputs[position] = attended
            if has_mlp:
                gate, up = np.split(self.fc1 @ _rms_norm(attended, self.mlp_norm, self.eps), 2)
                outputs[position] = attended + self.fc2 @ (gate / (1 + np.exp(-gate)) * up)
        return outputs

    def _project(self, row: Array, position: int) -> tuple[list[Array], list[Array], list[Array]]:
        """Rotated queries (one per head), rotated keys and values (one per group) of one token.

        The fused weight holds, group after group, the query heads of the group, then its key, then its value.
        """
        heads = self.qkv @ _rms_norm(row, self.input_norm, self.eps) + self.qkv_bias
        heads = heads.reshape(-1, self.head_size)
        per_group = self.num_heads // self.num_groups
        queries, keys, values = [], [], []
        for group in range(self.num_groups):
            start = group * (per_group + 2)
            count = self._count(position)
            queries += [self._rotate(heads[start + head], self.query_norm, count) for head in range(per_group)]
            keys.append(self._rotate(heads[start + per_group], self.key_norm, count))
            values.append(heads[start + per_group + 1])
        return queries, keys, values

    def _attend(self, queries: list[Array], position: int, cache: Mapping[int, Any]) -> Array:
        visible = [other for other in sorted(cache) if position - self._count(position) <= other <= position]
        outputs = []
        for head, query in enumerate(queries):
            group = head // (self.num_heads // self.num_groups)
            logits = [float(query @ cache[other][1][group]) / math.sqrt(self.head_size) for other in visible]
            exponentials = [math.exp(logit - max(logits)) for logit in logits]
            total = math.fsum(exponentials)
            outputs.append(
                sum(value / total * cache[other][2][group] for value, other in zip(exponentials, visible, strict=True))
            )
        return np.concatenate(outputs)

    def _count(self, position: int) -> int:
        """The token's position in its document."""
        return position if self.starts is None else position - self.starts[position]

    def _rotate(self, head: Array, norm: Array | None, position: int) -> Array:
        """Norm of the head, if there is one, and rotary embedding by the position; channel j pairs with j + d/2."""
        half = self.head_size // 2
        head = self.rotary_factor * (head if norm is None else _rms_norm(head, norm, self.eps))
        rotated = np.empty_like(head)
        for channel, frequency in enumerate(self.frequencies):
            angle = position * frequency
            first, second = head[channel], head[channel + half]
            rotated[channel] = first * math.cos(angle) - second * math.sin(angle)
            rotated[channel + half] = second * math.cos(angle) + first * math.sin(angle)
        return rotated


def rotary_frequencies(head_size: int, base: float, scaling: Any | None) -> tuple[list[float], float]:
    """Frequency of each pair of channels, and the factor of a rotated head.

    llama3 divides frequencies with less than low_freq_factor turns in the trained length by `factor`, keeps those with
    more than high_freq_factor, and interpolates between them. yarn interpolates linearly in the channel, between the
    channels with beta_fast and with beta_slow turns.
    """
    plain = [base ** (-2 * channel / head_size) for channel in range(head_size // 2)]
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return [frequency / scaling.factor for frequency in plain], 1.0
    length, shares = scaling.original_max_position_embeddings, []
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        shares = [(length * frequency / (2 * math.pi) - low) / (high - low) for frequency in plain]
        factor = 1.0
    else:
        edges = []
        for turns in (scaling.beta_fast or 32, scaling.beta_slow or 1):
            edges.append(head_size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base)))
        first, last = (edges[0], edges[1]) if scaling.truncate is False else (math.floor(edges[0]), math.ceil(edges[1]))
        first, last = max(first, 0), min(last, head_size - 1)
        shares = [1 - (channel - first) / (last - first) for channel in range(len(plain))]
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    return [
        frequency * (share + (1 - share) / scaling.factor) for frequency, share in zip(plain, shares, strict=True)
    ], factor


def _rms_norm(row: Array, weight: Array, eps: float) -> Array:
    return row / math.sqrt(float(np.mean(row * row)) + eps) * weight


def _as_array(value: Any) -> Array:
    """A float64 copy of a numpy array or a torch tensor."""
    return np.asarray(value.detach().cpu().double() if hasattr(value, "detach") else value, dtype=np.float64)

"""Token routing and the combination of thinking steps: pure functions of tensors, and the selections they produce.

Shape legend: b rows of the batch, s tokens of this call, n selected tokens of the whole batch, k most selected tokens
of a row, h hidden, d head size, T thinking steps. Routed steps are 1 .. T-1; tensors of length T-1 are indexed t-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_QUANTILE_INTERVALS = 1024
UNUSED = -1  # cache position of an unused place, position of a padding token
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


@dataclass(frozen=True)
class Selection:
    """Some tokens of a [b, s] block: flat for linear layers, padded per row for attention.

    row, col, rank [n]: batch row, column in the block, and number of selected tokens before it in its row. counts:
    selected tokens per row, on the host. width: places per row after padding.
    multiple_of: sizes are padded to multiples of it. BLAS and attention kernels treat the last few rows differently,
    so without padding the last bits of a token would depend on how many later tokens are selected.
    """

    mask: Tensor
    row: Tensor
    col: Tensor
    rank: Tensor
    counts: tuple[int, ...]
    width: int
    multiple_of: int = 1

    @staticmethod
    def from_mask(mask: Tensor, multiple_of: int = 1) -> Selection:
        """Select the tokens where mask [b, s] is true."""
        row, col = mask.nonzero(as_tuple=True)
        if mask.shape[1] == 1:
            rank, counts = col, tuple(map(int, mask[:, 0].tolist()))
        else:
            rank, counts = (mask.cumsum(dim=1) - 1)[row, col], tuple(mask.sum(dim=1).tolist())
        return Selection(mask, row, col, rank, counts, _round_up(max(counts), multiple_of), multiple_of)

    @staticmethod
    def all_of(batch: int, length: int, device: torch.device, multiple_of: int = 1) -> Selection:
        """Select all tokens of a block, without waiting for the device."""
        col = torch.arange(length, device=device).repeat(batch)
        row = torch.arange(batch, device=device).repeat_interleave(length)
        mask = torch.ones((batch, length), dtype=torch.bool, device=device)
        return Selection(mask, row, col, col, (length,) * batch, length, multiple_of)

    def masked(self, mask: Tensor) -> MaskedSelection:
        """The tokens of a whole block where mask [b, s] is true, in static shapes."""
        shape = {name: getattr(self, name) for name in ("row", "col", "rank", "counts", "width", "multiple_of")}
        return MaskedSelection(mask=mask, **shape)

    @property
    def num_tokens(self) -> int:
        return self.row.shape[0]

    @property
    def is_even(self) -> bool:
        """Whether every row selects `width` tokens, so that padding is a view."""
        return min(self.counts) == self.width

    @property
    def is_all(self) -> bool:
        return self.is_even and self.width == self.mask.shape[1]

    def take(self, block: Tensor) -> Tensor:
        """Gather the selected tokens: block [b, s, ...] -> [n, ...]."""
        return block.flatten(0, 1) if self.is_all else block[self.row, self.col]

    def put(self, block: Tensor, flat: Tensor) -> Tensor:
        """Return a copy of block [b, s, ...] with the selected tokens replaced by flat [n, ...]."""
        return flat.reshape(block.shape) if self.is_all else block.index_put((self.row, self.col), flat)

    def pad(self, flat: Tensor, fill: float = 0) -> Tensor:
        """flat [n, ...] -> [b, width, ...], unused places filled with `fill`."""
        shape = (self.mask.shape[0], self.width, *flat.shape[1:])
        if self.is_even:
            return flat.reshape(shape)
        return flat.new_full(shape, fill).index_put((self.row, self.rank), flat)

    def unpad(self, padded: Tensor) -> Tensor:
        """padded [b, width, ...] -> [n, ...]."""
        return padded.flatten(0, 1) if self.is_even else padded[self.row, self.rank]

    def pad_rows(self, flat: Tensor) -> Tensor:
        """Append zero rows to flat [n, ...] up to a multiple of `multiple_of`."""
        missing = _round_up(flat.shape[0], self.multiple_of) - flat.shape[0]
        return torch.cat((flat, flat.new_zeros((missing, *flat.shape[1:])))) if missing else flat


class MaskedSelection(Selection):
    """A selection in static shapes: all tokens are taken and computed, and those of the mask are put back."""

    def put(self, block: Tensor, flat: Tensor) -> Tensor:
        """As Selection.put; flat [b * s, ...] holds all tokens."""
        mask = self.mask.reshape(*self.mask.shape, *(1 for _ in block.shape[2:]))
        return torch.where(mask, flat.reshape(block.shape), block)


@dataclass(frozen=True)
class CallInputs:
    """Inputs that all layers of one forward call share.

    position_embeddings: cos, sin [b, s, d]; position_ids, cache_position [b, s], the latter counts padding too;
    document_starts [b, s]: cache position of the first token of each token's document, None without packed documents;
    unpadded: the tokens that are not padding, the same object as all_tokens without padding; thinking_budget [b, T-1];
    is_static: no shape depends on the data, selections are masks.
    """

    position_embeddings: tuple[Tensor, Tensor]
    position_ids: Tensor
    cache_position: Tensor
    document_starts: Tensor | None
    all_tokens: Selection
    unpadded: Selection
    thinking_budget: Tensor
    routing: str
    multiple_of: int
    is_static: bool = False


def _round_up(count: int, multiple_of: int) -> int:
    return -(-count // multiple_of) * multiple_of


def router_logits(hidden_states: Tensor, router: Tensor) -> Tensor:
    """hidden_states [..., h], router [h] of one step -> logits [...], in float32 (float64 for a float64 model).

    bf16 logits tie often, and the kernel would then decide which token is selected. Source: paper, Eq 5.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.to(dtype) @ router.to(dtype)


def gate(logits: Tensor, kind: str) -> Tensor:
    """Router weights of selected tokens. ValueError if `kind` is not one of `GATES`."""
    if kind not in GATES:
        raise ValueError(f"thinking.gate is {kind!r}; use one of {sorted(GATES)}.")
    return GATES[kind](logits)


def num_selected(capacity: Tensor, length: Tensor) -> Tensor:
    """k = max(1, floor(capacity * length + 0.5)), and 0 for a capacity of 0; all [b]."""
    count = torch.floor(capacity.double() * length + 0.5).long().clamp(min=1)
    return torch.where(capacity > 0, torch.minimum(count, length), torch.zeros_like(count))


def order_by_logits(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Columns of each row by descending logit, padding last, ties to the earlier token: [b, s] -> [b, s].

    Logits are rounded to 2^-16 of the largest magnitude of the row (2^-40 in float64), as in training: tokens with
    equal hidden states differ only by rounding.
    """
    largest = logits.abs().masked_fill(~attention_mask, 0.0).amax(dim=1, keepdim=True)
    bits = 40 if logits.dtype == torch.float64 else 16
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
    rounded = torch.round(logits / unit).masked_fill(~attention_mask, float("-inf"))
    return rounded.sort(dim=1, descending=True, stable=True).indices


def select_topk(logits: Tensor, capacity: Tensor, attention_mask: Tensor) -> Tensor:
    """Select the `capacity` [b] of highest logits [b, s] of each row -> mask [b, s]. Ties go to the earlier token.

    Paper: silent on padding. Ours: padding (attention_mask false) is never selected and does not count towards k.
    Source: paper, adaptive token routing.
    """
    order = order_by_logits(logits, attention_mask)
    count = num_selected(capacity, attention_mask.sum(dim=1))
    first = torch.arange(logits.shape[1], device=logits.device) < count[:, None]
    return torch.zeros_like(attention_mask).scatter(1, order, first) & attention_mask


def select_topp(logits: Tensor, capacity: Tensor, attention_mask: Tensor) -> Tensor:
    """Select the smallest set of highest logits whose softmax over the row reaches `capacity`; ties as in top-k.

    A capacity of 1 selects every token by definition: a cumulative sum of probabilities can round to 1 early.
    """
    probabilities = logits.double().masked_fill(~attention_mask, float("-inf")).softmax(dim=1)
    order = order_by_logits(logits, attention_mask)
    before = torch.nn.functional.pad(probabilities.gather(1, order).cumsum(dim=1)[:, :-1], (1, 0))
    first = (before < capacity[:, None]) & (capacity > 0)[:, None] | (capacity >= 1)[:, None]
    return torch.zeros_like(attention_mask).scatter(1, order, first) & attention_mask


def select_threshold(logits: Tensor, threshold: Tensor, attention_mask: Tensor) -> Tensor:
    """Select the tokens whose logit [b, s] exceeds threshold [b]; -inf selects all. Causal: uses one token only."""
    threshold = threshold[:, None].to(logits.dtype)
    return ((logits > threshold) | (threshold == float("-inf"))) & attention_mask


ROUTING_RULES = {"threshold": select_threshold, "topk": select_topk, "topp": select_topp}


def thresholds(logit_quantiles: Tensor, thinking_budget: Tensor) -> Tensor:
    """tau(rho), the linear interpolation of logit_quantiles [T-1, 1025] at 1 - rho: thinking_budget [b, T-1] -> same.

    A budget of 1 gives -inf (all tokens), a budget of 0 gives +inf (none).
    """
    place = (1.0 - thinking_budget.double()) * NUM_QUANTILE_INTERVALS
    low = place.floor().long().clamp(0, NUM_QUANTILE_INTERVALS - 1)
    step = torch.arange(thinking_budget.shape[1], device=thinking_budget.device)
    below, above = logit_quantiles[step, low], logit_quantiles[step, low + 1]
    tau = torch.lerp(below, above, (place - low).to(logit_quantiles.dtype))
    return tau.masked_fill(thinking_budget >= 1, float("-inf")).masked_fill(thinking_budget <= 0, float("inf"))


def accumulate(hidden_states: Tensor, output: Tensor, *, weight: Tensor | None, step_encoding: Tensor | None) -> Tensor:
    """hidden_states + weight * (step_encoding * output): [n, h], weight [n], step_encoding [h]; None means 1.

    Source: paper, Eq 1, 4, 6 and 7.
    """
    increment = output if step_encoding is None else step_encoding.to(hidden_states.dtype) * output
    return hidden_states + (increment if weight is None else weight.to(hidden_states.dtype)[:, None] * increment)


def replace(_hidden_states: Tensor, output: Tensor, **_unused: Tensor | None) -> Tensor:
    """Ablation without residual thinking connections: the output replaces the hidden states."""
    return output


RESIDUALS: dict[str, Callable[..., Tensor]] = {"accumulate": accumulate, "replace": replace}


def resolve_routing(thinking: dict[str, Any], routing: str | None, *, training: bool, has_past: bool) -> str:
    """Routing rule of a call: the argument, else the trained rule in training mode, else threshold. none: no router."""
    if routing is not None and routing not in ROUTING_RULES:
        raise ValueError(f"routing is {routing!r}; use one of {list(ROUTING_RULES)}.")
    if thinking["kind"] != "itt" or thinking["routing"] == "none" or not thinking["capacity"]:
        return "none"
    routing = routing or (thinking["routing"] if training else "threshold")
    if routing != "threshold" and has_past:
        raise ValueError(
            f"routing={routing} compares the tokens of a whole sequence, so it cannot continue from a cache; use "
            "routing='threshold' or use_cache=False."
        )
    return routing


def require_later(condition: Tensor, message: str) -> None:
    """Fail with `message` unless `condition` holds on the device, without waiting for it."""
    torch._assert_async(condition, message)


def resolve_budget(config: Any, thinking_budget: Any, routing: str, batch: int, *, is_static: bool = False) -> Tensor:
    """Thinking budget [b, T-1] float64 from a list, a list per row, or the model's default.

    is_static: check the values of a tensor without waiting for its device.
    """
    if thinking_budget is not None and routing == "none":
        raise ValueError("thinking_budget was given, but this model has no router that could follow it.")
    if thinking_budget is None:
        thinking_budget = config.thinking_budget or config.thinking["capacity"]
    budget, num_routed = budget_tensor(thinking_budget), config.num_routed_steps
    if budget.shape not in ((num_routed,), (batch, num_routed)):
        raise ValueError(
            f"thinking_budget has shape {list(budget.shape)}; give {num_routed} fractions of tokens, one per routed "
            f"step, or {batch} rows of {num_routed}."
        )
    is_valid = ((budget >= 0) & (budget <= 1)).all()
    if is_static:
        require_later(is_valid, "each fraction of thinking_budget must be in [0, 1]")
    elif not bool(is_valid):
        raise ValueError(f"thinking_budget is {budget.tolist()}; each fraction of tokens must be in [0, 1].")
    return budget.expand(batch, num_routed)


def budget_tensor(thinking_budget: Any) -> Tensor:
    """A caller's budget as float64. ValueError unless it is a list of numbers or of rows of equal length."""
    try:
        if isinstance(thinking_budget, Tensor):
            return thinking_budget.to(torch.float64)
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in thinking_budget]
        return torch.as_tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"thinking_budget is {thinking_budget!r}; give a list of fractions of tokens, one per routed step, or one "
            "such list per row."
        ) from None

"""`ThinkingLayer`: a megatron-core transformer layer that thinks again about the tokens its router picks.

Shapes: s whole sequence, p = s / tensor-parallel degree under sequence parallelism (else p = s), b micro-batch,
h hidden, k tokens picked per sequence, q = k / degree under sequence parallelism (else q = k), t routed step.

How it is parallel. Heads and MLP columns are split over tensor-parallel ranks as in any megatron-core layer. Under
sequence parallelism a layer's input lies in parts of the sequence, but the choice of tokens is one choice over the
whole. So the base pass runs as ever; then two all-gathers give every rank the router logits and the states of all
tokens. Every rank scores its own part, and all make the same choice from the gathered logits while the states are
still on their way. The k picked rows are divided evenly: rank r carries rows r*q .. (r+1)*q through the residual path,
the norms and the MLP. Shapes are static, and a routed step costs four exchanges of k rows, where a full pass costs four
of s rows. Every use of the gathered logits and states is a partial one (own rows, own heads), so its gradient is summed
over ranks by the gather's reduce-scatter.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model import routed_attention, routing, thinking
from megatron_itt.model.router import ThinkingParameters
from megatron_itt.model.trace import RoutingControl, RoutingPlan
from megatron_itt.parallel.async_gather import PendingGather, begin_gather


class ThinkingLayer(TransformerLayer):
    """One full pass over all tokens, then T-1 routed steps. Source: paper, sections 3.2 and 3.3.

    Parameters are those of `TransformerLayer` under their own names, and `thinking.*` (see `ThinkingParameters`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        thinking: ThinkingConfig,
        layer_idx: int,
        control: RoutingControl,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.switches = thinking
        self.layer_idx = layer_idx
        self.control = control
        self.thinking = ThinkingParameters(config, thinking)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [p, b, h] -> the same shape, and megatron-core's cross-attention context (always None)."""
        plan = self.control.plan(self.switches)
        full_pass = partial(self._full_pass, kwargs=kwargs)
        think = partial(self._think, plan=plan, kwargs=kwargs)
        recompute = self.switches.recompute if torch.is_grad_enabled() else "none"
        if recompute == "layer":
            return tensor_parallel.checkpoint(lambda hidden: think(full_pass(hidden)), False, hidden_states), None
        hidden = full_pass(hidden_states)
        if recompute == "routed":
            return tensor_parallel.checkpoint(think, False, hidden), None
        return think(hidden), None

    def _full_pass(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The base layer over all tokens. [p, b, h] -> [p, b, h]."""
        return super().forward(hidden, **kwargs)[0]

    def _think(self, hidden: Tensor, plan: RoutingPlan, kwargs: dict[str, Any]) -> Tensor:
        """phi_0 and all routed steps. [p, b, h] -> [p, b, h]."""
        gain = self.thinking.gain(0)
        if gain is not None:
            hidden = gain.to(hidden.dtype) * hidden
        if any(plan.shares) and plan.rule == "topk":
            hidden = self._think_in_rows(hidden, plan, kwargs["rotary_pos_emb"], kwargs.get("attention_mask"))
        elif any(plan.shares):
            for step, share in enumerate(plan.shares, start=1):
                if share > 0:
                    hidden = self._think_masked(hidden, step, plan, kwargs)
        return self._touch_parameters(hidden, plan)

    def _think_in_rows(self, hidden: Tensor, plan: RoutingPlan, rotary: Tensor, mask: Tensor | None) -> Tensor:
        """Routed steps with a fixed number of tokens: only the picked rows are computed. [p, b, h] -> [p, b, h].

        mask: the full pass's, bool [b, 1, s, s], where it is not causal alone.
        """
        steps = [step for step, share in enumerate(plan.shares, start=1) if share > 0]
        arriving_logits = self._begin_gather(self._score(hidden, steps[0]))  # [p, b] -> [s, b]
        arriving_states = self._begin_gather(hidden)  # [p, b, h] -> [s, b, h]
        # Until the states arrive: what needs this layer's weights and the logits alone.
        angles = routed_attention.Angles.of(rotary, hidden.dtype)
        projections = routed_attention.Projections.of(self) if self.switches.attend == "all" else None
        logits = arriving_logits.wait()
        positions = self._pick(logits, steps[0], plan)
        states = arriving_states.wait()
        keys_values: routed_attention.KeysValues | None = None
        changed: Tensor | None = None  # positions whose keys and values are out of date
        for step in steps:
            if step > steps[0]:
                logits = self._score(states, step)
                positions = self._pick(logits, step, plan)
            rows = thinking.take_rows(states, positions)  # [k, b, h]
            if projections is not None:
                keys_values = routed_attention.refresh_keys_values(
                    self, keys_values, states, changed, projections=projections, angles=angles
                )
                context = routed_attention.attend_all(
                    self, rows, positions, keys_values, projections=projections, angles=angles, mask=mask
                )
            else:
                context = routed_attention.attend_selected(self, rows, positions, angles=angles, mask=mask)
            attended = self.self_attention.linear_proj(context)
            own = self._own_part(rows)  # [k, b, h] -> [q, b, h]
            result = self._finish_pass(attended, own)
            states = self._update_rows(
                states, positions, own, result, logits=logits, step=step, temperature=plan.temperature
            )
            # Where skipped tokens change too, every key and value is out of date.
            changed = None if self._changes_skipped else positions
        # Even after the last step every rank gathered all increments: whose part of the sequence a row lies in depends
        # on the data, and so would the sizes of a smaller exchange, for which the host would have to wait.
        return self._own_part(states)

    def _score(self, states: Tensor, step: int) -> Tensor:
        """Router logits of all rows or of a part of them. [s, b, h] -> [s, b].

        Picked rows alone teach the router (`_update_rows`), unless skipped ones are scaled by their logits too.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.switches.reweight == "symmetric"):
            return self.thinking.logits(states, step)

    def _pick(self, logits: Tensor, step: int, plan: RoutingPlan) -> Tensor:
        """The tokens that think at this step. logits [s, b] -> positions [k, b], ascending."""
        share, compared = plan.shares[step - 1], logits.detach()
        count = routing.count_picked(share, logits.shape[0], multiple=self._num_parts)
        if plan.real is not None:
            compared = routing.fill_with_padding(
                compared, plan.real, share=share, count=count, multiple=self._num_parts
            )
        positions = routing.pick_topk(compared, count)
        if plan.recorder is not None:
            plan.record(self.layer_idx, step, logits, routing.positions_to_mask(positions, logits.shape[0]))
        return positions

    def _update_rows(
        self,
        states: Tensor,
        positions: Tensor,
        rows: Tensor,
        result: Tensor,
        *,
        logits: Tensor,
        step: int,
        temperature: float,
    ) -> Tensor:
        """Write what came of this rank's rows [q, b, h] into the states [s, b, h]; tokens not picked stay."""
        if self.switches.residual == "replace":
            return thinking.put_rows(states, positions, self._gather_sequence(result))
        if self.switches.update == "delta":
            result = result - rows
        own_logits = logits.gather(0, self._own_part(positions))  # [q, b]
        if not logits.requires_grad:
            own_logits = self.thinking.picked_logits(own_logits, rows, step)
        weights = thinking.gate_scores(own_logits / temperature, self.switches.gate)
        gain = self.thinking.gain(step)
        increment = thinking.step_increment(result, weights, self.switches.alpha_per_step[step - 1], gain)
        if self._changes_skipped:
            skipped = ~routing.positions_to_mask(positions, states.shape[0])
            all_weights = thinking.gate_scores(logits / temperature, self.switches.gate)
            states = self._rescale_skipped(states, skipped, all_weights, gain)
        return thinking.add_rows(states, positions, self._gather_sequence(increment))

    def _finish_pass(self, attended: tuple[Tensor, Tensor | None], rows: Tensor) -> Tensor:
        """The part of a transformer layer after attention: residual, norm, MLP, residual. [q, b, h] -> [q, b, h]."""
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            rows = add(attended, rows, self.hidden_dropout)
        return self._forward_mlp(rows)

    def _think_masked(self, hidden: Tensor, step: int, plan: RoutingPlan, kwargs: dict[str, Any]) -> Tensor:
        """A routed step whose number of tokens depends on the data: all rows are computed, the picked ones kept.

        Shapes stay static, so pipelines and overlapped communication work; the price is a full pass per step.
        hidden [p, b, h] -> [p, b, h].
        """
        share = plan.shares[step - 1]
        if plan.rule == "none":
            return self._apply_masked(hidden, step, None, None, kwargs)
        logits = self.thinking.logits(hidden, step)  # [p, b]
        whole = self._gather_sequence(logits.detach())  # [s, b]
        if plan.rule == "topp":
            picked = routing.pick_topp(whole if plan.real is None else whole.masked_fill(~plan.real, -math.inf), share)
        else:
            assert plan.rule == "threshold", f"unknown routing {plan.rule}"
            assert self.thinking.logit_quantiles is not None, "a routed step has its quantiles"
            tau = routing.threshold_for(share, self.thinking.logit_quantiles[step - 1])
            picked = routing.pick_above(whole, tau.to(whole.dtype))
        if plan.real is not None:
            picked = picked & plan.real
        plan.record(self.layer_idx, step, whole, picked)
        if self.switches.attend == "selected":
            forbidden = routed_attention.forbid_skipped_keys(picked, kwargs.get("attention_mask"))
            kwargs = {**kwargs, "attention_mask": forbidden}
        return self._apply_masked(hidden, step, self._own_part(picked), logits / plan.temperature, kwargs)

    def _apply_masked(
        self, hidden: Tensor, step: int, picked: Tensor | None, logits: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """One routed step over all rows; `picked` and `logits` [p, b] are None where every token thinks with w = 1."""
        result = self._full_pass(hidden, kwargs)
        if self.switches.residual == "replace":
            return result if picked is None else torch.where(picked.unsqueeze(-1), result, hidden)
        if self.switches.update == "delta":
            result = result - hidden
        weights = None if logits is None else thinking.gate_scores(logits, self.switches.gate)
        gain = self.thinking.gain(step)
        increment = thinking.step_increment(result, weights, self.switches.alpha_per_step[step - 1], gain)
        if picked is None or weights is None:
            return hidden + increment
        if self._changes_skipped:
            hidden = self._rescale_skipped(hidden, ~picked, weights, gain)
        return torch.where(picked.unsqueeze(-1), hidden + increment, hidden)

    @property
    def _changes_skipped(self) -> bool:
        return self.switches.reweight == "symmetric" or self.switches.skip == "literal"

    def _rescale_skipped(self, hidden: Tensor, skipped: Tensor, weights: Tensor, gain: Tensor | None) -> Tensor:
        return thinking.rescale_skipped(
            hidden,
            skipped,
            reweight=self.switches.reweight,
            skip=self.switches.skip,
            weights=weights,
            step_encoding=gain,
        )

    def _touch_parameters(self, hidden: Tensor, plan: RoutingPlan) -> Tensor:
        """Give unused thinking parameters a zero gradient: overlapped gradient reduction waits for every parameter."""
        used = self.thinking.uses_step_encoding and plan.rule != "none" and all(plan.shares)
        if used or not (torch.is_grad_enabled() and hidden.requires_grad):
            return hidden
        unused = torch.stack([parameter.sum() for parameter in self.thinking.parameters()]).sum()
        return hidden + 0.0 * unused.to(hidden.dtype)

    @property
    def _num_parts(self) -> int:
        """Into how many parts the sequence is divided."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def _begin_gather(self, part: Tensor) -> PendingGather:
        """[p, b, ...] -> [s, b, ...], which its `wait` gives; backward sums the ranks' partial gradients."""
        return begin_gather(part, self.tp_group if self.config.sequence_parallel else None)

    def _gather_sequence(self, part: Tensor) -> Tensor:
        """The same at once."""
        return self._begin_gather(part).wait()

    def _own_part(self, whole: Tensor) -> Tensor:
        """This rank's part along the first dimension."""
        if self._num_parts == 1:
            return whole
        return whole.chunk(self._num_parts, dim=0)[self.tp_group.rank()]

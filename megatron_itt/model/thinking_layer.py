"""`ThinkingLayer`: a megatron-core transformer layer that computes selected tokens again.

    y = phi_0 * f(x)                                        base pass
    for t in 1 .. T-1:
        logits = <r_t, y>                                   router
        selected = top-k of logits                          routing rule
        y[selected] += alpha_t * gate(logits) * phi_t * f(y)[selected]

Shapes: s whole sequence; p = s / tensor-parallel degree under sequence parallelism (else p = s); b micro-batch;
h hidden; k tokens selected per sequence; q = k / degree under sequence parallelism (else q = k).

Under sequence parallelism the layer's input is sharded over the sequence, and tokens are selected from the whole of it.
After the base pass two all-gathers give every rank the router logits and the hidden states of all tokens; all ranks
make the same selection while the hidden states are still being sent. The selected rows are divided evenly: rank r
carries rows r*q .. (r+1)*q through the residual path, the norms and the MLP. A routed step costs four collectives of k
rows, a base pass four of s rows. Every use of the gathered tensors is partial (own rows, own heads), so the gather's
reduce-scatter sums their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_itt.config.model import ThinkingConfig
from megatron_itt.model import step_update
from megatron_itt.model.attention import ATTEND, selected_keys_mask
from megatron_itt.model.router import ThinkingParameters
from megatron_itt.model.routing import positions_to_mask
from megatron_itt.model.routing_control import RoutingControl, RoutingPlan
from megatron_itt.model.step_update import GatheredTokens, MaskedTokens, SelectedTokens, choose
from megatron_itt.parallel.async_gather import SequenceShards


class ThinkingLayer(TransformerLayer):
    """One base pass over all tokens, then T-1 routed steps. Source: paper, sections 3.2 and 3.3.

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
        self.switches, self.layer_idx, self.control = thinking, layer_idx, control
        self.thinking = ThinkingParameters(config, thinking)
        self.shards = SequenceShards(self.tp_group if config.sequence_parallel else None)
        self.gate = choose("gate", thinking.gate, step_update.GATES)
        self.update = choose("residual", thinking.residual, RESIDUALS)
        self.attend = choose("attend", thinking.attend, ATTEND)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [p, b, h] -> the same shape, and megatron-core's cross-attention context (always None)."""
        plan = self.control.plan(self.switches, training=self.training)
        base_pass = partial(self._base_pass, kwargs=kwargs)
        think = partial(self._think, plan=plan, kwargs=kwargs)
        recompute = self.switches.recompute if torch.is_grad_enabled() else "none"
        if recompute == "layer":
            return tensor_parallel.checkpoint(lambda hidden: think(base_pass(hidden)), False, hidden_states), None
        hidden_states = base_pass(hidden_states)
        if recompute == "routed":
            return tensor_parallel.checkpoint(think, False, hidden_states), None
        return think(hidden_states), None

    def _base_pass(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The base layer over all tokens. [p, b, h] -> [p, b, h]."""
        return super().forward(hidden_states, **kwargs)[0]

    def _attention_pass(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The base layer over all tokens without its MLP. [p, b, h] -> [p, b, h]."""
        return self._forward_attention(hidden_states, **kwargs)[0]

    def _think(self, hidden_states: Tensor, plan: RoutingPlan, kwargs: dict[str, Any]) -> Tensor:
        """phi_0 and all routed steps. [p, b, h] -> [p, b, h]."""
        hidden_states = self.thinking(hidden_states)
        if plan.steps:
            run_steps = self._gathered_steps if plan.rule.is_static else self._masked_steps
            hidden_states = run_steps(hidden_states, plan, kwargs)
        return self._touch_parameters(hidden_states, plan)

    def _gathered_steps(self, hidden_states: Tensor, plan: RoutingPlan, kwargs: dict[str, Any]) -> Tensor:
        """Routed steps with static numbers of tokens: only the selected rows are computed. [p, b, h] -> [p, b, h]."""
        wait_for_logits = self.shards.begin_gather(
            self._router_logits(hidden_states, plan.steps[0], plan, is_whole=False)
        )
        wait_for_states = self.shards.begin_gather(hidden_states)
        # Before the hidden states arrive: everything that needs the weights and the logits alone.
        rotary = self.self_attention.rotary_table(kwargs["rotary_pos_emb"], hidden_states.dtype)
        attend = self.attend(self.self_attention, self.input_layernorm, rotary, kwargs.get("attention_mask"))
        logits = wait_for_logits()  # [s, b]
        tokens = self._gathered(logits, plan.steps[0], plan)
        hidden_states = wait_for_states()  # [s, b, h]
        changed: Tensor | None = None
        for step in plan.steps:
            if step > plan.steps[0]:
                logits = self._router_logits(hidden_states, step, plan, is_whole=True)
                tokens = self._gathered(logits, step, plan)
            states = step_update.gather_tokens(hidden_states, tokens.positions)  # [k, b, h]
            attended = attend(states, tokens, hidden_states, changed)
            rows = self.shards.own(states)  # [q, b, h]
            result = self._after_attention(attended, rows)
            scaling = {"step": step, "logits": logits, "temperature": plan.temperature}
            hidden_states = self.update(self, hidden_states, tokens, rows, result, **scaling)
            changed = None if self._changes_skipped else tokens.positions
        # Every rank gathers all increments, after the last step too: their shards of the sequence depend on the data,
        # and so would the sizes of a smaller collective, for which the host would have to wait.
        # A view would keep the whole sequence alive, and pipelines refuse to free it after sending.
        own = self.shards.own(hidden_states)
        return own.clone() if self.shards.num > 1 else own

    def _masked_steps(self, hidden_states: Tensor, plan: RoutingPlan, kwargs: dict[str, Any]) -> Tensor:
        """Routed steps whose numbers of tokens depend on the data: base passes, of which the selected rows are kept.

        Shapes stay static, so that pipelines and overlapped communication work. [p, b, h] -> [p, b, h].
        """
        for step in plan.steps:
            logits: Tensor | None = None
            tokens, step_kwargs = MaskedTokens(None), kwargs
            if plan.rule.select is not None:
                logits = self._with_z_loss(self.thinking.router_logits(hidden_states, step), plan)  # [p, b]
                whole = self.shards.gather(logits.detach())
                selected = self._by_rule(plan.rule.select, whole, step, plan)  # [s, b]
                plan.record(self.layer_idx, step, whole, selected)
                tokens = MaskedTokens(self.shards.own(selected))
                if self.switches.attend == "selected":
                    mask = selected_keys_mask(selected, kwargs.get("attention_mask"))
                    step_kwargs = {**kwargs, "attention_mask": mask}
            compute = self._base_pass if self.switches.steps_have_mlp else self._attention_pass
            result = compute(hidden_states, step_kwargs)
            scaling = {"step": step, "logits": logits, "temperature": plan.temperature}
            hidden_states = self.update(self, hidden_states, tokens, hidden_states, result, **scaling)
        return hidden_states

    def _router_logits(self, hidden_states: Tensor, step: int, plan: RoutingPlan, *, is_whole: bool) -> Tensor:
        """Router logits of any rows, [s, b, h] -> [s, b].

        Only the selected rows train the router (`_accumulate`), unless skipped ones are scaled by their logits too, or
        all are kept small by a z-loss.
        """
        trains_all = self.switches.reweight == "symmetric" or plan.z_loss > 0.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_all):
            return self._with_z_loss(self.thinking.router_logits(hidden_states, step), plan, is_whole=is_whole)

    def _with_z_loss(self, logits: Tensor, plan: RoutingPlan, *, is_whole: bool = False) -> Tensor:
        """The same logits, [s, b] or [p, b], the mean of whose squares over the micro-batch adds to the loss.

        Of whole sequences under sequence parallelism each rank adds its own shard.
        """
        if plan.z_loss == 0.0 or not logits.requires_grad:
            return logits
        weights = torch.ones_like(logits, requires_grad=False)
        if plan.padding_mask is not None:
            weights *= plan.padding_mask if is_whole else self.shards.own(plan.padding_mask)
        num_tokens = weights.numel() * (1 if is_whole else self.shards.num)
        total = num_tokens if plan.padding_mask is None else plan.padding_mask.sum()
        if is_whole and self.shards.num > 1:
            own = torch.zeros_like(weights)
            self.shards.own(own).fill_(1.0)
            weights *= own
        return step_update.add_squares(logits, plan.z_loss / total * weights)

    def _gathered(self, logits: Tensor, step: int, plan: RoutingPlan) -> GatheredTokens:
        """Select and record the tokens of a step by a static rule. logits [s, b]."""
        logits = logits.detach()
        positions = self._by_rule(plan.rule.select, logits, step, plan)
        selected = dropped = None
        if plan.rule.confirm is not None:
            confirmed = self._by_rule(plan.rule.confirm, logits, step, plan)
            selected, dropped = confirmed.gather(0, positions), confirmed.scatter(0, positions, False)
        if plan.recorder is not None:
            mask = positions_to_mask(positions, logits.shape[0], selected)
            plan.record(self.layer_idx, step, logits, mask, dropped=dropped)
        return GatheredTokens(positions, self.shards, selected)

    def _by_rule(self, rule: Callable[..., Tensor] | None, logits: Tensor, step: int, plan: RoutingPlan) -> Tensor:
        """The tokens of a step by a function of the routing rule: positions [k, b] or a mask [s, b]. logits [s, b]."""
        assert rule is not None, "a rule without selection has no logits"
        return rule(
            logits,
            plan.capacity[step - 1],
            padding_mask=plan.padding_mask,
            multiple=self.shards.num,
            quantiles=self.thinking.quantiles_of(step),
        )

    def _after_attention(self, attended: tuple[Tensor, Tensor | None], rows: Tensor) -> Tensor:
        """What a routed step computes after attention: residual; norm, MLP, residual. [q, b, h] -> [q, b, h]."""
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            rows = add(attended, rows, self.hidden_dropout)
        return self._forward_mlp(rows) if self.switches.steps_have_mlp else rows

    def _replace(
        self, hidden_states: Tensor, tokens: SelectedTokens, rows: Tensor, result: Tensor, **_scaling: Any
    ) -> Tensor:
        """y <- f(y) at the selected tokens. Source: paper, Table 3 (w/o RTC)."""
        return tokens.put(hidden_states, result)

    def _accumulate(
        self,
        hidden_states: Tensor,
        tokens: SelectedTokens,
        rows: Tensor,
        result: Tensor,
        *,
        step: int,
        logits: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """y <- y + alpha * w * phi * f(y) at the selected tokens. Source: paper, equations 6 and 7.

        rows, result: the selected tokens before and after f; logits: of all tokens, None for weight 1.
        """
        if self.switches.update == "delta":
            result = result - rows
        alpha, phi = self.switches.alpha_per_step[step - 1], self.thinking.step_encoding_of(step)
        if logits is None:
            return tokens.add(hidden_states, step_update.step_increment(result, None, alpha, phi))
        own_logits = tokens.own(logits)
        if not logits.requires_grad:
            own_logits = self.thinking.selected_logits(own_logits, rows, step)
        increment = step_update.step_increment(result, self.gate(own_logits / temperature), alpha, phi)
        if self._changes_skipped:
            hidden_states = step_update.rescale_skipped(
                hidden_states,
                tokens.skipped(logits),
                reweight=self.switches.reweight,
                weights=self.gate(logits / temperature),
                step_encoding=phi,
            )
        return tokens.add(hidden_states, increment)

    @property
    def _changes_skipped(self) -> bool:
        return self.switches.reweight == "symmetric" or self.switches.skip == "literal"

    def _touch_parameters(self, hidden_states: Tensor, plan: RoutingPlan) -> Tensor:
        """Give unused thinking parameters a zero gradient: overlapped gradient reduction waits for every parameter."""
        used = self.thinking.uses_step_encoding and plan.rule.select is not None and all(plan.capacity)
        if used or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return hidden_states
        unused = torch.stack([parameter.sum() for parameter in self.thinking.parameters()]).sum()
        return hidden_states + 0.0 * unused.to(hidden_states.dtype)


# `thinking.residual`: how a routed step changes the hidden states.
RESIDUALS: dict[str, Callable[..., Tensor]] = {
    "accumulate": ThinkingLayer._accumulate,
    "replace": ThinkingLayer._replace,
}

"""Bytes that the collectives of an optimizer step move, per rank, and the time they take by where the ranks are.

A pass sends (n - 1) / n of a tensor round a ring of n ranks: an all-gather or a reduce-scatter is one, an all-reduce
two. `tests/distributed/test_traffic.py` counts the bytes of real steps. Ranks are numbered by tensor, then data, then
pipeline place, and nodes hold consecutive ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_itt.accounting.flops import computes_all_tokens, count_selected_tokens
from megatron_itt.accounting.gpus import Gpu
from megatron_itt.accounting.memory import FLOAT32, RankMemory, activation_bytes, stage_layers
from megatron_itt.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Bytes of whole tensors, each once per pass, and the number of collectives that move them."""

    num_bytes: float = 0.0
    calls: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(num_bytes=self.num_bytes + other.num_bytes, calls=self.calls + other.calls)

    def sent(self, ranks: int) -> float:
        """Return the bytes that one of `ranks` sends."""
        return self.num_bytes * (ranks - 1) / ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A process group on nodes: its size, and how many of its ranks share a node."""

    ranks: int
    ranks_per_node: int

    @staticmethod
    def of(ranks: int, stride: int, gpus_per_node: int) -> Placement:
        """Return the placement of `ranks` ranks that are `stride` apart."""
        return Placement(ranks=ranks, ranks_per_node=max(1, min(ranks, gpus_per_node // stride)))

    def bytes_per_s(self, gpu: Gpu) -> float:
        """Return the rate of one rank's ring; one that spans nodes uses the adapters of its ranks on a node."""
        if self.ranks_per_node >= self.ranks:
            return gpu.link_bytes_per_s
        return min(gpu.link_bytes_per_s, self.ranks_per_node * gpu.network_bytes_per_s)

    def seconds(self, passes: Passes, gpu: Gpu) -> float:
        """Return the time of collectives over this group; 0 for a group of one rank."""
        if self.ranks == 1:
            return 0.0
        return passes.sent(self.ranks) / self.bytes_per_s(gpu) + passes.calls * gpu.latency_s


def sent_bytes(config: RunConfig, memory: RankMemory, world_size: int) -> dict[str, float]:
    """Return what a rank of the stage of `memory` sends in an optimizer step, by process group."""
    parallel, stage = config.parallel, memory.pipeline_stage
    data_parallel = config.data_parallel_size(world_size)
    num_microbatches = config.num_microbatches(world_size)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    tensor = edge_passes(config, is_first=is_first, is_last=is_last)
    thinking_layers = config.thinking.layer_indices(config.model.num_layers)
    for layer_idx in stage_layers(config, stage):
        forward, backward = layer_passes(config, thinks=layer_idx in thinking_layers)
        tensor += forward + backward
    gradients, weights = gradient_passes(config, memory.parameters)
    messages = 2 * parallel.virtual_pipeline - is_first - is_last if parallel.pipeline > 1 else 0
    return {
        "tensor": num_microbatches * tensor.sent(parallel.tensor),
        "data": (gradients + weights).sent(data_parallel),
        "pipeline": num_microbatches * messages * message_bytes(config),
    }


def layer_passes(config: RunConfig, *, thinks: bool) -> tuple[Passes, Passes]:
    """Return the tensor-parallel passes of a layer for one micro-batch: forward, and backward with recomputation."""
    thinking, length, sequence = config.thinking, config.model.seq_length, config.parallel.sequence
    forward, backward = _base_pass(config)
    if not thinks or thinking.kind == "none":
        return forward, backward
    routed_forward, routed_backward = Passes(), Passes()
    routes, has_mlp = thinking.kind == "itt" and thinking.routing != "none", thinking.steps_have_mlp
    if computes_all_tokens(thinking):
        again, again_backward = _base_pass(config, has_mlp=has_mlp)
        for _ in range(thinking.num_routed_steps):
            routed_forward, routed_backward = routed_forward + again, routed_backward + again_backward
            routed_forward += _logits(config) if routes and sequence else Passes()
    else:
        if sequence:  # the logits and the hidden states of all tokens
            routed_forward += _logits(config) + _of_tokens(config, length, 1)
            routed_backward += _of_tokens(config, length, 1)
            routed_backward += _logits(config) if thinking.reweight == "symmetric" else Passes()
        num_stale = length
        for share in thinking.nominal_capacity:
            k = count_selected_tokens(thinking, share, length)
            routed_forward += _halves(config, k, has_mlp=has_mlp)
            routed_backward += _halves(config, k, has_mlp=has_mlp)
            if sequence and has_mlp:  # the inputs of the MLP again; those of attention are the gathered hidden states
                routed_backward += _of_tokens(config, k, 1)
            if not sequence and thinking.attend == "all":  # gradients of the keys and values that were computed again
                routed_backward += _of_tokens(config, num_stale, 2, calls=1)
            num_stale = k
    if thinking.kind == "itt" and thinking.recompute != "none":
        routed_backward += routed_forward + (forward if thinking.recompute == "layer" else Passes())
    return forward + routed_forward, backward + routed_backward


def edge_passes(config: RunConfig, *, is_first: bool, is_last: bool) -> Passes:
    """Return the tensor-parallel passes of the embedding and of the head with its loss, forward and backward."""
    length, sequence = config.model.seq_length, config.parallel.sequence
    total = _of_tokens(config, length, 2, calls=1 + sequence) if is_first else Passes()
    if is_last:
        statistics = Passes(num_bytes=3 * 2 * FLOAT32 * config.batch.micro * length, calls=3)
        total += _of_tokens(config, length, 3 if sequence else 2, calls=3 if sequence else 1) + statistics
    return total


def message_bytes(config: RunConfig) -> float:
    """Return the bytes of the hidden states that one stage sends to the next, on each of its tensor-parallel ranks."""
    return _of_tokens(config, config.model.seq_length, 1).num_bytes / (
        config.parallel.tensor if config.parallel.sequence else 1
    )


def gradient_passes(config: RunConfig, parameters: int) -> tuple[Passes, Passes]:
    """Return the data-parallel passes of a rank's gradients, and of its updated weights (once per step)."""
    element, fp32 = activation_bytes(config), config.optimizer.grad_reduce_dtype == "fp32"
    gradients = Passes(num_bytes=(FLOAT32 if fp32 else element) * parameters, calls=1)
    if not config.optimizer.distributed:
        return gradients + gradients, Passes()
    return gradients, Passes(num_bytes=element * parameters, calls=1)


def _base_pass(config: RunConfig, *, has_mlp: bool = True) -> tuple[Passes, Passes]:
    """A layer over all tokens; under sequence parallelism backward gathers the inputs of attention and MLP again."""
    length = config.model.seq_length
    passes = _halves(config, length, has_mlp=has_mlp)
    return passes, passes + _of_tokens(config, length, 1 + has_mlp) if config.parallel.sequence else passes


def _halves(config: RunConfig, tokens: int, *, has_mlp: bool) -> Passes:
    """What attention and MLP send: each one all-reduce, or an all-gather and a reduce-scatter."""
    halves = 1 + has_mlp
    return _of_tokens(config, tokens, 2 * halves, calls=halves * (2 if config.parallel.sequence else 1))


def _logits(config: RunConfig) -> Passes:
    return Passes(num_bytes=FLOAT32 * config.batch.micro * config.model.seq_length, calls=1)


def _of_tokens(config: RunConfig, tokens: int, times: int, *, calls: int | None = None) -> Passes:
    whole = activation_bytes(config) * config.batch.micro * tokens * config.model.hidden_size
    return Passes(num_bytes=times * whole, calls=times if calls is None else calls)

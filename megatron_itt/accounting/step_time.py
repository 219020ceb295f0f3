"""Estimated time of an optimizer step in a layout, from the shapes of its operations and the rates of a GPU.

Matrix products run in tiles of 128 x 128, and a last wave of tiles that does not fill the GPU costs a whole one. What
they keep for backward is written and read once through memory, twice in backward. No pass is faster than the launches
of its kernels; on a processor, which does not queue them, calls take their time besides. Tensor-parallel collectives of
backward overlap with products, as megatron-core's linear layers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_itt.accounting.collectives import (
    Placement,
    edge_passes,
    gradient_passes,
    layer_passes,
    message_bytes,
)
from megatron_itt.accounting.flops import (
    changes_skipped,
    computes_all_tokens,
    count_selected_tokens,
    forward_flops,
    layer_parameters,
)
from megatron_itt.accounting.gpus import Gpu
from megatron_itt.accounting.memory import RankMemory, layer_activations, loss_activations
from megatron_itt.accounting.pipeline import StageTimes, cut_pipeline, schedule_seconds
from megatron_itt.accounting.roofline import ROUTING_OPERATIONS, routed_step_roofline
from megatron_itt.config.run import RunConfig

TILE = 128
KERNELS_PER_PASS = 30  # of one layer, forward
ADAM_BYTES = 30  # float32 gradient, weight and two moments read, the latter three and the bf16 weight written
BUCKET_PARAMETERS = 40e6  # of megatron-core: gradients are reduced, and weights gathered, in buckets
# Of the backward collectives, the ones that wait for nothing and overlap with the products beside them.
_OVERLAPPED = {True: 2 / 3, False: 1.0}  # with and without sequence parallelism


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step, and of its parts on the busiest stage; `exposed` gradients are not hidden by backward."""

    seconds: float
    products: float
    attention: float
    memory_traffic: float
    tensor_collectives: float
    pipeline_bubble: float  # waiting and messages between stages, uneven stages included
    gradients_and_weights: float  # data-parallel collectives that nothing hides
    optimizer: float
    unhidden: float  # what the step would take longer without overlap_grad_reduce and overlap_param_gather

    def limits(self) -> list[tuple[str, float]]:
        """Return the parts as shares of the step, largest first."""
        parts = [name for name in self.__slots__ if name not in ("seconds", "unhidden")]
        shares = [(name.replace("_", " "), getattr(self, name) / self.seconds) for name in parts]
        return sorted(shares, key=lambda item: -item[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cost:
    """Seconds of a part of the model for one micro-batch."""

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    collectives: float = 0.0
    launches: float = 0.0

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(**{name: getattr(self, name) + getattr(other, name) for name in _Cost.__slots__})

    @property
    def seconds(self) -> float:
        return max(self.products + self.attention + self.traffic + self.collectives, self.launches)


def estimate_step(
    config: RunConfig, memory: Sequence[RankMemory], gpu: Gpu, *, world_size: int, gpus_per_node: int
) -> StepTime:
    """Estimate a step of a layout that fits `world_size` ranks; `memory`: its `rank_memory`."""
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    data_parallel = config.data_parallel_size(world_size)
    num_microbatches = config.num_microbatches(world_size)
    costs = _chunk_costs(config, gpu, Placement.of(tensor, 1, gpus_per_node))
    times = [
        StageTimes(
            forward=tuple(forward.seconds for forward, _ in own), backward=tuple(back.seconds for _, back in own)
        )
        for own in (costs[stage::stages] for stage in range(stages))
    ]
    neighbours = Placement.of(stages, tensor * data_parallel, gpus_per_node)
    message = message_bytes(config) / neighbours.bytes_per_s(gpu) + gpu.latency_s if stages > 1 else 0.0
    passes = schedule_seconds(times, num_microbatches, message_s=message, overlaps_messages=config.parallel.overlap_p2p)
    busiest = max(range(stages), key=lambda stage: times[stage].turn)
    busy = sum((part for own in costs[busiest::stages] for part in own), _Cost())
    replicas = Placement.of(data_parallel, tensor, gpus_per_node)
    ends = [_end_of_step(config, stage, gpu, replicas, own) for stage, own in zip(memory, times, strict=True)]
    exposed, unhidden, optimizer = max(ends, key=lambda end: end[0] + end[2])
    scale = num_microbatches * times[busiest].turn / (busy.seconds or 1.0)
    launches = max(0.0, busy.launches - (busy.products + busy.attention + busy.traffic + busy.collectives))
    return StepTime(
        seconds=passes + exposed + optimizer,
        products=scale * busy.products,
        attention=scale * busy.attention,
        memory_traffic=scale * (busy.traffic + launches),
        tensor_collectives=scale * busy.collectives,
        pipeline_bubble=passes - num_microbatches * times[busiest].turn,
        gradients_and_weights=exposed,
        optimizer=optimizer,
        unhidden=unhidden - exposed,
    )


def layer_products(config: RunConfig, *, thinks: bool) -> Iterator[tuple[float, float, float]]:
    """Yield (rows, inner, columns) of the forward products of one layer on one rank, for one micro-batch."""
    model, thinking, tensor = config.model, config.thinking, config.parallel.tensor
    h, s, micro = model.hidden_size, model.seq_length, config.batch.micro
    layer = layer_parameters(model)
    query, key_value = layer.query / h / tensor, layer.key_value / h / tensor
    ffn = model.ffn_hidden_size / tensor

    def after_attention(tokens: int, *, has_mlp: bool = True) -> Iterator[tuple[float, float, float]]:
        yield micro * tokens, query, h
        if has_mlp:
            yield from ((micro * tokens, h, 2 * ffn), (micro * tokens, ffn, h))

    routed = thinking.nominal_capacity if thinks else ()
    whole = 1 + (len(routed) if computes_all_tokens(thinking) else 0)
    for number in range(whole):
        yield micro * s, h, query + key_value
        yield from after_attention(s, has_mlp=number == 0 or thinking.steps_have_mlp)
    num_stale = s
    for share in routed[: 0 if whole > 1 else None]:
        k = count_selected_tokens(thinking, share, s)
        if thinking.attend == "selected":
            yield micro * k, h, query + key_value
        else:
            yield from ((micro * k, h, query), (micro * num_stale, h, key_value))
        yield from after_attention(k, has_mlp=thinking.steps_have_mlp)
        num_stale = s if changes_skipped(thinking) else k


def count_kernels(config: RunConfig) -> int:
    """Return the kernels of the layers for one micro-batch, forward and backward, without recomputation."""
    thinking_layers = config.thinking.layer_indices(config.model.num_layers)
    layers = range(config.model.num_layers)
    return 3 * sum(_num_kernels(config, thinks=layer_idx in thinking_layers) for layer_idx in layers)


def _num_kernels(config: RunConfig, *, thinks: bool) -> int:
    return KERNELS_PER_PASS * (1 + (config.thinking.num_routed_steps if thinks else 0))


def product_seconds(sizes: tuple[float, float, float], gpu: Gpu) -> float:
    """Return the time of one product (rows, inner, columns)."""
    rows, inner, columns = sizes
    if not gpu.num_multiprocessors:
        return 2 * rows * inner * columns / gpu.matrix_flops_per_s
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    waves = math.ceil(tiles / gpu.num_multiprocessors)
    return 2 * waves * gpu.num_multiprocessors * TILE * TILE * inner / gpu.matrix_flops_per_s


def _with_gradients(sizes: tuple[float, float, float], gpu: Gpu) -> tuple[float, float]:
    """Times of a product forward, and of the gradients of its inputs and weights."""
    rows, inner, columns = sizes
    gradients = product_seconds((rows, columns, inner), gpu) + product_seconds((inner, rows, columns), gpu)
    return product_seconds(sizes, gpu), gradients


def _layer_cost(config: RunConfig, gpu: Gpu, group: Placement, *, thinks: bool) -> tuple[_Cost, _Cost]:
    """Costs of a layer forward and backward, recomputation included in the latter."""
    thinking, model = config.thinking, replace(config.model, num_layers=1)
    base = replace(thinking, kind="none", capacity=())
    counted = base
    if thinks and computes_all_tokens(thinking):
        counted = replace(thinking, kind="loop", layers=(0,), capacity=(1.0,) * thinking.num_routed_steps)
    elif thinks:
        counted = replace(thinking, layers=(0,))
    flops = config.batch.micro / config.parallel.tensor * forward_flops(model, counted).attention
    passes, passes_back = layer_passes(config, thinks=thinks)
    stored = replace(config, thinking=replace(thinking, recompute="none"))
    traffic = 2 * layer_activations(stored, thinks=thinks)
    if thinks and thinking.kind == "itt" and not computes_all_tokens(thinking):
        costs = routed_step_roofline(config.model, thinking)
        traffic += config.batch.micro * sum(c.num_bytes for c in costs if c.operation in ROUTING_OPERATIONS)
    times = [_with_gradients(sizes, gpu) for sizes in layer_products(config, thinks=thinks)]
    calls = _num_kernels(config, thinks=thinks) * gpu.launch_s
    queues = gpu.num_multiprocessors > 0
    forward = _Cost(
        products=sum(time for time, _ in times),
        attention=flops / gpu.attention_flops_per_s,
        traffic=traffic / gpu.memory_bytes_per_s + (0.0 if queues else calls),
        collectives=group.seconds(passes, gpu),
        launches=calls if queues else 0.0,
    )
    gradients = sum(time for _, time in times)
    overlapped = _OVERLAPPED[config.parallel.sequence] * group.seconds(passes_back, gpu)
    backward = _Cost(
        products=gradients,
        attention=2 * forward.attention,
        traffic=2 * forward.traffic,
        collectives=group.seconds(passes_back, gpu) - min(overlapped, gradients / 2),
        launches=2 * forward.launches,
    )
    if thinks and thinking.kind == "itt" and thinking.recompute != "none":  # its collectives are in `passes_back`
        again = replace(forward, collectives=0.0)
        if thinking.recompute == "routed":
            plain, _ = _layer_cost(config, gpu, group, thinks=False)
            again = _Cost(**{name: getattr(again, name) - getattr(plain, name) for name in _Cost.__slots__})
            again = replace(again, collectives=0.0)
        backward = backward + again
    return forward, backward


def _chunk_costs(config: RunConfig, gpu: Gpu, group: Placement) -> list[tuple[_Cost, _Cost]]:
    """Costs of each chunk of the model, in order of depth, with the embedding's collectives and the head."""
    kinds = {thinks: _layer_cost(config, gpu, group, thinks=thinks) for thinks in (False, True)}
    thinking_layers = set(config.thinking.layer_indices(config.model.num_layers))
    found = []
    chunks = cut_pipeline(config).chunks
    for position, chunk in enumerate(chunks):
        is_first, is_last = position == 0, position == len(chunks) - 1
        forward, backward = _Cost(), _Cost()
        for layer_idx in chunk:
            own = kinds[layer_idx in thinking_layers]
            forward, backward = forward + own[0], backward + own[1]
        edges = group.seconds(edge_passes(config, is_first=is_first, is_last=is_last), gpu)
        forward += _Cost(collectives=edges)
        if is_last:
            tokens = config.batch.micro * config.model.seq_length
            sizes = tokens, config.model.hidden_size, config.model.vocab_size / config.parallel.tensor
            product, gradients = _with_gradients(sizes, gpu)
            traffic = 2 * loss_activations(config, on_cpu=False) / gpu.memory_bytes_per_s
            forward += _Cost(products=product, traffic=traffic)
            backward += _Cost(products=gradients, traffic=traffic)
        found.append((forward, backward))
    return found


def _end_of_step(
    config: RunConfig, memory: RankMemory, gpu: Gpu, replicas: Placement, times: StageTimes
) -> tuple[float, float, float]:
    """Seconds of the data-parallel collectives that nothing hides, of all of them, and of the optimizer."""
    gradients, weights = (replicas.seconds(passes, gpu) for passes in gradient_passes(config, memory.parameters))
    buckets = math.ceil(memory.parameters / max(BUCKET_PARAMETERS, 1e6 * replicas.ranks))
    exposed = 0.0
    for seconds, overlaps, hidden_by in (
        (gradients, config.optimizer.overlap_grad_reduce, times.backward),
        (weights, config.optimizer.overlap_param_gather, times.forward),
    ):
        exposed += max(seconds / buckets, seconds - sum(hidden_by)) if overlaps else seconds
    shards = replicas.ranks if config.optimizer.distributed else 1
    traffic = ADAM_BYTES * memory.parameters / shards + 2 * memory.gradients  # they are cleared, and their norm is read
    return exposed, gradients + weights, traffic / gpu.memory_bytes_per_s

"""Memory of one rank in bytes: weights, gradients, optimizer state and activations.

Weights, gradients and optimizer state are counts. Activations are an estimate of the tensors that autograd keeps with
the native backend. Library workspaces, fragmentation and communication buffers are not included; `resident` adds what a
process on the CPU holds besides tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_itt.accounting.flops import (
    changes_skipped,
    computes_all_tokens,
    count_selected_tokens,
    layer_parameters,
    thinking_layer_parameters,
)
from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.model import SampledCapacity, ThinkingConfig
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError

FLOAT32 = 4  # bytes; optimizer state, norm statistics and the softmax of the loss are always float32
ADAM_MOMENTS = 2
# Heap of the C library beyond tensors: freed blocks that nothing fits into. Bytes per element of the activations that
# layers keep for backward; float32 loses as much as bf16. Measured with glibc, relative to this value: 0.6 (30 layers
# of 192), 0.7 (4 of 512), 0.4 to 0.5 (8 of 384), 1.2 to 1.8 (30 of 576). Separate mappings would lose nothing, but take
# a fifth more time.
HEAP_LOSS = 2.0

# s: sequence length, h: hidden size, k: selected tokens of a step


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes that one rank of a job holds at its peak."""

    pipeline_stage: int
    parameters: int  # a count, not bytes
    weights: float
    gradients: float
    optimizer: float
    activations: float
    heap_loss: float  # beyond tensors, of a process on the CPU

    @property
    def total(self) -> float:
        """The sum of weights, gradients, optimizer state and activations."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def resident(self, program: float) -> float:
        """Return the peak resident memory of a process on the CPU that held `program` bytes before the run."""
        return program + self.total + self.heap_loss


def rank_memory(config: RunConfig, world_size: int, *, on_cpu: bool = False) -> list[RankMemory]:
    """Return the memory of one rank of each pipeline stage. `on_cpu`: with the loss as computed on a CPU.

    Raises ConfigError if the layout does not fit `world_size` processes.
    """
    if problems := find_layout_problems(config, world_size):
        raise ConfigError("; ".join(problems))
    return [_stage_memory(config, world_size, stage, on_cpu=on_cpu) for stage in range(config.parallel.pipeline)]


def stage_layers(config: RunConfig, stage: int) -> list[int]:
    """Return the 0-based indices of the layers on a pipeline stage, over all of its chunks."""
    return [layer for chunk in cut_pipeline(config).chunks[stage :: config.parallel.pipeline] for layer in chunk]


def activation_bytes(config: RunConfig) -> int:
    """Return the bytes of one activation or weight."""
    return 2 if config.precision.dtype == "bf16" else FLOAT32


def layer_activations(config: RunConfig, *, thinks: bool) -> float:
    """Return the bytes that one layer keeps from forward to backward, for one micro-batch on one rank."""
    sizes, thinking, s = _Sizes.of(config), config.thinking, config.model.seq_length
    kept = sizes.base_pass(s)
    if thinks and thinking.kind == "loop":
        kept *= thinking.num_steps
    elif thinks and thinking.kind == "itt" and thinking.recompute == "none":
        kept += _routed_activations(config)
    elif thinks and thinking.kind == "itt":  # the hidden states that recomputation starts from
        kept = sizes.step_encoding(sizes.local(s)) + (kept if thinking.recompute == "routed" else 0)
    return config.batch.micro * kept


def recomputed_activations(config: RunConfig) -> float:
    """Return the bytes that backward rebuilds at once, for one thinking layer; 0 without recomputation."""
    if config.thinking.kind != "itt" or config.thinking.recompute == "none":
        return 0
    base_pass = _Sizes.of(config).base_pass(config.model.seq_length) if config.thinking.recompute == "layer" else 0
    return config.batch.micro * (_routed_activations(config) + base_pass)


def _routed_activations(config: RunConfig) -> float:
    """Bytes that phi_0 and the routed steps of one thinking layer keep, for one sequence."""
    sizes, thinking, s = _Sizes.of(config), config.thinking, config.model.seq_length
    total = sizes.step_encoding(sizes.local(s)) if thinking.step_encoding else 0
    attends_all, masks = thinking.attend == "all", config.data.reset_at_document_end
    slack = thinking.threshold_slack
    if computes_all_tokens(thinking):
        return total + thinking.num_routed_steps * sizes.masked_step(s, masks_attention=thinking.attend == "selected")
    if attends_all:  # slices of the fused QKV weight: one copy for all sequences of a micro-batch
        total += sizes.element * sizes.hidden * (sizes.query + 2 * sizes.key) / config.batch.micro
    num_stale = s
    for share in _largest_capacity(thinking):
        k = count_selected_tokens(thinking, min(1.0, share + (slack or 0.0)), s)
        total += sizes.hidden_states(s) if changes_skipped(thinking) else 0
        total += sizes.routed_step(k, num_stale, attends_all=attends_all, masks_attention=masks)
        num_stale = s if changes_skipped(thinking) else k
    return total


def _largest_capacity(thinking: ThinkingConfig) -> tuple[float, ...]:
    """The capacity of the most expensive batch."""
    if isinstance(thinking.capacity, SampledCapacity):
        return (thinking.capacity.sample[1],) * thinking.num_routed_steps
    return thinking.nominal_capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Widths of one token's tensors on one rank, and the bytes that each operation keeps, per sequence."""

    hidden: int
    query: float  # width of this rank's query heads
    key: float  # width of this rank's keys; values have the same
    ffn: float
    heads: float
    head_size: int
    qk_norm: bool
    steps_have_mlp: bool
    seq_length: int
    element: int  # bytes
    sequence_degree: int

    @staticmethod
    def of(config: RunConfig) -> _Sizes:
        model, tensor = config.model, config.parallel.tensor
        return _Sizes(
            hidden=model.hidden_size,
            query=model.attention_width / tensor,
            key=model.num_key_value_heads * model.head_size / tensor,
            ffn=model.ffn_hidden_size / tensor,
            heads=model.num_attention_heads / tensor,
            head_size=model.head_size,
            qk_norm=model.qk_norm,
            steps_have_mlp=config.thinking.steps_have_mlp,
            seq_length=model.seq_length,
            element=activation_bytes(config),
            sequence_degree=tensor if config.parallel.sequence else 1,
        )

    def local(self, tokens: float) -> float:
        """Tokens on this rank where the sequence is sharded."""
        return tokens / self.sequence_degree

    def norm(self, tokens: float) -> float:
        """The input, one statistic per token, and the output for the projection that follows."""
        return tokens * (2 * self.element * self.hidden + FLOAT32)

    def attention(self, queries: float, keys: float, *, projected: float, repeats: bool = True) -> float:
        """Rotated queries and keys, values, context, log-sum-exp.

        `projected`: width of the product that the values are a view of, which stays alive as a whole. `repeats`:
        grouped keys and values are kept once per query head.
        """
        repeated = repeats and self.query != self.key
        kept = 2 * queries * self.query + keys * (2 * self.query if repeated else self.key + projected)
        if not self.qk_norm:
            return self.element * kept + FLOAT32 * queries * self.heads
        # The norms keep a copy of the queries, and of keys and values the product, of which they are views; statistics.
        product = 2 * self.key if queries != keys else self.query + 2 * self.key
        kept += queries * self.query + keys * (product if repeated else product - projected)
        statistics = queries * self.heads + keys * self.key / self.head_size
        return self.element * kept + FLOAT32 * (queries * self.heads + statistics)

    def rotary_cos_sin(self, tokens: float) -> float:
        return self.element * tokens * 2 * self.head_size

    def mlp(self, tokens: float) -> float:
        """Gate and up projections, and the product of the activated gate with the up projection."""
        return self.element * tokens * 3 * self.ffn

    def base_pass(self, tokens: float, *, has_mlp: bool = True) -> float:
        """The base layer, or its attention, over all tokens; all layers share one table of cosines and sines."""
        attention = self.norm(self.local(tokens)) + self.attention(tokens, tokens, projected=self.key)
        return attention + (self.norm(self.local(tokens)) + self.mlp(tokens) if has_mlp else 0)

    def step_encoding(self, tokens: float) -> float:
        """The other factor of a product with a learned step encoding."""
        return self.element * tokens * self.hidden

    def hidden_states(self, tokens: float) -> float:
        """Hidden states between two steps with the router's float32 copy, where all tokens need them."""
        return tokens * self.hidden * (FLOAT32 if self.element == FLOAT32 else FLOAT32 + self.element)

    def routed_step(self, k: float, num_stale: float, *, attends_all: bool, masks_attention: bool) -> float:
        """A step that computes k selected tokens; keys and values of `num_stale` tokens are out of date."""
        s, own = self.seq_length, self.local(k)
        total = self.norm(k) + self.step_encoding(own) + self.rotary_cos_sin(k)
        total += self.norm(own) + self.mlp(k) if self.steps_have_mlp else 0
        if not attends_all:
            return total + self.attention(k, k, projected=self.query + 2 * self.key)
        total += self.norm(num_stale) + self.rotary_cos_sin(num_stale)
        mask = self.element * k * s if masks_attention else 0
        return total + mask + self.attention(k, s, projected=self.key, repeats=masks_attention)

    def masked_step(self, s: float, *, masks_attention: bool) -> float:
        """A step that computes all tokens and keeps the selected ones."""
        mask = self.element * s * s if masks_attention else 0
        computed = self.base_pass(s, has_mlp=self.steps_have_mlp)
        return self.hidden_states(self.local(s)) + mask + computed + self.step_encoding(self.local(s))


def _stage_memory(config: RunConfig, world_size: int, stage: int, *, on_cpu: bool) -> RankMemory:
    model, layers = config.model, stage_layers(config, stage)
    is_first, is_last = stage == 0, stage == config.parallel.pipeline - 1
    thinking_layers = config.thinking.layer_indices(model.num_layers)
    num_tables = int(is_first or is_last) if model.tie_embeddings else is_first + is_last
    parameters = _stage_parameters(config, layers, num_tables=num_tables)
    element = activation_bytes(config)
    state = parameters * (ADAM_MOMENTS + (element != FLOAT32))  # a float32 master copy where the weights are not
    if config.optimizer.kind == "muon":  # one moment of matrices
        state -= len(layers) * layer_parameters(model).matrices // config.parallel.tensor
    num_shards = config.data_parallel_size(world_size) if config.optimizer.distributed else 1
    num_thinking = len(set(layers) & set(thinking_layers))
    numbers = {True: num_thinking, False: len(layers) - num_thinking}
    per_microbatch = sum(number * layer_activations(config, thinks=thinks) for thinks, number in numbers.items())
    kept = _microbatches_in_flight(config, world_size, stage) * per_microbatch
    transient = [  # never at the same time: the loss precedes the backward pass of every layer
        loss_activations(config, on_cpu=on_cpu) if is_last else 0,
        recomputed_activations(config) if num_thinking else 0,
    ]
    return RankMemory(
        pipeline_stage=stage,
        parameters=parameters,
        weights=element * parameters,
        gradients=(FLOAT32 if config.optimizer.grad_reduce_dtype == "fp32" else element) * parameters,
        optimizer=FLOAT32 * state / num_shards,
        activations=kept + max(transient),
        heap_loss=HEAP_LOSS * kept / element,
    )


def _stage_parameters(config: RunConfig, layers: Iterable[int], *, num_tables: int) -> int:
    """Parameters on one rank of a stage: tensor parallelism shards matrices and replicates the rest.

    `num_tables`: vocabulary-sized matrices; a tied one exists on both ends of a pipeline.
    """
    model, tensor = config.model, config.parallel.tensor
    layer = layer_parameters(model)
    thinking_layers = set(config.thinking.layer_indices(model.num_layers))
    total = num_tables * model.vocab_size * model.hidden_size // tensor
    for layer_idx in layers:
        total += (layer.matrices + layer.biases) // tensor + layer.norms
        if layer_idx in thinking_layers:
            total += thinking_layer_parameters(model, config.thinking)
        if layer_idx == model.num_layers - 1:
            total += model.hidden_size  # the final norm
    return total


def _microbatches_in_flight(config: RunConfig, world_size: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once; a fraction where chunks interleave."""
    parallel, chunks = config.parallel, config.parallel.virtual_pipeline
    num_microbatches = config.num_microbatches(world_size)
    if chunks == 1:
        return min(num_microbatches, parallel.pipeline - stage)
    warm_up = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline
    return min(num_microbatches * chunks, warm_up + 1) / chunks


def loss_activations(config: RunConfig, *, on_cpu: bool) -> float:
    """Return the bytes of the final norm, and of the loss of one micro-batch.

    A fused loss on a GPU may hold the logits, their softmax and its gradient at once. On the CPU the softmax becomes
    its gradient in place and overwrites float32 logits; the gradient of the head adds to the rest. A soft cap keeps its
    output, and a z-loss does not overwrite float32 logits.
    """
    model, sizes = config.model, _Sizes.of(config)
    tokens, vocab = config.batch.micro * model.seq_length, model.vocab_size / config.parallel.tensor
    norm, logits = sizes.norm(sizes.local(tokens)), tokens * vocab
    norm += 0 if model.logit_soft_cap is None else sizes.element * logits
    if not on_cpu:
        return norm + logits * (2 * FLOAT32 + sizes.element)
    softmax = 0 if sizes.element == FLOAT32 and config.optimizer.z_loss == 0.0 else FLOAT32 * logits
    return norm + sizes.element * logits + max(softmax, sizes.element * vocab * model.hidden_size)

"""Memory of one rank: weights, gradients, optimizer state, and an estimate of what backward needs of the forward pass.

Weights, gradients and optimizer state are counts. Activations are a model of the tensors that autograd keeps with the
torch-native layer parts; library workspaces, fragmentation and communication buffers are not in it; `resident` adds
what a process on the CPU has beside tensors. All in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_itt.accounting.flops import changes_skipped, count_picked_tokens
from megatron_itt.accounting.params import layer_parameters, thinking_layer_parameters
from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config.check import find_layout_problems
from megatron_itt.config.model import SampledCapacity, ThinkingConfig
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError

FLOAT32 = 4  # bytes; gradients, optimizer state, norms' statistics and the softmax of the loss are always float32
ADAM_MOMENTS = 2
# What the C library's heap holds beyond tensors, of what layers keep for backward: freed pieces that nothing fits into.
# Measured with glibc: 0.6 (30 layers of 192), 0.7 (4 of 512), 1.2 (30 of 576). As separate mappings, which lose
# nothing, such tensors would take a fifth more time.
HEAP_LOSS = 0.8

# s: sequence length, h: hidden size, k: picked tokens of a step, e: bytes of an activation


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes that one rank of a job holds at its peak."""

    pipeline_stage: int
    parameters: int  # a count, not bytes
    weights: float
    gradients: float
    optimizer: float
    activations: float
    kept: float  # of the activations, what layers hold from forward to backward

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def resident(self, program: float) -> float:
        """What a process on the CPU has resident at its peak; `program`: what it had before the run began."""
        return program + self.total + HEAP_LOSS * self.kept


def rank_memory(config: RunConfig, world_size: int, *, on_cpu: bool = False) -> list[RankMemory]:
    """Memory per pipeline stage, first to last; ranks of one stage are alike. `on_cpu`: with the loss of a CPU.

    Raises ConfigError if the layout does not fit `world_size` processes.
    """
    problems = find_layout_problems(config, world_size)
    if problems:
        raise ConfigError("; ".join(problems))
    return [_stage_memory(config, world_size, stage, on_cpu=on_cpu) for stage in range(config.parallel.pipeline)]


def stage_layers(config: RunConfig, stage: int) -> list[int]:
    """0-based indices of the layers on a pipeline stage; with interleaving, of all its chunks."""
    chunks = cut_pipeline(config).chunks[stage :: config.parallel.pipeline]
    return [layer_idx for chunk in chunks for layer_idx in chunk]


def layer_activations(config: RunConfig, *, thinks: bool) -> float:
    """Bytes that one layer stores from forward to backward, for one micro-batch on one rank."""
    sizes, thinking = _Sizes.of(config), config.thinking
    full_pass = sizes.full_pass(config.model.seq_length)
    if not thinks or thinking.kind == "none":
        stored = full_pass
    elif thinking.kind == "loop":
        stored = full_pass * thinking.num_steps
    elif thinking.recompute == "none":
        stored = full_pass + _routed_activations(config)
    else:
        entry = sizes.gain(sizes.local(config.model.seq_length))  # the states that recomputation starts from
        stored = entry + (full_pass if thinking.recompute == "routed" else 0)
    return config.batch.micro * stored


def recomputed_activations(config: RunConfig) -> float:
    """Bytes that backward rebuilds at once, one thinking layer at a time, where the recipe recomputes; else 0."""
    if config.thinking.kind != "itt" or config.thinking.recompute == "none":
        return 0
    rebuilt = _routed_activations(config)
    if config.thinking.recompute == "layer":
        rebuilt += _Sizes.of(config).full_pass(config.model.seq_length)
    return config.batch.micro * rebuilt


def _routed_activations(config: RunConfig) -> float:
    """Bytes that phi_0 and the routed steps of one thinking layer keep, for one sequence."""
    sizes, thinking, s = _Sizes.of(config), config.thinking, config.model.seq_length
    total = sizes.gain(sizes.local(s)) if thinking.step_encoding else 0
    attends_all, masks = thinking.attend == "all", config.data.reset_at_document_end
    if thinking.routing == "topk" and attends_all:
        total += sizes.slices()
    num_stale = s
    for share in _largest_shares(thinking):
        if thinking.routing == "topk":
            k = count_picked_tokens(thinking, share, s)
            total += sizes.states(s) if changes_skipped(thinking) else 0
            total += sizes.routed_step(k, num_stale, attends_all=attends_all, masks_attention=masks)
            num_stale = s if changes_skipped(thinking) else k
        else:
            total += sizes.masked_step(s, masks_attention=thinking.attend == "selected")
    return total


def _largest_shares(thinking: ThinkingConfig) -> tuple[float, ...]:
    """The shares of the most expensive batch."""
    if isinstance(thinking.capacity, SampledCapacity):
        return (thinking.capacity.sample[1],) * thinking.num_routed_steps
    return thinking.nominal_capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Widths of one token's tensors on one rank, and what the parts of a layer keep of them, in bytes per sequence."""

    hidden: int
    query: float  # width of this rank's query heads
    key: float  # width of this rank's keys (values have the same)
    ffn: float
    heads: float
    head_size: int
    seq_length: int
    element: int
    sequence_degree: int
    micro: int

    @staticmethod
    def of(config: RunConfig) -> _Sizes:
        model, tensor = config.model, config.parallel.tensor
        return _Sizes(
            hidden=model.hidden_size,
            query=model.num_attention_heads * model.head_size / tensor,
            key=model.num_key_value_heads * model.head_size / tensor,
            ffn=model.ffn_hidden_size / tensor,
            heads=model.num_attention_heads / tensor,
            head_size=model.head_size,
            seq_length=model.seq_length,
            element=activation_bytes(config),
            sequence_degree=tensor if config.parallel.sequence else 1,
            micro=config.batch.micro,
        )

    def local(self, rows: float) -> float:
        """Rows on this rank where the sequence is divided."""
        return rows / self.sequence_degree

    def norm(self, rows: float) -> float:
        """A norm keeps its input, a number per row, and its output for the projection after it."""
        return rows * (2 * self.element * self.hidden + FLOAT32)

    def attention(self, queries: float, keys: float, *, projected: float) -> float:
        """Rotated queries and keys, values, context, log-sum-exp. Grouped keys and values are kept repeated per head.

        `projected`: width of the product that the values are a slice of, and which stays alive as a whole.
        """
        repeated = self.query != self.key
        kept = 2 * queries * self.query + keys * (2 * self.query if repeated else self.key + projected)
        return self.element * kept + FLOAT32 * queries * self.heads

    def angles(self, rows: float) -> float:
        """Cosine and sine for one rotation of `rows` heads."""
        return self.element * rows * 2 * self.head_size

    def mlp(self, rows: float) -> float:
        """Gate and up rows, and the product of the activated gate with the up rows."""
        return self.element * rows * 3 * self.ffn

    def full_pass(self, rows: float) -> float:
        """The base layer over all tokens; cosine and sine of its rotation are one for all layers."""
        return 2 * self.norm(self.local(rows)) + self.attention(rows, rows, projected=self.key) + self.mlp(rows)

    def gain(self, rows: float) -> float:
        """A product with a learned gain keeps its other factor."""
        return self.element * rows * self.hidden

    def states(self, rows: float) -> float:
        """Token states between two steps, and the router's float32 reading of them, where all of them are needed."""
        return rows * self.hidden * (FLOAT32 if self.element == FLOAT32 else FLOAT32 + self.element)

    def routed_step(self, k: float, num_stale: float, *, attends_all: bool, masks_attention: bool) -> float:
        """A step that computes the k picked rows; keys and values of `num_stale` tokens are out of date."""
        s = self.seq_length
        total = self.norm(k) + self.norm(self.local(k)) + self.mlp(k) + self.gain(self.local(k)) + self.angles(k)
        if not attends_all:
            return total + self.attention(k, k, projected=self.query + 2 * self.key)
        total += self.norm(num_stale) + self.angles(num_stale)
        if masks_attention:
            return total + self.element * k * s + self.attention(k, s, projected=self.key)
        return total + self.picked_attention(k, s)

    def slices(self) -> float:
        """Copies of pieces of the fused weight: one of each for all sequences of a micro-batch."""
        return self.element * self.hidden * (self.query + 2 * self.key) / self.micro

    def picked_attention(self, queries: float, keys: float) -> float:
        """Rotated queries and keys, values, context, log-sum-exp; grouped keys and values are not repeated."""
        return self.element * 2 * (queries * self.query + keys * self.key) + FLOAT32 * queries * self.heads

    def masked_step(self, s: float, *, masks_attention: bool) -> float:
        """A step that computes all rows and keeps the picked ones."""
        mask = self.element * s * s if masks_attention else 0
        return self.states(self.local(s)) + mask + self.full_pass(s) + self.gain(self.local(s))


def activation_bytes(config: RunConfig) -> int:
    """Bytes of one activation or weight."""
    return 2 if config.precision.dtype == "bf16" else FLOAT32


def _stage_memory(config: RunConfig, world_size: int, stage: int, *, on_cpu: bool) -> RankMemory:
    model, layers = config.model, stage_layers(config, stage)
    is_first, is_last = stage == 0, stage == config.parallel.pipeline - 1
    thinking_layers = config.thinking.layer_indices(model.num_layers)
    parameters = _stage_parameters(config, layers, num_tables=_num_tables(config, is_first, is_last))
    element = activation_bytes(config)
    state = FLOAT32 * (ADAM_MOMENTS + (element != FLOAT32))  # a float32 master copy where the weights are not
    shards = config.data_parallel_size(world_size) if config.optimizer.distributed else 1
    per_microbatch = sum(layer_activations(config, thinks=layer_idx in thinking_layers) for layer_idx in layers)
    in_flight = _microbatches_in_flight(config, world_size, stage)
    transient = [  # never at the same time: the loss comes before the backward pass of any layer
        _loss_activations(config, on_cpu=on_cpu) if is_last else 0,
        recomputed_activations(config) if set(layers) & set(thinking_layers) else 0,
    ]
    return RankMemory(
        pipeline_stage=stage,
        parameters=parameters,
        weights=element * parameters,
        gradients=FLOAT32 * parameters,
        optimizer=state * parameters / shards,
        activations=in_flight * per_microbatch + max(transient),
        kept=in_flight * per_microbatch,
    )


def _num_tables(config: RunConfig, is_first: bool, is_last: bool) -> int:
    """Vocabulary-sized matrices on a stage; a tied one exists on both ends of a pipeline."""
    if config.model.tie_embeddings:
        return int(is_first or is_last)
    return is_first + is_last


def _stage_parameters(config: RunConfig, layers: Iterable[int], *, num_tables: int) -> int:
    """Parameters on one rank of a stage: matrices are divided over tensor-parallel ranks, the rest is on each."""
    model, tensor = config.model, config.parallel.tensor
    layer = layer_parameters(model)
    thinking_layers = set(config.thinking.layer_indices(model.num_layers))
    total = num_tables * model.vocab_size * model.hidden_size // tensor
    for layer_idx in layers:
        total += layer.matrices // tensor + layer.norms
        if layer_idx in thinking_layers:
            total += thinking_layer_parameters(model, config.thinking)
        if layer_idx == model.num_layers - 1:
            total += model.hidden_size  # the final norm
    return total


def _microbatches_in_flight(config: RunConfig, world_size: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once; a fraction where chunks interleave."""
    parallel = config.parallel
    num_microbatches = config.batch.global_size // (config.batch.micro * config.data_parallel_size(world_size))
    if parallel.virtual_pipeline == 1:
        return min(num_microbatches, parallel.pipeline - stage)
    chunks = parallel.virtual_pipeline
    warm_up = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline
    return min(num_microbatches * chunks, warm_up + 1) / chunks


def _loss_activations(config: RunConfig, *, on_cpu: bool) -> float:
    """The last norm, and what the loss of one micro-batch takes.

    On a GPU, whose fused loss may hold it all at once: the logits, their softmax and its gradient. On the CPU the
    softmax becomes its gradient in place, and overwrites float32 logits; the head's gradient meets what is left.
    """
    model, sizes = config.model, _Sizes.of(config)
    rows, vocab = config.batch.micro * model.seq_length, model.vocab_size / config.parallel.tensor
    norm, logits = sizes.norm(sizes.local(rows)), rows * vocab
    if not on_cpu:
        return norm + logits * (2 * FLOAT32 + sizes.element)
    softmax = 0 if sizes.element == FLOAT32 else FLOAT32 * logits
    return norm + sizes.element * logits + max(softmax, sizes.element * vocab * model.hidden_size)

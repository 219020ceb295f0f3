"""Rules between fields of a recipe. Each check yields problems as text: key, value, rule, way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from megatron_itt.config.model import ModelConfig, SampledCapacity, ThinkingConfig
from megatron_itt.config.run import (
    BatchConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
)
from megatron_itt.config.switches import find_idle_settings


def find_problems(config: RunConfig, *, without: Collection[str] = ()) -> list[str]:
    """Return every broken rule of a recipe, one line each.

    `without` names sections that could not be read and hold placeholders: their rules are skipped.
    """
    found = [find(config) for sections, find in _RULES if not set(sections) & set(without)]
    return [problem for problems in found for problem in problems]


def find_layout_problems(
    config: RunConfig, world_size: int, *, world_size_from: str = "", without: Collection[str] = ()
) -> list[str]:
    """Return the problems of running a recipe on `world_size` processes; `without` as in `find_problems`.

    `world_size_from` names the source of that number.
    """
    if "parallel" in without:
        return []
    parallel, batch = config.parallel, config.batch
    degree = parallel.tensor * parallel.pipeline
    source = f" ({world_size_from})" if world_size_from else ""
    if world_size % degree:  # without a data-parallel size, the batch cannot be checked
        return [
            f"the world size is {world_size}{source}, which parallel.tensor * parallel.pipeline = {parallel.tensor} * "
            f"{parallel.pipeline} = {degree} does not divide; start a multiple of {degree} processes"
        ]
    if "batch" in without:
        return []
    data_parallel = config.data_parallel_size(world_size)
    samples = data_parallel * batch.micro
    interleaved = parallel.virtual_pipeline > 1
    fitting = samples * (parallel.pipeline if interleaved else 1)
    sizes = {"batch.global": batch.global_size}
    if batch.ramp is not None:
        sizes |= {"batch.ramp.start": batch.ramp.start, "batch.ramp.increment": batch.ramp.increment}
    for key, size in sizes.items():
        if size % samples:
            return [
                f"{key} is {size}, not a multiple of batch.micro * data-parallel size = {batch.micro} * "
                f"{data_parallel} = {samples}; choose a multiple of {fitting}"
                + (f" (the world size is {world_size}: {world_size_from})" if world_size_from else "")
            ]
        if interleaved and size % fitting:
            return [
                f"the interleaved schedule needs the {size // samples} micro-batches of a step to be a multiple of "
                f"parallel.pipeline = {parallel.pipeline}; change {key} to a multiple of {fitting}, or batch.micro"
            ]
    return []


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads is {model.num_attention_heads}, which does not divide model.hidden_size = "
            f"{model.hidden_size}; change one, or set model.head_dim"
        )
    elif model.head_size % 2:
        key = "model.head_dim" if model.head_dim else "model.hidden_size / model.num_attention_heads"
        yield f"{key} is {model.head_size}; rotary embeddings need an even head size"
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_query_groups is {model.num_query_groups}, which does not divide model.num_attention_heads = "
            f"{model.num_attention_heads}"
        )


def _rope_problems(model: ModelConfig) -> Iterator[str]:
    if model.rope_scaling is None:
        return
    settings = model.rope_scaling.settings
    kind = settings["rope_type"]
    required, optional = ROPE_KEYS[kind]
    for key in required:
        if key not in settings:
            yield f"model.rope_scaling.{key} is missing; {kind} needs {', '.join(required)}"
    for key in settings.keys() - {"rope_type", *required, *optional}:
        yield f"model.rope_scaling.{key} is {settings[key]}, which {kind} does not have; remove it"


def _thinking_problems(thinking: ThinkingConfig) -> Iterator[str]:
    yield from find_idle_settings(thinking)
    if thinking.kind == "none":
        if thinking.capacity:
            yield "thinking.capacity is set but thinking.kind is none; set capacity to [] or kind to itt"
        return
    if thinking.kind == "loop":
        if any(capacity != 1.0 for capacity in thinking.nominal_capacity):
            yield (
                f"thinking.capacity is {list(thinking.nominal_capacity)} but thinking.kind is loop, where every step "
                "processes every token; use 1.0 for each"
            )
        return
    if thinking.skip == "literal" and thinking.reweight == "symmetric":
        yield (
            "thinking.skip is literal and thinking.reweight is symmetric: both define the update of tokens that are "
            "not selected; choose one"
        )
    for key in ("alpha", "step_init"):
        value = getattr(thinking, key)
        if isinstance(value, tuple) and len(value) != thinking.num_routed_steps:
            yield (
                f"thinking.{key} has {len(value)} values but thinking.capacity has {thinking.num_routed_steps} routed "
                "steps; give one number, or one per routed step"
            )
    yield from _capacity_problems(thinking)


def _layer_problems(thinking: ThinkingConfig, model: ModelConfig) -> Iterator[str]:
    layers, num_layers = thinking.layers, model.num_layers
    if thinking.kind == "none":
        return
    if layers == "every_other":
        if not thinking.layer_indices(num_layers):
            yield (
                f"thinking.layers is every_other but model.num_layers is {num_layers}, and the first thinking layer "
                "would be the second; name layers, such as [0], or set thinking.kind to none"
            )
        return
    if not layers:
        yield "thinking.layers is []; name at least one layer, or set thinking.kind to none"
    for layer_idx in sorted(set(layers)):
        if layer_idx >= num_layers:
            yield (
                f"thinking.layers contains {layer_idx}, but model.num_layers is {num_layers}: layers count from 0 to "
                f"{num_layers - 1}"
            )
        if layers.count(layer_idx) > 1:
            yield f"thinking.layers contains {layer_idx} twice; name each layer once"


def _capacity_problems(thinking: ThinkingConfig) -> Iterator[str]:
    if isinstance(thinking.capacity, SampledCapacity):
        low, high = thinking.capacity.sample
        if low > high:
            yield f"thinking.capacity.sample is [{low}, {high}]; the lower capacity comes first"
        if thinking.capacity_schedule == "ramp":
            yield "thinking.capacity_schedule is ramp but thinking.capacity is sampled; a ramp needs a list to rise to"
    elif thinking.capacity_schedule == "ramp" and thinking.ramp_start_share > min(thinking.capacity, default=1.0):
        yield (
            f"thinking.ramp_start_share is {thinking.ramp_start_share}, above an entry of thinking.capacity = "
            f"{list(thinking.capacity)}; a ramp rises, so start lower"
        )


def _parallel_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline} but parallel.pipeline is 1; interleaving needs "
            "at least 2 stages"
        )
    if parallel.overlap_p2p and parallel.virtual_pipeline == 1:
        yield (
            "parallel.overlap_p2p is true but parallel.virtual_pipeline is 1; only an interleaved schedule overlaps "
            "messages with computation: set parallel.virtual_pipeline or leave it out"
        )
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence is true but parallel.tensor is 1; sequence parallelism splits within a tensor group"


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    settings = config.optimizer
    for needed in ("distributed", "overlap_grad_reduce"):
        if settings.overlap_param_gather and not getattr(settings, needed):
            yield (
                f"optimizer.overlap_param_gather is true but optimizer.{needed} is false; weights are gathered bucket "
                "by bucket only with both, so set it to true"
            )
    if settings.kind != "muon" and settings.muon is not None:
        yield f"optimizer.muon is set but optimizer.kind is {settings.kind}; remove it, or set optimizer.kind to muon"
    if settings.grad_reduce_dtype == "bf16" and config.precision.dtype == "fp32":
        yield "optimizer.grad_reduce_dtype is bf16 but precision.dtype is fp32; use precision.dtype: bf16, or fp32 here"


def _division_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    for key, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_key_value_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("vocab_size", model.vocab_size),
    ):
        if value % parallel.tensor:
            yield (
                f"parallel.tensor is {parallel.tensor}, which does not divide model.{key} = {value}; choose a common "
                "divisor"
            )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if model.num_layers < chunks:
        yield (
            f"model.num_layers is {model.num_layers}, fewer than parallel.pipeline * parallel.virtual_pipeline = "
            f"{chunks}; every model chunk needs a layer"
        )
    if parallel.sequence and model.seq_length % parallel.tensor:
        yield (
            f"model.seq_length is {model.seq_length}, which parallel.tensor = {parallel.tensor} does not divide; "
            "sequence parallelism splits the sequence evenly"
        )


def _budget_problems(validation: ValidationConfig, thinking: ThinkingConfig) -> Iterator[str]:
    for key, budget in validation.budgets_by_key().items():
        if thinking.kind != "itt":
            yield f"{key} is {list(budget)} but thinking.kind is {thinking.kind}, which has no budget; remove it"
        elif len(budget) != thinking.num_routed_steps:
            yield (
                f"{key} has {len(budget)} entries but thinking.capacity has {thinking.num_routed_steps} routed steps; "
                "give one entry per routed step"
            )
        elif thinking.residual == "replace" and 0 in budget:
            yield (
                f"{key} contains 0 but thinking.residual is replace, where skipping a step leaves hidden states unlike "
                "those of training; use budgets above 0, or residual: accumulate"
            )


def _rounding_problems(config: RunConfig, section: str) -> Iterator[str]:
    """Capacities and budgets that round to zero tokens."""
    thinking, seq_length = config.thinking, config.model.seq_length
    values: dict[str, tuple[float, ...]] = {}
    if section == "validation":
        values = config.validation.budgets_by_key()
    elif thinking.kind == "itt":
        capacity, ramp = thinking.capacity, thinking.capacity_schedule == "ramp"
        lowest = capacity.sample[:1] if isinstance(capacity, SampledCapacity) else capacity
        values = {"thinking.capacity": (*lowest, *((thinking.ramp_start_share,) if ramp else ()))}
    for key, fractions in values.items():
        for fraction in fractions:
            if 0 < fraction * seq_length < 0.5:
                yield (
                    f"{key} contains {fraction}, which rounds to zero of model.seq_length = {seq_length} tokens; use "
                    f"at least {1 / seq_length:.2g}"
                )


def _schedule_problems(schedule: ScheduleConfig) -> Iterator[str]:
    if schedule.warmup_steps >= schedule.steps:
        yield (
            f"schedule.warmup_steps is {schedule.warmup_steps}, but the run has schedule.steps = {schedule.steps}; the "
            "warm-up must end before the run does"
        )
    if schedule.trunk_steps is not None and schedule.trunk_steps < schedule.steps:
        yield (
            f"schedule.trunk_steps is {schedule.trunk_steps}, but the branch ends at schedule.steps = "
            f"{schedule.steps}; branch earlier, use fewer schedule.decay_steps, or train a longer trunk"
        )
    if schedule.decay != "wsd":
        for key, default in (("decay_steps", None), ("decay_shape", "linear")):
            value = getattr(schedule, key)
            if value != default:
                yield f"schedule.{key} is {value} but schedule.decay is {schedule.decay}; it belongs to wsd, remove it"
    elif schedule.decay_steps is None:
        yield "schedule.decay is wsd but schedule.decay_steps is not set; give the length of the decay, such as a tenth"
    elif schedule.warmup_steps + schedule.decay_steps > schedule.steps:
        yield (
            f"schedule.decay_steps is {schedule.decay_steps}, but schedule.steps - schedule.warmup_steps is "
            f"{schedule.steps - schedule.warmup_steps}; the decay must fit after the warm-up"
        )


def _warmup_problems(schedule: ScheduleConfig, peak: float) -> Iterator[str]:
    first = schedule.warmup_init_learning_rate
    if first is not None and schedule.warmup_steps == 0:
        yield f"schedule.warmup_init_learning_rate is {first} but schedule.warmup_steps is 0; set both or neither"
    elif first is not None and first > peak:
        yield f"schedule.warmup_init_learning_rate is {first}, above optimizer.learning_rate = {peak}; a warm-up rises"


def _batch_problems(batch: BatchConfig) -> Iterator[str]:
    if batch.global_size % batch.micro:
        yield f"batch.global is {batch.global_size}, not a multiple of batch.micro = {batch.micro}"
    ramp = batch.ramp
    if ramp is None:
        return
    if ramp.start >= batch.global_size:
        yield f"batch.ramp.start is {ramp.start}, but batch.global is {batch.global_size}; a ramp rises, so start lower"
    elif (batch.global_size - ramp.start) % ramp.increment:
        yield (
            f"batch.ramp.increment is {ramp.increment}, which does not divide batch.global - batch.ramp.start = "
            f"{batch.global_size} - {ramp.start} = {batch.global_size - ramp.start}; choose a divisor"
        )
    for key, size in (("start", ramp.start), ("increment", ramp.increment)):
        if size % batch.micro:
            yield f"batch.ramp.{key} is {size}, not a multiple of batch.micro = {batch.micro}"


# Required and optional keys of `model.rope_scaling` by type.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    checkpoint, trunk_steps = config.checkpoint, config.schedule.trunk_steps
    if checkpoint.branch_from is not None and checkpoint.initial_weights is not None:
        yield "checkpoint.branch_from and checkpoint.initial_weights are both set; a run starts from one of them"
    if checkpoint.branch_from is not None and trunk_steps is None:
        yield "checkpoint.branch_from is set but schedule.trunk_steps is not; use --branch-from RUN --at STEP"
    exported, saved = checkpoint.export_every_steps, checkpoint.save_interval_steps
    if exported is not None and exported % saved:
        yield (
            f"checkpoint.export_every_steps is {exported}, no multiple of checkpoint.save_interval_steps = {saved}; "
            "exports are made from checkpoints"
        )


def _phase_problems(config: RunConfig) -> Iterator[str]:
    """Phases that do not divide the run, and weights that belong to no data."""
    phases, length = config.data.phases, config.model.seq_length
    begin, end = 0, config.num_training_samples * length
    steps = "schedule.steps" if config.schedule.trunk_steps is None else "schedule.trunk_steps"
    less = "" if config.batch.ramp is None else ", less in batch.ramp"
    run = f"the {end:,} tokens of the run ({steps} * batch.global * model.seq_length{less})"
    for position, phase in enumerate(phases):
        key, until, is_last = f"data.phases[{position}]", phase.until_tokens, position == len(phases) - 1
        unknown = [name for name in phase.weights or () if name not in config.data.blend]
        if unknown:
            yield f"{key}.weights names {', '.join(unknown)}; domains of data.blend: {', '.join(config.data.blend)}"
        elif phase.weights is not None and not any(phase.weights.values()):
            yield f"{key}.weights has no positive weight; give one to at least one domain of data.blend"
        if until is None:
            if not is_last:
                yield f"{key}.until_tokens is null, which is for the last phase; give the tokens at which it ends"
            continue
        value = f"{key}.until_tokens is {until:,}"
        if until - begin < length:
            yield f"{value}, but the phase begins at {begin:,}; order phases by until_tokens, each at least one sample"
        elif until >= end + (config.tokens_per_step if is_last else 0):
            yield f"{value}, past {run}; lower it or lengthen the run; null for the last phase is the end of the run"
        elif is_last and until <= end - config.tokens_per_step:
            yield f"{value}, before {run}; raise it, or give null, the end of the run"
        begin = until


_MULTIPLE = re.compile(r"x\d+(\.\d*)?(e-?\d+)?")


def _group_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    for position, group in enumerate(optimizer.groups):
        key = f"optimizer.groups[{position}]"
        values = {"learning_rate": group.learning_rate, "weight_decay": group.weight_decay}
        if not any(value is not None for value in values.values()):
            yield f"{key} ({group.match}) sets nothing; give it a learning_rate or a weight_decay, or remove it"
        for name, value in values.items():
            if isinstance(value, str) and not _MULTIPLE.fullmatch(value):
                yield f"{key}.{name} is {value!r}; give a number, or a multiple of optimizer.{name} such as x0.3"
            elif isinstance(value, float) and value < 0:
                yield f"{key}.{name} is {value}, below 0; give 0 or more, or a multiple such as x0.3"


# Sections that a rule reads, and the rule.
_RULES: tuple[tuple[tuple[str, ...], Callable[[RunConfig], Iterable[str]]], ...] = (
    (("model",), lambda config: _model_problems(config.model)),
    (("model",), lambda config: _rope_problems(config.model)),
    (("thinking",), lambda config: _thinking_problems(config.thinking)),
    (("thinking", "model"), lambda config: _layer_problems(config.thinking, config.model)),
    (("parallel",), lambda config: _parallel_problems(config.parallel)),
    (("optimizer", "precision"), _optimizer_problems),
    (("parallel", "model"), lambda config: _division_problems(config.parallel, config.model)),
    (("validation", "thinking"), lambda config: _budget_problems(config.validation, config.thinking)),
    (("thinking", "model"), lambda config: _rounding_problems(config, "thinking")),
    (("validation", "model"), lambda config: _rounding_problems(config, "validation")),
    (("schedule",), lambda config: _schedule_problems(config.schedule)),
    (
        ("schedule", "optimizer"),
        lambda config: _warmup_problems(config.schedule, config.optimizer.learning_rate),
    ),
    (("batch",), lambda config: _batch_problems(config.batch)),
    (("checkpoint", "schedule"), _checkpoint_problems),
    (("optimizer",), lambda config: _group_problems(config.optimizer)),
    (("data", "model", "schedule", "batch"), _phase_problems),
)

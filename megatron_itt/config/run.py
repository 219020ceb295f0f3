"""Sections of a recipe as frozen dataclasses. Rules between fields are in `check.py`."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from megatron_itt.config.model import STRICT, ModelConfig, PositiveFloat, PositiveInt, ThinkingConfig, setting

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_tokens(value: Any) -> Any:
    """50B -> 50,000,000,000: a string is a number with K, M, B, T or nothing; other types are returned as they are.

    Raises ValueError for another string, for pydantic or an argument parser to report with its key.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", value.strip().lower())
    tokens = round(float(match.group(1)) * _MULTIPLES[match.group(2)]) if match else 0
    if tokens <= 0:
        raise PydanticCustomError("tokens", "give a positive number of tokens, such as 50B or 500M")
    return tokens


NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Tokens = Annotated[PositiveInt, BeforeValidator(parse_tokens)]  # 40B, or a number
Budget = tuple[Annotated[float, Field(ge=0, le=1)], ...]  # 0 skips the step


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ParallelConfig:
    """Model-parallel degrees; data parallel = world size / (tensor * pipeline)."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1  # model chunks per pipeline stage (interleaved schedule)
    sequence: bool = False  # sequence parallelism, within the tensor-parallel group
    overlap_p2p: bool = setting(False, free_on_resume=True)  # send between stages while computing, if interleaved


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DomainConfig:
    """One domain of the blend: the prefix of its `.bin/.idx` pair (null if absent) and its weight."""

    path: str | None = None
    weight: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PhaseConfig:
    """A part of the run, from the end of the phase before it, with weights of its own."""

    until_tokens: Tokens | None = None  # of the run; None, for the last phase: the end of the run
    weights: dict[str, NonNegativeFloat] | None = None  # domains left out have weight 0; None: those of the blend


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataConfig:
    """Training data and its loading."""

    blend: dict[str, DomainConfig] = Field(default_factory=dict)
    phases: tuple[PhaseConfig, ...] = ()  # empty: one, with the weights of the blend
    tokenizer: str | None = None  # Hugging Face tokenizer folder
    loader: Literal["torch", "dali"] = "torch"  # both give the same batches
    max_epochs: PositiveFloat = 4.0  # more repetitions of a domain are rejected
    cache_dir: str | None = None  # of the sample indices; None: beside the data
    reset_at_document_end: bool = False  # positions restart and attention stays within a document

    def phase_weights(self) -> list[dict[str, float]]:
        """The positive weights of each phase, for domains with a path, in the order of the blend."""
        own = {name: domain.weight for name, domain in self.blend.items()}
        given = [own if phase.weights is None else phase.weights for phase in self.phases] or [own]
        return [
            {name: weights[name] for name, domain in self.blend.items() if domain.path and weights.get(name)}
            for weights in given
        ]

    def used_domains(self) -> dict[str, DomainConfig]:
        """The domains that some phase reads."""
        used = set().union(*self.phase_weights())
        return {name: domain for name, domain in self.blend.items() if name in used}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ParameterGroupConfig:
    """Settings of the parameters whose name in a checkpoint contains `match`, or fits it as a pattern with `*`.

    Each is a value, or a multiple ("x0.3") of the optimizer's; None: the default of these parameters.
    """

    match: Annotated[str, Field(min_length=1)]
    learning_rate: float | str | None = None  # a multiple follows the schedule; a value replaces its peak
    weight_decay: float | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MuonConfig:
    """Muon: momentum, then Newton-Schulz iterations."""

    momentum: Beta = 0.95
    nesterov: bool = True
    num_steps: PositiveInt = 5  # Newton-Schulz iterations
    scale: PositiveFloat = 0.2  # of an update, times sqrt(max(rows, columns)): about the size of AdamW's


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class OptimizerConfig:
    """AdamW, or Muon for the matrices of layers and AdamW for the rest, at the same learning rate and weight decay.

    Defaults: the settings of the code base that the paper names.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    muon: MuonConfig | None = None  # None: its defaults
    learning_rate: PositiveFloat = 3.0e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0  # of matrices; norms, biases, routers and step encodings are exempt
    groups: tuple[ParameterGroupConfig, ...] = ()  # exceptions to the learning rate and the weight decay
    clip_grad_norm: NonNegativeFloat = 1.0  # 0 turns clipping off
    z_loss: NonNegativeFloat = 0.0  # coefficient of the mean squared log-partition function of the logits in the loss
    distributed: bool = True  # shard the optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = setting(False, free_on_resume=True)  # reduce gradients during backward
    overlap_param_gather: bool = setting(False, free_on_resume=True)  # gather updated weights during the next forward
    grad_reduce_dtype: Literal["fp32", "bf16"] = setting("fp32", free_on_resume=True)  # type of gradients in bf16 runs


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ScheduleConfig:
    """Length of the run and the learning rate over it, in optimizer steps."""

    steps: PositiveInt
    warmup_steps: NonNegativeInt = 0
    warmup_init_learning_rate: NonNegativeFloat | None = None  # of step 1; None: one part of warmup_steps + 1
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: PositiveInt | None = None  # of wsd (warm-up, stable, decay): the last steps of the run
    decay_shape: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "linear"  # of wsd
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    trunk_steps: PositiveInt | None = None  # of a branch: the steps of its trunk, whose order of samples continues

    @property
    def order_steps(self) -> int:
        """Steps that the order of samples and a ramp of capacities are laid out for: the run's, or its trunk's."""
        return self.trunk_steps or self.steps


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BatchRampConfig:
    """Smaller batches at the beginning: `start`, raised by `increment` until the run has read `samples`.

    Source: Megatron-LM, --rampup-batch-size; every size is that of an equal part of the samples.
    """

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BatchConfig:
    """Sequences per optimizer step (`global`) and per forward pass on one data-parallel rank (`micro`)."""

    global_size: PositiveInt = Field(default=256, alias="global")
    micro: PositiveInt = 1
    ramp: BatchRampConfig | None = None

    def size_after(self, samples: int) -> int:
        """Sequences of the step that begins when the run has read so many."""
        ramp = self.ramp
        if ramp is None or samples >= ramp.samples:
            return self.global_size
        return ramp.start + ramp.increment * (samples * self._num_increments // ramp.samples)

    def samples_after(self, steps: int) -> int:
        """Sequences that the first `steps` steps read."""
        samples = 0
        while steps > 0 and (size := self.size_after(samples)) < self.global_size:
            assert self.ramp is not None, "without a ramp the batch is whole"
            increments = (size - self.ramp.start) // self.ramp.increment + 1
            end = -(-increments * self.ramp.samples // self._num_increments)
            count = min(steps, -((samples - end) // size))
            samples, steps = samples + count * size, steps - count
        return samples + steps * self.global_size

    @property
    def _num_increments(self) -> int:
        """At least 1: counts of a ramp that does not divide are asked for while it is refused."""
        assert self.ramp is not None, "of a ramp"
        return max(1, (self.global_size - self.ramp.start) // self.ramp.increment)

    def size_of(self, step: int) -> int:
        """Sequences of optimizer step `step` (from 1)."""
        return self.size_after(self.samples_after(step - 1))


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PrecisionConfig:
    """`bf16` keeps float32 master weights in the optimizer; `parts` selects the backend of layers and AdamW."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    parts: Literal["auto", "native", "transformer_engine", "apex"] = "auto"  # auto: the preferred usable one


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TasksConfig:
    """Evaluation tasks of lm-eval in the training loop, routed by thresholds as in generation."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]  # tasks of lm-eval, or of `task_dir`
    interval_steps: PositiveInt = 1000
    limit: PositiveInt | None = 500  # first records of each task; None: all
    budgets: tuple[Budget, ...] = ()  # empty: those of the validation
    task_dir: str | None = None  # folder of lm-eval YAML files
    data_root: str | None = None  # folder with local copies of data sets; without it the hub or its cache is read


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ValidationConfig:
    """Validation on held-out documents, once per thinking budget, and on evaluation tasks."""

    interval_steps: PositiveInt = 1000
    budgets: tuple[Budget, ...] = ()  # empty: the training capacity only
    routing: Literal["as_trained", "threshold"] = "as_trained"  # top-k uses later tokens, thresholds are causal
    tokens: PositiveInt = 2_000_000  # over all domains, held out from training
    tasks: TasksConfig | None = None

    def budgets_by_key(self) -> dict[str, tuple[float, ...]]:
        """Every thinking budget of a validation by its key in a recipe."""
        of_tasks = () if self.tasks is None else self.tasks.budgets
        lists = (("validation.budgets", self.budgets), ("validation.tasks.budgets", of_tasks))
        return {f"{key}[{index}]": budget for key, budgets in lists for index, budget in enumerate(budgets)}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class CheckpointConfig:
    """When to save, and which checkpoints to keep. A run resumes from the newest intact one."""

    save_interval_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    initial_weights: str | None = None  # run folder or checkpoint that initialises the weights of a new run
    branch_from: str | None = None  # checkpoint of another run from which a new one continues, to decay
    keep_every_steps: PositiveInt | None = None  # also keep checkpoints at multiples of this
    keep_steps: tuple[PositiveInt, ...] = ()  # also save after these steps, and keep those checkpoints
    keep_best: bool = True  # also keep the one with the lowest validation loss
    asynchronous: bool = False  # write in the background, from a copy in host memory
    export_every_steps: PositiveInt | None = None  # also export checkpoints at multiples of this, in the background
    verify: bool = True  # check hashes of large files before resuming; small ones always are


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WandbConfig:
    """Weights & Biases; `offline` writes into the run folder, for `wandb sync`."""

    project: str
    entity: str | None = None
    name: str | None = None  # None: the run folder's name
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ProfileConfig:
    """Steps and ranks to profile; creating RUN/profile_now profiles rank 0 at any time."""

    start: PositiveInt  # the first step of the window
    steps: PositiveInt = 2
    ranks: tuple[NonNegativeInt, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class LoggingConfig:
    """Run folder and metric sinks."""

    run_dir: str
    interval_steps: PositiveInt = 10
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    profile: ProfileConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RuntimeConfig:
    """Seed, determinism, device, and guards against divergence and hangs.

    A spike is a loss or gradient norm more than `spike_factor` robust deviations above the median of the last
    `spike_window` steps. `spike_policy` handles steps that spike or are not finite: `none` (spikes pass, a non-finite
    step ends the run), `skip` (no update), or `rollback` (reload the last checkpoint and skip the data since). A
    non-finite step never updates the weights.
    """

    seed: NonNegativeInt = 1234
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: PositiveFloat = 10.0  # collective timeout; the run then names the missing ranks and ends
    spike_policy: Literal["none", "skip", "rollback"] = "none"
    spike_factor: PositiveFloat = 10.0
    spike_window: Annotated[int, Field(ge=8)] = 64
    max_recoveries: NonNegativeInt = 5  # rollbacks, or consecutive skipped steps, before the run ends as diverged
    replica_check_steps: NonNegativeInt = 1000  # interval of comparing replicas, also done before saves; 0: never
    # Interval of garbage collections, so that all ranks stop for them in the same step; 0: Python decides.
    gc_interval_steps: NonNegativeInt = setting(0, free_on_resume=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RunConfig:
    """A whole recipe."""

    model: ModelConfig
    schedule: ScheduleConfig
    logging: LoggingConfig
    thinking: ThinkingConfig = Field(default_factory=ThinkingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @property
    def num_training_samples(self) -> int:
        """Sequences whose order is laid out: those that the run, or the trunk of a branch, reads as a whole."""
        return self.batch.samples_after(self.schedule.order_steps)

    def phase_samples(self) -> list[int]:
        """Training samples of each phase; the last phase ends with the run, or with the trunk of a branch."""
        inner = [math.ceil((phase.until_tokens or 0) / self.model.seq_length) for phase in self.data.phases[:-1]]
        return [end - begin for begin, end in pairwise([0, *inner, self.num_training_samples])]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, after a ramp of the batch."""
        return self.batch.global_size * self.model.seq_length

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` optimizer steps read."""
        return self.batch.samples_after(steps) * self.model.seq_length

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks in a job of `world_size` processes."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes of a data-parallel rank per optimizer step, after a ramp of the batch."""
        return self.batch.global_size // (self.batch.micro * self.data_parallel_size(world_size))

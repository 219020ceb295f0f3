"""All sections of a recipe, as frozen dataclasses: what a run is, and nothing it does.

Values are checked one by one here (types, ranges); rules between sections are in `check.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_itt.config.model import STRICT, ModelConfig, PositiveFloat, PositiveInt, ThinkingConfig

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Budget = tuple[Annotated[float, Field(ge=0, le=1)], ...]  # a share of 0 leaves the step out


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ParallelConfig:
    """Model-parallel degrees; data parallel = world size / (tensor * pipeline)."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1  # model chunks per pipeline stage (interleaved schedule)
    sequence: bool = False  # sequence parallelism, within the tensor-parallel group


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DomainConfig:
    """One domain of the blend: the prefix of its `.bin/.idx` pair (null if absent) and its weight."""

    path: str | None = None
    weight: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataConfig:
    """What the model reads."""

    blend: dict[str, DomainConfig] = Field(default_factory=dict)
    tokenizer: str | None = None  # Hugging Face tokenizer folder
    loader: Literal["torch", "dali"] = "torch"  # who brings batches to the device; both give the same ones
    max_epochs: PositiveFloat = 4.0  # a domain repeated more often than this is refused
    cache_dir: str | None = None  # of the sample indices; None: beside the data
    reset_at_document_end: bool = False  # positions and attention begin anew at each document of a sequence


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class OptimizerConfig:
    """AdamW. Defaults: the settings of the code base that the paper names."""

    learning_rate: PositiveFloat = 3.0e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad_norm: NonNegativeFloat = 1.0  # 0 turns clipping off
    distributed: bool = True  # shard the optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ScheduleConfig:
    """Length of the run and the learning rate over it, in optimizer steps."""

    steps: PositiveInt
    warmup_steps: NonNegativeInt = 0
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BatchConfig:
    """Sequences per optimizer step (`global`) and per forward pass on one data-parallel rank (`micro`)."""

    global_size: PositiveInt = Field(default=256, alias="global")
    micro: PositiveInt = 1


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PrecisionConfig:
    """`bf16` keeps float32 master weights in the optimizer; `parts` chooses the implementation of layers and AdamW."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    parts: Literal["auto", "native", "transformer_engine", "apex"] = "auto"  # auto: the best that is usable


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ValidationConfig:
    """Validation on held-out documents, once per thinking budget."""

    interval_steps: PositiveInt = 1000
    budgets: tuple[Budget, ...] = ()  # empty: the training capacity only
    routing: Literal["as_trained", "threshold"] = "as_trained"  # top-k looks at later tokens, thresholds do not
    tokens: PositiveInt = 2_000_000  # over all domains, split off before training data is taken


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class CheckpointConfig:
    """When to save, which checkpoints to keep, and how. A run returns to the newest intact one."""

    save_interval_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    initial_weights: str | None = None  # run folder or checkpoint whose weights a new run starts from, at step 0
    keep_every_steps: PositiveInt | None = None  # checkpoints of multiples of this stay for good
    keep_best: bool = True  # the one of the lowest validation loss stays, of those saved at a step that validates
    asynchronous: bool = False  # write in the background; takes host memory for a copy of what a rank saves
    verify: bool = True  # compare large files with their hashes before continuing; small files always are


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WandbConfig:
    """Weights & Biases: `offline` writes into the run folder, to be sent later with `wandb sync`."""

    project: str
    entity: str | None = None
    name: str | None = None  # None: the run folder's name
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ProfileConfig:
    """A window of steps to profile, on these ranks; touching RUN/profile_now profiles rank 0 at any time."""

    start: PositiveInt  # the first step of the window
    steps: PositiveInt = 2
    ranks: tuple[NonNegativeInt, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class LoggingConfig:
    """Where a run writes, and how often it speaks."""

    run_dir: str
    interval_steps: PositiveInt = 10
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    profile: ProfileConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RuntimeConfig:
    """Seed, determinism and device; what guards a long run.

    A spike is a loss or gradient norm more than `spike_factor` robust deviations above the median of the last
    `spike_window` steps. `spike_policy` says what happens to a step that spikes or is not finite: `none` (a spike
    passes, a non-finite step ends the run), `skip` (weights stay as they are), or `rollback` (they go back to the last
    checkpoint, and the data in between is not read again). The weights are never changed by a non-finite step.
    """

    seed: NonNegativeInt = 1234
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: PositiveFloat = 10.0  # of a collective, before the run names the ranks that are missing and ends
    spike_policy: Literal["none", "skip", "rollback"] = "none"
    spike_factor: PositiveFloat = 10.0
    spike_window: Annotated[int, Field(ge=8)] = 64
    max_recoveries: NonNegativeInt = 5  # rollbacks of a run, or skipped steps in a row, before it ends as diverged
    replica_check_steps: NonNegativeInt = 1000  # compare the weights of replicas this often and before saves; 0: never


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
        """Sequences that the run reads from first to last step; fixed by the recipe."""
        return self.schedule.steps * self.batch.global_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.global_size * self.model.seq_length

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks in a job of `world_size` processes."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

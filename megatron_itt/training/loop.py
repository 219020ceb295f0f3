"""The training loop: start or resume, step, log, validate, save, stop. No maths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_itt.config.parts import ChosenParts
from megatron_itt.config.run import RunConfig
from megatron_itt.data.blend import resolve_blend
from megatron_itt.data.datasets import Datasets, build_datasets
from megatron_itt.data.loader import Loader, check_loader, open_loader
from megatron_itt.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.log import configure_logging, get_logger
from megatron_itt.parallel.groups import ParallelPlace, start_parallel, stop_parallel
from megatron_itt.training.assemble import Trainer, build_trainer
from megatron_itt.training.checkpointing import Checkpointer
from megatron_itt.training.metrics import StepClock, console_line, peak_flops_per_s
from megatron_itt.training.run_folder import LOG_FILE, is_finished, mark_diverged, mark_finished, prepare_run_folder
from megatron_itt.training.signals import StopRequest
from megatron_itt.training.sinks import Sinks
from megatron_itt.training.step import Batch, StepResult, train_step
from megatron_itt.training.validation import headline_loss, run_validation, validation_lines


class TrainingDivergedError(IttError):
    """Loss or gradient norm is no longer a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trainer with its data and outputs, at a step."""

    trainer: Trainer
    datasets: Datasets
    checkpointer: Checkpointer
    run_dir: Path
    first_step: int


def train(config: RunConfig, *, parts: ChosenParts | None = None) -> bool:
    """Run a recipe to its last step, resuming from the newest checkpoint in its run folder.

    Every process of the job calls this. Returns whether the run is complete; False after a signal asked it to stop, in
    which case a checkpoint was saved. `parts` is logged. Raises IttError subclasses for bad input before training starts.
    """
    tokenizer = check_inputs(config)
    stop = StopRequest()  # before the slow part of starting: a warning that arrives there is not lost
    try:
        place = start_parallel(config)
        run_dir = Path(config.logging.run_dir)
        if is_finished(run_dir):
            configure_logging(rank=place.rank)
            get_logger().info("%s is finished already; choose another logging.run_dir to train again", run_dir)
            return True
        if place.is_main:
            prepare_run_folder(config)
        dist.barrier()
        configure_logging(rank=place.rank, log_file=str(run_dir / LOG_FILE))
        if parts is not None:
            get_logger().info(str(parts))
        return _run_to_end(_start_or_resume(config, place, tokenizer, run_dir), stop)
    finally:
        stop_parallel()
        stop.restore()


def check_inputs(config: RunConfig) -> Tokenizer:
    """What can be wrong with data and tokenizer, before any process group exists. Returns the tokenizer."""
    if not config.data.blend:
        raise ConfigError("data.blend is empty; name at least one domain with its path and weight")
    if config.data.tokenizer is None:
        raise ConfigError("data.tokenizer is not set; name the tokenizer folder that the data was made with")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config.model.vocab_size)
    check_loader(config.data.loader)
    resolve_blend(config)
    return tokenizer


def _start_or_resume(config: RunConfig, place: ParallelPlace, tokenizer: Tokenizer, run_dir: Path) -> Run:
    logger = get_logger()
    blend = resolve_blend(config)
    logger.info(blend.table())
    checkpointer = Checkpointer(config, run_dir, data_fingerprint=blend.fingerprint, tokenizer_sha256=tokenizer.sha256)
    point = checkpointer.find_resume_point()
    datasets = build_datasets(config, tokenizer=tokenizer)
    trainer = build_trainer(config, place)
    if point is not None:
        checkpointer.resume(trainer, point)
    return Run(
        trainer=trainer,
        datasets=datasets,
        checkpointer=checkpointer,
        run_dir=run_dir,
        first_step=0 if point is None else point.state.step,
    )


def _run_to_end(run: Run, stop: StopRequest) -> bool:
    trainer, config = run.trainer, run.trainer.config
    main = trainer.place.is_main
    sinks = Sinks(run.run_dir, enabled=main, tensorboard=config.logging.tensorboard, resume_step=run.first_step)
    loader = open_loader(
        config.data.loader,
        run.datasets.train,
        device=trainer.place.device,
        consumed_samples=run.first_step * config.batch.global_size,
        micro_batch_size=config.batch.micro,
        num_microbatches=trainer.num_microbatches,
        data_parallel_rank=trainer.place.data_parallel_rank,
        data_parallel_size=trainer.place.data_parallel_size,
    )
    try:
        if run.first_step == 0:
            _validate(run, sinks, 0)
        step = _step_until_stopped(run, sinks, stop, loader)
        run.checkpointer.finish()
    finally:
        loader.close()
        sinks.close()
    if step < config.schedule.steps:
        get_logger().info("stopped after step %d by a signal; the same command continues", step)
        return False
    if main:
        mark_finished(run.run_dir, step)
    get_logger().info("finished %d steps; results are in %s", step, run.run_dir)
    return True


def _step_until_stopped(run: Run, sinks: Sinks, stop: StopRequest, loader: Loader) -> int:
    """Train, log, validate and save. Returns the number of steps done."""
    trainer, config = run.trainer, run.trainer.config
    clock = StepClock(config, trainer.place.world_size, peak_flops_per_s(trainer.place.device))
    batches = _timed(loader, clock)
    for step in range(run.first_step + 1, config.schedule.steps + 1):
        clock.restart()
        result = train_step(trainer, batches, step)
        record = clock.record(step, result)
        sinks.write(record)
        if not result.is_finite:
            _give_up(run, step, result)
        last = step == config.schedule.steps
        if last or step == run.first_step + 1 or step % config.logging.interval_steps == 0:
            get_logger().info(console_line(record, config.schedule.steps, clock.time_left_s(step)))
        validated = last or step % config.validation.interval_steps == 0
        loss = _validate(run, sinks, step) if validated else None
        stopping = stop.is_agreed(trainer.place.device)
        if last or stopping or step % config.checkpoint.save_interval_steps == 0:
            run.checkpointer.save(trainer, step, validation_loss=loss)
        else:
            run.checkpointer.poll()
        if stopping:
            return step
    return config.schedule.steps


def _give_up(run: Run, step: int, result: StepResult) -> None:
    reason = (
        f"step {step}: loss is {result.loss} and the gradient norm {result.grad_norm}; the last checkpoint is intact; "
        "lower optimizer.learning_rate or look at the data of this step"
    )
    if run.trainer.place.is_main:
        mark_diverged(run.run_dir, reason)
    raise TrainingDivergedError(reason)


def _timed(loader: Loader, clock: StepClock) -> Iterator[Batch]:
    while True:
        started = time.perf_counter()
        batch = next(loader)
        clock.waited(time.perf_counter() - started)
        yield batch


def _validate(run: Run, sinks: Sinks, step: int) -> float | None:
    """Returns the mean loss at the first budget; None without validation data."""
    if not run.datasets.validation:
        return None
    record = run_validation(run.trainer, run.datasets.validation, step)
    sinks.write(record)
    for line in validation_lines(record):
        get_logger().info(line)
    return headline_loss(record)

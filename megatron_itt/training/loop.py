"""The training loop: start or resume, step, log, validate, save, stop. No maths."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_itt.checkpoint.branch import find_branch_point
from megatron_itt.checkpoint.store import checkpoint_root, list_checkpoints
from megatron_itt.config.backends import ChosenBackend
from megatron_itt.config.run import RunConfig
from megatron_itt.data.batches.blend import resolve_blend
from megatron_itt.data.batches.datasets import Datasets, build_datasets, check_blend
from megatron_itt.data.batches.loader import Loader, check_loader, open_loader
from megatron_itt.data.text.tokenizer import Tokenizer, recipe_tokenizer
from megatron_itt.data.text.tokenizer_folder import check_exportable
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.log import configure_logging, get_logger
from megatron_itt.parallel.collectives import gather_objects, on_rank_zero
from megatron_itt.parallel.groups import ParallelContext, start_parallel, stop_parallel
from megatron_itt.training.capacity import describe_rounding
from megatron_itt.training.checkpointing import Checkpointer, load_initial_weights
from megatron_itt.training.exports import Export
from megatron_itt.training.guards import StepGuard, TrainingDivergedError, Verdict, are_weights_finite, check_replicas
from megatron_itt.training.metrics import Reporter
from megatron_itt.training.run_folder import (
    LOG_FILE,
    begin_training,
    mark_diverged,
    mark_finished,
    opened_run_folder,
    recorded_start,
)
from megatron_itt.training.scoring import OpenTasks, TaskEvaluation
from megatron_itt.training.signals import StopRequest
from megatron_itt.training.sinks import check_sinks
from megatron_itt.training.step import Batch, StepResult, Watch, train_step
from megatron_itt.training.trainer import Trainer, build_trainer
from megatron_itt.training.validation import headline_loss, run_validation
from megatron_itt.training.watchdog import start_watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trainer with its data and outputs, at a step. `validation_due`: a signal cut off that step's validation.

    `tasks`: the evaluation tasks of `validation.tasks`, if the recipe has them.
    """

    trainer: Trainer
    datasets: Datasets
    checkpointer: Checkpointer
    watch: Watch
    report: Reporter
    run_dir: Path
    first_step: int
    validation_due: bool
    tasks: TaskEvaluation | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What the loop calls and rooms above it define: opening evaluation tasks on rank 0, and exporting a checkpoint."""

    open_tasks: OpenTasks | None = None
    export: Export | None = None


NO_HOOKS = Hooks()


def train(
    config: RunConfig,
    *,
    backend: ChosenBackend | None = None,
    allow_changed: Sequence[str] = (),
    hooks: Hooks = NO_HOOKS,
) -> bool:
    """Run a recipe to its last step, resuming from the newest checkpoint in its run folder.

    Every process of the job calls this. Returns whether the run is complete; False after a signal asked it to stop, in
    which case a checkpoint was saved; logs `backend`. `allow_changed` names what may differ from the checkpoint that
    the run continues from; with `schedule.steps` in it, a finished run trains on to a later step. `hooks`: what
    `validation.tasks` and `checkpoint.export_every_steps` need. Raises IttError subclasses for bad input, and
    TrainingDivergedError.
    """
    tokenizer = check_inputs(config)
    stop = StopRequest()  # before the slow part of starting: a warning that arrives there is not lost
    try:
        place = start_parallel(config)
        run_dir = Path(config.logging.run_dir)
        with _opened_run_folder(config, allow_changed=allow_changed) as has_work:
            configure_logging(rank=place.rank, log_file=str(run_dir / LOG_FILE) if has_work else None)
            if not has_work:
                get_logger().info("%s is finished already; choose another logging.run_dir to train again", run_dir)
                return True
            if backend is not None:
                get_logger().info(str(backend))
            run = _start_or_resume(config, place, tokenizer, stop, allow_changed=allow_changed, hooks=hooks)
            hosts = gather_objects(socket.gethostname())
            with recorded_start(config, first_step=run.first_step, hosts=hosts) if place.is_main else nullcontext():
                return _run_to_end(run)
    finally:
        stop_parallel()
        stop.restore()


def check_inputs(config: RunConfig) -> Tokenizer:
    """What can be wrong with data and tokenizer, before any process group exists. Returns the tokenizer."""
    if not config.data.blend:
        raise ConfigError("data.blend is empty; name at least one domain with its path and weight")
    if not list_checkpoints(checkpoint_root(config.logging.run_dir)):  # else it resumes, and needs its trunk no more
        find_branch_point(config)
    tokenizer = recipe_tokenizer(config)
    check_loader(config.data.loader)
    check_sinks(config)
    check_blend(config, tokenizer)
    check_exportable(tokenizer)
    return tokenizer


@contextmanager
def _opened_run_folder(config: RunConfig, *, allow_changed: Sequence[str]) -> Iterator[bool]:
    """Have rank 0 claim and fill the run folder within a block; yield whether there is something left to do."""
    with ExitStack() as held:
        yield on_rank_zero(lambda: held.enter_context(opened_run_folder(config, allow_changed=allow_changed)))


def _start_or_resume(
    config: RunConfig,
    place: ParallelContext,
    tokenizer: Tokenizer,
    stop: StopRequest,
    *,
    allow_changed: Sequence[str],
    hooks: Hooks,
) -> Run:
    run_dir = Path(config.logging.run_dir)
    tasks = TaskEvaluation(config, tokenizer, hooks.open_tasks) if config.validation.tasks is not None else None
    blend = resolve_blend(config)
    get_logger().info(blend.table())
    checkpointer = Checkpointer(
        config,
        run_dir,
        fingerprint_at=blend.fingerprint_at,
        tokenizer_sha256=tokenizer.sha256,
        end_of_document=tokenizer.eod,
        allow_changed=allow_changed,
        export=hooks.export,
    )
    point = checkpointer.find_resume_point() or checkpointer.find_branch_point()
    weights = checkpointer.find_initial_weights() if point is None else None
    datasets = build_datasets(config, tokenizer=tokenizer)
    trainer = build_trainer(config, place)
    if (rounding := describe_rounding(config)) is not None:
        get_logger().info(rounding)
    watch = Watch(guard=StepGuard(config.runtime), stop=stop)
    first_step = 0
    memory: dict[str, Any] = {"validation_due": True}
    if point is not None:
        checkpointer.resume(trainer, point)
        first_step, memory = point.state.step, point.state.loop
        watch.guard.restore(memory.get("guard", {}))
    elif weights is not None:
        load_initial_weights(trainer, weights)
    return Run(
        trainer=trainer,
        datasets=datasets,
        checkpointer=checkpointer,
        watch=watch,
        report=Reporter(trainer, resume_step=first_step),
        run_dir=run_dir,
        first_step=first_step,
        validation_due=memory.get("validation_due", False),
        tasks=tasks,
    )


def _run_to_end(run: Run) -> bool:
    trainer, config = run.trainer, run.trainer.config
    if trainer.place.is_main:
        begin_training(config, run.run_dir)
    loader = open_loader(
        config.data.loader,
        run.datasets.train,
        device=trainer.place.device,
        consumed_samples=config.batch.samples_after(run.first_step),
        batch_size=config.batch.size_after,
        micro_batch_size=config.batch.micro,
        num_microbatches=trainer.num_microbatches,
        data_parallel_rank=trainer.place.data_parallel_rank,
        data_parallel_size=trainer.place.data_parallel_size,
    )
    watchdog = start_watchdog(
        run.watch.heartbeat, limit_s=60 * config.runtime.timeout_minutes, device=trainer.place.device
    )
    collects_automatically = gc.isenabled()
    if config.runtime.gc_interval_steps:
        gc.disable()
    try:
        step, is_complete = _train_until_stopped(run, loader)
        run.checkpointer.finish()
        is_complete = is_complete and run.checkpointer.exports.finish(lambda: _may_wait(run.watch))
    finally:
        run.checkpointer.exports.stop()
        if collects_automatically:
            gc.enable()
        if watchdog is not None:
            watchdog.stop()
        loader.close()
        run.report.close()
    if not is_complete:
        get_logger().info("stopped after step %d by a signal; the same command continues", step)
        return False
    if trainer.place.is_main:
        mark_finished(run.run_dir, step)
    get_logger().info("finished %d steps; results are in %s", step, run.run_dir)
    return True


def _train_until_stopped(run: Run, loader: Loader) -> tuple[int, bool]:
    """Train to the last step or until a stop is requested. Return the last step done and whether the run is complete.

    A stop puts validation off until the run continues: the checkpoint comes first.
    """
    config, batches = run.trainer.config, _timed(loader, run.report)
    gc_interval = config.runtime.gc_interval_steps
    step, validation_due, stop_requested = run.first_step, run.validation_due, False
    if validation_due:
        stop_requested = validation_due = _validate(run, step) is None
    while step < config.schedule.steps and not stop_requested:
        step += 1
        result = _train_step(run, batches, step)
        if gc_interval and step % gc_interval == 0:
            gc.collect()
        stop_requested = result.statistics.stop_requested
        has_recovered = result.verdict.action != "accept" and _recover(run, step, result.verdict)
        validation_due, loss = should_validate(config, step) or should_run_tasks(config, step), None
        if validation_due and not stop_requested:
            record = _validate(run, step)
            stop_requested = validation_due = record is None
            loss = None if record is None else headline_loss(record)
        saving = stop_requested or has_recovered or should_save(config, step)
        if should_compare_replicas(config, step, saving=saving):
            run.trainer.gather_weights()
            check_replicas(run.trainer.built)
        if saving:
            _save(run, step, validation_loss=loss, validation_due=validation_due)
            stop_requested |= run.watch.stop.on_any_rank(run.trainer.place.device)
        else:
            run.checkpointer.poll()
    return step, step == config.schedule.steps and not validation_due


def _may_wait(watch: Watch) -> bool:
    """While the last exports are written: say that this rank is alive, and whether they may go on."""
    watch.heartbeat.beat("exports of checkpoints")
    return not watch.stop.is_requested


def should_validate(config: RunConfig, step: int) -> bool:
    """Whether a step is one of those that validation follows; the last one always is."""
    return step == config.schedule.steps or step % config.validation.interval_steps == 0


def should_run_tasks(config: RunConfig, step: int) -> bool:
    """Whether a step is one of those that evaluation tasks follow, if there are any; the last one always is."""
    tasks = config.validation.tasks
    return tasks is not None and (step == config.schedule.steps or step % tasks.interval_steps == 0)


def should_save(config: RunConfig, step: int) -> bool:
    """Whether a step is one of those that a checkpoint follows; the last one always is."""
    wanted = config.checkpoint
    return step == config.schedule.steps or step in wanted.keep_steps or step % wanted.save_interval_steps == 0


def should_compare_replicas(config: RunConfig, step: int, *, saving: bool) -> bool:
    """Whether replicas are compared after a step: at intervals and before every save, unless the recipe says never."""
    interval = config.runtime.replica_check_steps
    return interval > 0 and (saving or step % interval == 0)


def _train_step(run: Run, batches: Iterator[Batch], step: int) -> StepResult:
    run.report.begin(step)
    log_routing = run.report.should_log(step)
    result = train_step(run.trainer, batches, step, watch=run.watch, log_routing=log_routing)
    run.watch.heartbeat.beat("after the update", step)
    run.report.end(step, result)
    return result


def _save(run: Run, step: int, *, validation_loss: float | None, validation_due: bool) -> None:
    run.watch.heartbeat.beat("saving", step)
    run.trainer.gather_weights()
    if not are_weights_finite(run.trainer.built):
        _give_up(run, step, "the weights are no longer finite, so they are not saved")
    memory = {"guard": run.watch.guard.state(), "validation_due": validation_due}
    with run.report.pause("save"):
        run.checkpointer.save(run.trainer, step, validation_loss=validation_loss, loop=memory)


def _recover(run: Run, step: int, verdict: Verdict) -> bool:
    """Do what the guard says about a bad step. Returns whether a checkpoint is needed, so that it happens only once."""
    reason = f"{verdict.reason}; the weights are as they were before step {step}"
    if verdict.action == "stop":
        _give_up(run, step, verdict.reason)
    run.checkpointer.finish()
    point = run.checkpointer.find_resume_point() if verdict.action == "rollback" else None
    if point is None:
        run.report.event(step, "skip", reason)
        return False
    run.checkpointer.resume(run.trainer, point)
    run.trainer.schedule.step(increment=step - point.state.step)  # the learning rate goes by the data read
    reason = f"{verdict.reason}; back to the weights of step {point.state.step}, on to the data of step {step + 1}"
    run.report.event(step, "rollback", reason, to_step=point.state.step)
    return True


def _give_up(run: Run, step: int, problem: str) -> None:
    reason = (
        f"step {step}: {problem}; the last checkpoint is from before; lower optimizer.learning_rate (with "
        "--allow-changed=optimizer.learning_rate), look at the data of this step, or set runtime.spike_policy"
    )
    run.report.event(step, "diverged", reason)
    if run.trainer.place.is_main:
        mark_diverged(run.run_dir, reason)
    run.checkpointer.finish()  # one that is being written is from before as well
    raise TrainingDivergedError(reason)


def _timed(loader: Loader, report: Reporter) -> Iterator[Batch]:
    """The loader's batches; how long each was waited for goes to the report."""
    while True:
        started = time.perf_counter()
        try:
            batch = next(loader)
        except StopIteration:  # megatron-core's schedules would take it for an end of their own
            raise DataError(
                "the training data ended before the last step; the index of the samples is that of a shorter run: "
                "remove data.cache_dir (it is built again) and start again"
            ) from None
        report.waited(time.perf_counter() - started)
        yield batch


def _validate(run: Run, step: int) -> dict[str, Any] | None:
    """Do what validation is due after a step; return its record, or None if the job was asked to stop meanwhile."""
    config = run.trainer.config
    record: dict[str, Any] = {"step": step}
    if run.datasets.validation and should_validate(config, step):
        with run.report.pause("validation"):
            record["validation"] = run_validation(run.trainer, run.datasets.validation, step, watch=run.watch)
        if record["validation"] is None:
            return None
    if run.tasks is not None and should_run_tasks(config, step):
        with run.report.pause("tasks"):
            tasks = run.tasks.run(run.trainer, step, watch=run.watch)
        if tasks is None:
            return None
        if tasks:  # none before there are thresholds
            record["tasks"] = tasks
    run.report.validation(record)
    return record

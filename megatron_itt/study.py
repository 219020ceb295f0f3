"""Queues of small training runs, each of one recipe and one seed: the study and the ladder. `itt study` runs them.

Every run is `python -m megatron_itt.train` in a process of its own, so that an interrupted queue resumes: finished runs
are kept, others resume from their checkpoints. Results: `analysis/study_results.py` and `analysis/ladder.py`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_itt.accounting.flops import count_parameters, forward_flops
from megatron_itt.analysis.ladder import WIDE
from megatron_itt.analysis.study_results import BASELINE, EQUAL_FLOPS, MAIN_VARIANTS, REFERENCE, seed_dir, state_of
from megatron_itt.checkpoint.store import checkpoint_name, checkpoint_root
from megatron_itt.config import RunConfig
from megatron_itt.config.load import load_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.run_lock import LOCK_FILE, is_alive
from megatron_itt.locks import ClaimFile
from megatron_itt.log import get_logger

RECIPES = Path("recipes/study")
ROOT = Path("runs/study")
_POLL_S = 1.0

LADDER_RECIPES = Path("recipes/ladder")
LADDER_ROOT = Path("runs/ladder")
WIDE_AS = "itt_x4"  # whose FLOPs per token the LLaMA `WIDE` has, trained on as many tokens
LADDER_VARIANTS = (BASELINE, "itt_x2", "itt_x4")
HORIZONS = (20, 80, 320)
DECAY_SHARE = 0.2
LEARNING_RATE = 0.32  # of hidden size 1: the rate falls with the width
ORDER_SHARE = 2  # text is laid out for twice the longest horizon: LLaMA reads more at equal FLOPs


class Size(NamedTuple):
    """A shape of the ladder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    thinking: tuple[int, ...]  # layers that think where the recipe leaves thinking.layers at its default


# By non-embedding parameters. Half of the layers think, not the last one: its gates close (docs/does_it_pay.md). Narrow
# models are shallow: at hidden size 32, four layers are as deep as helps, and thinking adds depth.
SIZES = {
    "0.02M": Size(2, 28, 76, 2, (0,)),
    "0.05M": Size(2, 48, 124, 2, (0,)),
    "0.2M": Size(4, 64, 176, 4, (1, 2)),
    "0.8M": Size(4, 128, 352, 4, (1, 2)),
    "3.2M": Size(4, 256, 704, 4, (1, 2)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of the queue."""

    variant: str
    seed: int
    run_dir: Path
    command: tuple[str, ...]
    after: Path | None = None  # run folder of the job that must finish before it


def training_command(processes: int = 1) -> tuple[str, ...]:
    """Return the stock training command on this machine, without its recipe."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return (sys.executable, *(launch if processes > 1 else ()), "-m", "megatron_itt.train")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """Recipes and seeds to run. `overrides` apply to every run."""

    recipes: Path = RECIPES
    root: Path = ROOT
    variants: Sequence[str] = ()  # empty: all of the folder
    main_seeds: int = 3  # of LLaMA, Loop x4 and ITT x4, at equal tokens and at equal FLOPs
    other_seeds: int = 1
    processes: int = 1  # of a run
    overrides: Sequence[str] = ()

    def jobs(self) -> list[Job]:
        """Return the queue: the main comparison first, seed by seed. ConfigError for recipes that do not load."""
        known = [path.stem for path in sorted(self.recipes.glob("*.yaml"))]
        if not known:
            raise ConfigError(f"recipe folder {self.recipes} has no *.yaml; see recipes/study")
        known += [name for name, model in EQUAL_FLOPS.items() if {model, REFERENCE} <= set(known)]
        unknown = sorted(set(self.variants) - set(known))
        if unknown:
            raise ConfigError(f"variant {', '.join(unknown)} is not in {self.recipes}; known: {', '.join(known)}")
        chosen = [name for name in known if not self.variants or name in self.variants]
        for name in chosen:
            load_config(self._recipe_of(name), self.overrides)
        groups = {name: 0 if name in MAIN_VARIANTS else 1 if name in EQUAL_FLOPS else 2 for name in chosen}
        seeds = {name: self.other_seeds if groups[name] == 2 else self.main_seeds for name in chosen}
        order = sorted((groups[name], seed, name) for name in chosen for seed in range(1, seeds[name] + 1))
        return [self._job(name, seed) for _, seed, name in order]

    def _recipe_of(self, variant: str) -> Path:
        return self.recipes / f"{EQUAL_FLOPS.get(variant, variant)}.yaml"

    def _job(self, variant: str, seed: int) -> Job:
        run_dir = seed_dir(self.root, variant, seed)
        length = (f"schedule.steps={self._steps_of_equal_flops(variant)}",) if variant in EQUAL_FLOPS else ()
        command = (
            *training_command(self.processes),
            str(self._recipe_of(variant)),
            *self.overrides,
            *length,
            *(f"runtime.seed={seed}", f"logging.run_dir={run_dir}"),
        )
        return Job(variant=variant, seed=seed, run_dir=run_dir, command=command)

    def _steps_of_equal_flops(self, variant: str) -> int:
        """Number of steps at which a model has the training FLOPs of the reference."""
        own, reference = (
            load_config(path, self.overrides) for path in (self._recipe_of(variant), self._recipe_of(REFERENCE))
        )
        costs = [forward_flops(config.model, config.thinking).training for config in (own, reference)]
        return round(reference.schedule.steps * costs[1] / costs[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderPlan:
    """Sizes, variants, seeds and horizons to run. `overrides` apply to every run.

    A horizon is a number of training tokens per parameter of attention and MLP of the LLaMA of that size. All horizons
    of a model and seed share one stable phase: a run branches from the stable checkpoint of the one before and decays
    over its last fifth, bit for bit the run that had been started alone. All models of a size read the same text in
    the same order, which the seed decides.
    """

    recipes: Path = LADDER_RECIPES
    root: Path = LADDER_ROOT
    sizes: Sequence[str] = ("0.02M", "0.05M")
    variants: Sequence[str] = (*LADDER_VARIANTS, WIDE)
    seeds: int = 3
    horizons: Sequence[int] = HORIZONS
    overrides: Sequence[str] = ()

    def jobs(self) -> list[Job]:
        """Return the queue, the most informative run first: loops last, then short before long horizons,
        small before large models, seed by seed. ConfigError for a size, variant or recipe that does not exist.
        """
        known = [*sorted(path.stem for path in self.recipes.glob("*.yaml")), WIDE]
        for kind, names, there in (("size", self.sizes, SIZES), ("variant", self.variants, known)):
            if unknown := sorted(set(names) - set(there)):
                raise ConfigError(f"{kind} {', '.join(unknown)} is not one of the ladder; known: {', '.join(there)}")
        ranked = [
            item
            for size in self.sizes
            for variant in self.variants
            for seed in range(1, self.seeds + 1)
            for item in self._chain(size, variant, seed)
        ]
        return [job for _, job in sorted(ranked, key=lambda item: item[0])]

    def _chain(self, size: str, variant: str, seed: int) -> list[tuple[tuple[object, ...], Job]]:
        """The runs of one model and seed by length, each branching from the one before, with their ranks."""
        shape = self._wide_shape(size) if variant == WIDE else self._shape(size, variant)
        lengths, longest = self._lengths(size, variant), self._steps(size, max(self.horizons), BASELINE)
        group = 0 if variant in LADDER_VARIANTS else 1 if variant == WIDE else 2
        chain: list[tuple[tuple[object, ...], Job]] = []
        before: tuple[Path, int] | None = None  # its run folder, and the step from which it decayed
        for steps, horizon, name in sorted(lengths):
            run_dir, stable = self.root / size / variant / f"seed_{seed}" / name, steps - round(DECAY_SHARE * steps)
            settings = [
                *shape,
                *self.overrides,
                f"schedule.steps={steps}",
                f"schedule.decay_steps={steps - stable}",
                f"schedule.trunk_steps={ORDER_SHARE * longest}",
                f"checkpoint.keep_steps=[{stable}]",
                f"runtime.seed={seed}",
                f"logging.run_dir={run_dir}",
            ]
            if before is not None:
                origin = checkpoint_root(before[0]) / checkpoint_name(before[1])
                settings.append(f"checkpoint.branch_from={json.dumps(str(origin))}")
            recipe = self.recipes / f"{BASELINE if variant == WIDE else variant}.yaml"
            job = Job(
                variant=f"{size} {variant} {name}",
                seed=seed,
                run_dir=run_dir,
                command=(*training_command(), str(recipe), *settings),
                after=before and before[0],
            )
            rank = (group == 2, horizon, self.sizes.index(size), group, seed, steps, variant)
            chain.append((rank, job))
            before = run_dir, stable
        return chain

    def _lengths(self, size: str, variant: str) -> list[tuple[int, int, str]]:
        """Steps, horizon and folder of the runs of a model: a LLaMA also spends what each thinking model spends."""
        thinking = [name for name in self.variants if name not in (BASELINE, WIDE)] if variant == BASELINE else []
        return [
            (self._steps(size, horizon, spent_by), horizon, f"{horizon}" + f"_as_{spent_by}" * (spent_by != BASELINE))
            for horizon in self.horizons
            for spent_by in (BASELINE, *thinking)
        ]

    def _steps(self, size: str, horizon: int, spent_by: str) -> int:
        """Steps of the LLaMA of a size with the FLOPs that a model spends on a horizon."""
        llama, spender = (self._load(name, self._shape(size, name)) for name in (BASELINE, spent_by))
        parameters, ratio = count_parameters(llama.model, llama.thinking).matrices, _flops(spender) / _flops(llama)
        return round(horizon * parameters * ratio / llama.tokens_per_step)

    def _shape(self, size: str, variant: str) -> tuple[str, ...]:
        """The shape of a size, and the layers that think by default, as overrides of a variant's recipe."""
        shape, thinking = _overrides(SIZES[size]), self._load(variant).thinking
        if thinking.kind == "none" or thinking.layers != "every_other":
            return shape
        return (*shape, f"thinking.layers={json.dumps(SIZES[size].thinking)}")

    def _wide_shape(self, size: str) -> tuple[str, ...]:
        """The shape of the LLaMA whose FLOPs per token are nearest to those of WIDE_AS."""
        own = SIZES[size]
        target = _flops(self._load(WIDE_AS, self._shape(size, WIDE_AS)))
        shapes = [
            _overrides(own._replace(hidden=wider, ffn=round(own.ffn * wider / own.hidden / 4) * 4))
            for wider in range(own.hidden, 2 * own.hidden, 2 * own.heads)
        ]
        return min(shapes, key=lambda shape: abs(_flops(self._load(BASELINE, shape)) - target))

    def _load(self, variant: str, shape: Sequence[str] = ()) -> RunConfig:
        return _load_once(self.recipes / f"{variant}.yaml", (*shape, *self.overrides))


@cache  # every seed and horizon asks for the same few
def _load_once(recipe: Path, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(recipe, overrides)


def _flops(config: RunConfig) -> float:
    return forward_flops(config.model, config.thinking).total


def _overrides(size: Size) -> tuple[str, ...]:
    return (
        f"model.num_layers={size.layers}",
        f"model.hidden_size={size.hidden}",
        f"model.ffn_hidden_size={size.ffn}",
        f"model.num_attention_heads={size.heads}",
        f"model.init_std={size.hidden**-0.5:.3f}",
        f"optimizer.learning_rate={LEARNING_RATE / size.hidden:.2e}",
    )


def run_queue(jobs: Sequence[Job], *, num_parallel: int = 1, minutes: float | None = None) -> dict[str, int]:
    """Run all jobs that are neither finished nor diverged, in order; return the number of jobs in each state.

    A failed run stops those that come after it, not the others; its output is in `output.txt` of its folder. After
    `minutes`, or when the queue itself is stopped, the runs are asked to save and end; the same queue resumes them.
    """
    waiting = [job for job in jobs if state_of(job.run_dir) in ("waiting", "interrupted")]
    get_logger().info("%d runs: %d to do, %d done before", len(jobs), len(waiting), len(jobs) - len(waiting))
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    running: list[_Running] = []
    number = 0
    try:
        while time.monotonic() < deadline:
            running = [run for run in running if not run.has_ended()]
            in_use = [job for job in waiting if _is_in_use(job.run_dir)]  # by a run that a queue killed left behind
            ready = [
                job for job in waiting if job not in in_use and (job.after is None or state_of(job.after) == "finished")
            ]
            for job in ready[: num_parallel - len(running)]:
                waiting.remove(job)
                number += 1
                running.append(_Running(job, number))
            if not running and not in_use:
                break
            time.sleep(_POLL_S)
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
            run.has_ended()
    states = [state_of(job.run_dir) for job in jobs]
    return {str(state): states.count(state) for state in sorted(set(states))}


def _is_in_use(run_dir: Path) -> bool:
    owner = ClaimFile(run_dir / LOCK_FILE).read()
    return owner is not None and is_alive(owner)


class _Running:
    """A job whose process has started."""

    def __init__(self, job: Job, number: int) -> None:
        self._job, self._name, self._started = job, f"[{number}] {job.variant}, seed {job.seed}", time.monotonic()
        get_logger().info("%s: started", self._name)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with (job.run_dir / "output.txt").open("a", encoding="utf-8") as output:
            self.process = subprocess.Popen(job.command, stdout=output, stderr=subprocess.STDOUT)

    def has_ended(self) -> bool:
        """Whether the process has ended; its outcome is logged."""
        code = self.process.poll()
        if code is None:
            return False
        state = state_of(self._job.run_dir)
        known = state in ("finished", "diverged") or code == 0
        outcome = state if known else f"exit code {code}, see {self._job.run_dir / 'output.txt'}"
        get_logger().info("%s: %s after %.0f s", self._name, outcome, time.monotonic() - self._started)
        return True

"""Queue of the study: small training runs, each of one recipe and one seed. `itt study` runs it.

Every run is `python -m megatron_itt.train` in a process of its own, so that an interrupted queue resumes: finished runs
are kept, others resume from their checkpoints. Results and verdicts: `analysis/study_results.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.analysis.study_results import EQUAL_FLOPS, MAIN_VARIANTS, REFERENCE, seed_dir, state_of
from megatron_itt.config.load import load_config
from megatron_itt.errors import ConfigError
from megatron_itt.log import get_logger

RECIPES = Path("recipes/study")
ROOT = Path("runs/study")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of the queue."""

    variant: str
    seed: int
    run_dir: Path
    command: tuple[str, ...]


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
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes))
        command = (
            sys.executable,
            *(launch if self.processes > 1 else ()),
            *("-m", "megatron_itt.train", str(self._recipe_of(variant))),
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


def run_queue(jobs: Sequence[Job], *, num_parallel: int = 1) -> dict[str, int]:
    """Run all jobs that are neither finished nor diverged; return the number of jobs in each state.

    A failed run does not stop the others; its output is in `output.txt` of its folder.
    """
    todo = [job for job in jobs if state_of(job.run_dir) in ("waiting", "interrupted")]
    get_logger().info("%d runs: %d to do, %d done before", len(jobs), len(todo), len(jobs) - len(todo))
    with ThreadPoolExecutor(max_workers=num_parallel) as pool:
        list(pool.map(lambda item: _run(item[1], f"[{item[0]}/{len(todo)}]"), enumerate(todo, start=1)))
    states = [state_of(job.run_dir) for job in jobs]
    return {str(state): states.count(state) for state in sorted(set(states))}


def _run(job: Job, position: str) -> None:
    name = f"{position} {job.variant}, seed {job.seed}"
    get_logger().info("%s: started", name)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (job.run_dir / "output.txt").open("a", encoding="utf-8") as output:
        code = subprocess.run(job.command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode
    state = state_of(job.run_dir)
    outcome = state if state in ("finished", "diverged") else f"exit code {code}, see {job.run_dir / 'output.txt'}"
    get_logger().info("%s: %s after %.0f s", name, outcome, time.monotonic() - started)

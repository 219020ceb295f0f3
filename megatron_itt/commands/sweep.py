"""Train a recipe with every combination of lists of values, resumable; then write a table of the results."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from megatron_itt.commands.arguments import Count, Flag, Recipe
from megatron_itt.config.load import find_recipe
from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging

EXAMPLES = """
  itt sweep debug/itt_tiny optimizer.learning_rate=1e-3,2e-3,4e-3 runtime.seed=1,2,3
  itt sweep debug/itt_tiny optimizer.learning_rate=1e-3,2e-3 schedule.steps=64 --root runs/rates --jobs 2
  itt sweep 466m/itt_x4 optimizer.learning_rate=1e-4,3e-4 --root runs/rates --submit   # a Slurm array, a job per run
  itt sweep 466m/itt_x4 optimizer.learning_rate=1e-4,3e-4 --root runs/rates --results-only
"""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    recipe: Recipe
    overrides: Annotated[
        Positional[tuple[str, ...]], arg(metavar="section.key=a,b,c", help="values to combine; one applies to all")
    ]
    root: Path | None = None  # folder of the runs (default: runs/sweep_ and the recipe's name)
    jobs: Count = 1  # runs at a time on this machine
    processes: Count = 1  # processes of a run, as GPUs
    submit: Flag = False  # submit a Slurm array through slurm/train.sbatch in place of running here
    results_only: Flag = False  # run nothing

    def execute(self) -> int:
        """Run what is not finished, then write ROOT/results.json and ROOT/results.md; 1 if a run did not end."""
        configure_logging()
        recipe = str(find_recipe(self.recipe))
        root = (self.root or Path("runs") / f"sweep_{Path(recipe).stem}").resolve()  # a cluster moves relative folders
        if self.submit and self.results_only:
            raise ConfigError("--submit and --results-only exclude each other; submit first, then ask for results")
        from megatron_itt.analysis.sweep_results import collect_sweep, sweep_markdown, write_sweep
        from megatron_itt.launch.sweep import RUNS_FILE, claim_sweep

        runs = claim_sweep(recipe, self.overrides, root)
        if self.submit:
            job_file = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
            return subprocess.run(["bash", job_file, f"@{root / RUNS_FILE}", "--submit"], check=False).returncode
        if not self.results_only:
            from megatron_itt.study import Job, run_queue, training_command

            launch = training_command(self.processes)
            jobs = [
                Job(variant=run.run_dir.name, seed=run.seed, run_dir=run.run_dir, command=(*launch, *run.arguments))
                for run in runs
            ]
            run_queue(jobs, num_parallel=self.jobs)
        results = collect_sweep(root)
        write_sweep(results, root)
        print(sweep_markdown(results))
        print(f"written to {root}/results.json and {root}/results.md")
        return 0 if all(row["state"] in ("finished", "diverged") for row in results["runs"]) else 1


COMMAND = Sweep

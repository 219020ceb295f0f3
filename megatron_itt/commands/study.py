"""Run every recipe of recipes/study with one or more seeds, resumable; then write tables and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.commands.arguments import Flag, Names, Overrides
from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging

EXAMPLES = """
  itt study                             # after make quickstart: 3 seeds of the main three, 1 of others
  itt study --variants llama,itt_x4 --seeds 5 --jobs 2
  itt study --results-only              # tables of what has finished so far
  itt study --list
  itt study --seeds 3 --other-seeds 3 --processes 8 --root runs/study_162m \\
      model.hidden_size=1024 model.ffn_hidden_size=2560 model.num_layers=8 batch.global=64 schedule.steps=20000
"""


@dataclass(frozen=True, kw_only=True)
class Study:
    overrides: Overrides = ()
    recipes: Path = Path("recipes/study")  # folder of the recipes
    root: Path = Path("runs/study")  # folder of the runs
    variants: Names = ()  # recipes to run (default: all)
    seeds: int = 3  # of llama, loop_x4, itt_x4
    other_seeds: int = 1  # of the other recipes
    jobs: int = 1  # runs at a time
    processes: int = 1  # processes of a run, as GPUs
    output: Path | None = None  # results, without ending (default: ROOT/results)
    results_only: Flag = False  # run nothing
    list: Flag = False  # print the commands of the queue and stop

    def execute(self) -> int:
        """Run the unfinished jobs, then write OUTPUT.json and OUTPUT.md; exit code 1 if a run failed."""
        if min(self.seeds, self.other_seeds, self.jobs, self.processes) < 1:
            raise ConfigError("--seeds, --other-seeds, --jobs and --processes count from 1")
        configure_logging()
        from megatron_itt.analysis.study_results import collect_study, study_markdown, write_study
        from megatron_itt.study import StudyPlan, run_queue

        plan = StudyPlan(
            recipes=self.recipes,
            root=self.root,
            variants=self.variants,
            main_seeds=self.seeds,
            other_seeds=self.other_seeds,
            processes=self.processes,
            overrides=self.overrides,
        )
        if self.list:
            print("\n".join(" ".join(job.command) for job in plan.jobs()))
            return 0
        states = {} if self.results_only else run_queue(plan.jobs(), num_parallel=self.jobs)
        study = collect_study(self.root)
        output = self.output or self.root / "results"
        write_study(study, output)
        print(study_markdown(study))
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        print(f"{counts}; " * bool(states) + f"written to {output}.json and {output}.md")
        return 1 if {"waiting", "interrupted"} & set(states) else 0


COMMAND = Study

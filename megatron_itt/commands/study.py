"""Compare variants by small runs: the study of recipes/study, and the ladder of sizes and horizons; resumable."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.accounting.law import format_predictions, read_law, shipped_law
from megatron_itt.commands.arguments import Flag, Names, Numbers, Overrides, Recipe
from megatron_itt.config import load_config
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.files import publishing
from megatron_itt.log import configure_logging, get_logger
from megatron_itt.tables import write_json, write_text

EXAMPLES = """
  itt study                             # after make quickstart: 3 seeds of the main three, 1 of others
  itt study --variants llama,itt_x4 --seeds 5 --jobs 2
  itt study --results-only              # tables of what has finished so far
  itt study run --list
  itt study --seeds 3 --other-seeds 3 --processes 8 --root runs/study_162m \\
      model.hidden_size=1024 model.ffn_hidden_size=2560 model.num_layers=8 batch.global=64 schedule.steps=20000
  itt study text --input corpus/code corpus/prose
  itt study ladder                      # needs that text; the same command resumes
  itt study ladder --gpu-minutes 12     # what fits on one GPU in so long
  itt study fit --law recipes/ladder/law.json
  itt study predict 162m/itt_x4
"""
_RUNS_OF_A_GPU = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run every recipe of recipes/study with one or more seeds; then write tables and verdicts."""

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


@dataclass(frozen=True, kw_only=True)
class Text:
    """Make tokenizer and data of the ladder from folders of plain text, one domain each."""

    input: tuple[Path, ...]  # folders of text; their names are the domains
    output: Path = Path("runs/ladder/text")  # folder to write
    max_bytes: int = 100_000_000  # of each folder
    vocab_size: int = 512  # ids, special tokens included

    def execute(self) -> int:
        """Write corpus, tokenizer, and an indexed dataset per domain; what is there already stays."""
        configure_logging()
        from megatron_itt.cli import run
        from megatron_itt.data.text.corpora import build_folder_corpus

        corpus, tokenizer = self.output / "corpus", self.output / "tokenizer"
        if not corpus.is_dir():
            with publishing(corpus) as staging:
                build_folder_corpus(self.input, staging, max_bytes=self.max_bytes)
        if not tokenizer.is_dir():
            run(["tokenizer", "--input", str(corpus), "--vocab-size", str(self.vocab_size), "--output", str(tokenizer)])
        for domain in sorted(path.name for path in corpus.iterdir()):
            arguments = ["--input", str(corpus / domain), "--output-prefix", str(self.output / domain)]
            run(["preprocess", *arguments, "--tokenizer", str(tokenizer)])
        return 0


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Run the ladder: sizes x variants x horizons x seeds, the most informative first. The same command resumes."""

    overrides: Overrides = ()
    recipes: Path = Path("recipes/ladder")  # folder of the recipes
    root: Path = Path("runs/ladder")  # folder of the runs
    sizes: Names = ("0.02M", "0.05M")  # of 0.02M, 0.05M, 0.2M, 0.8M, 3.2M non-embedding parameters
    variants: Names = ("llama", "itt_x2", "itt_x4", "llama_wide")  # and loop_x2, loop_x4, itt_x4_SWITCH
    seeds: int = 3
    horizons: Numbers = (20, 80, 320)  # tokens per non-embedding parameter
    jobs: int | None = None  # runs at a time (default: 2; 8 with --gpu-minutes)
    minutes: float | None = None  # stop after so long; the runs save and can resume
    gpu_minutes: float | None = None  # the same on a GPU, which the runs share
    list: Flag = False  # print the commands of the queue and stop

    def execute(self) -> int:
        """Run the queue; exit code 1 if a run failed."""
        if self.minutes is not None and self.gpu_minutes is not None:
            raise ConfigError("--minutes and --gpu-minutes exclude each other; give one of them")
        jobs = self.jobs or (2 if self.gpu_minutes is None else _RUNS_OF_A_GPU)
        if min(self.seeds, jobs, *self.horizons) < 1:
            raise ConfigError("--seeds, --jobs and --horizons count from 1")
        configure_logging()
        from megatron_itt.study import LadderPlan, run_queue

        plan = LadderPlan(
            recipes=self.recipes,
            root=self.root,
            sizes=self.sizes,
            variants=self.variants,
            seeds=self.seeds,
            horizons=self.horizons,
            overrides=(*(["runtime.device=cuda"] if self.gpu_minutes is not None else []), *self.overrides),
        )
        if self.list:
            print("\n".join(" ".join(job.command) for job in plan.jobs()))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are asked to save
        minutes = self.minutes if self.gpu_minutes is None else self.gpu_minutes
        states = run_queue(plan.jobs(), num_parallel=jobs, minutes=minutes)
        print(", ".join(f"{count} {state}" for state, count in states.items()))
        return 1 if minutes is None and {"waiting", "interrupted"} & set(states) else 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit the law of loss to the finished runs of a ladder; write tables and a figure."""

    root: Path = Path("runs/ladder")  # folder of the runs
    thinking: Names = ("itt_x2", "itt_x4")  # thinking models that the law is fitted to, beside LLaMA
    output: Path | None = None  # results, without ending (default: ROOT/results)
    law: Path | None = None  # also write the fitted law here, such as recipes/ladder/law.json

    def execute(self) -> int:
        """Write OUTPUT.md, .json and .svg, print the tables; exit code 1 where the runs do not suffice for a fit."""
        configure_logging()
        from megatron_itt.analysis.figures import draw_measurement
        from megatron_itt.analysis.ladder import collect_ladder, fit_ladder, ladder_markdown, measure_ladder
        from megatron_itt.analysis.measurement import write_measurement

        points, fitted = collect_ladder(self.root), None
        try:
            fitted = fit_ladder(points, self.thinking)
        except DataError as error:
            get_logger().warning("no fit: %s", error)
        output, page = self.output or self.root / "results", ladder_markdown(points, fitted)
        measurement = measure_ladder(points, fitted)
        write_text(output.with_name(f"{output.name}.md"), page)
        write_measurement(measurement, output.with_name(f"{output.name}.json"), overwrite=True)
        draw_measurement(measurement, output.with_name(f"{output.name}.svg"), overwrite=True)
        if self.law is not None and fitted is not None:
            write_json(self.law, fitted.as_json())
        print(f"{page}\nwritten to {output}.md, {output}.json and {output}.svg")
        return 0 if fitted is not None else 1


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Print from how many tokens on a recipe's thinking pays against each baseline, and the verdict for its length."""

    recipe: Recipe
    overrides: Overrides = ()
    law: Path | None = None  # of itt study fit --law (default: the shipped law of its thinking.reuse)

    def execute(self) -> int:
        """Print the table of predictions. ConfigError for a recipe without thinking or without a law."""
        config = load_config(self.recipe, self.overrides)
        if config.thinking.kind == "none":
            raise ConfigError(f"{self.recipe} has thinking.kind none; give a recipe that thinks")
        path = self.law or shipped_law(config.thinking)
        if (fitted := read_law(path)) is None:
            raise ConfigError(f"there is no law at {path}; make one with itt study fit --law FILE")
        print(format_predictions(fitted, config))
        return 0


DEFAULT = "run"
COMMAND = {kind.__name__.lower(): kind for kind in (Run, Ladder, Fit, Predict, Text)}

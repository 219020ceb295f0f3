"""Run the study: every recipe of recipes/study with one or more seeds, resumable, then tables and verdicts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging, run_command

EPILOG = """examples:
  python tools/study.py                             # after make quickstart: 3 seeds of the main three, 1 of others
  python tools/study.py --variants llama,itt_x4 --seeds 5 --jobs 2
  python tools/study.py --results-only                    # tables of what has finished so far
  python tools/study.py --list
  python tools/study.py --seeds 3 --other-seeds 3 --processes 8 --root runs/study_162m \\
      model.hidden_size=1024 model.ffn_hidden_size=2560 model.num_layers=8 batch.global=64 schedule.steps=20000
"""


def main(argv: list[str] | None = None) -> int:
    """Run what is not done, then write OUTPUT.json and OUTPUT.md; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    parser.add_argument("--recipes", type=Path, default=Path("recipes/study"), metavar="DIR")
    parser.add_argument("--root", type=Path, default=Path("runs/study"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--variants", metavar="a,b,c", help="recipes to run (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of llama, loop_x4, itt_x4 (default: 3)")
    parser.add_argument("--other-seeds", type=int, default=1, metavar="N", help="of the other recipes (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of a run, as GPUs (default: 1)"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="results, without ending (default: ROOT/results)")
    parser.add_argument("--results-only", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the commands of the queue and stop")
    args = parser.parse_intermixed_args(argv)
    if min(args.seeds, args.other_seeds, args.jobs, args.processes) < 1:
        raise ConfigError("--seeds, --other-seeds, --jobs and --processes count from 1")
    configure_logging()
    from megatron_itt.analysis.study_results import collect_study, shown_states, study_markdown, write_study
    from megatron_itt.study import StudyPlan, run_queue

    plan = StudyPlan(
        recipes=args.recipes,
        root=args.root,
        variants=args.variants.split(",") if args.variants else (),
        main_seeds=args.seeds,
        other_seeds=args.other_seeds,
        processes=args.processes,
        overrides=args.overrides,
    )
    if args.list:
        print("\n".join(" ".join(job.command) for job in plan.jobs()))
        return 0
    states = {} if args.results_only else run_queue(plan.jobs(), num_parallel=args.jobs)
    study = collect_study(args.root)
    output = args.output or args.root / "results"
    write_study(study, output)
    print(study_markdown(study))
    print(f"{shown_states(states)}; " * bool(states) + f"written to {output}.json and {output}.md")
    return 1 if {"waiting", "interrupted"} & set(states) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Measure what a trained model or a run does, one figure of the paper per command; tools/plot.py draws the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_itt.errors import DataError
from megatron_itt.log import configure_logging, positive_int, run_command

if TYPE_CHECKING:
    from megatron_itt.analysis.measurement import Measurement
    from megatron_itt.evaluation.exported_model import Budget

EPILOG = """examples:
  python tools/analyse.py routing --model runs/quickstart/hf --text passage.txt --output analysis/routing.json --plot
  python tools/analyse.py weights --model runs/quickstart/hf --text heldout.jsonl.zst --output analysis/weights.json
  python tools/analyse.py steps --model runs/quickstart/hf --output analysis/steps.json
  python tools/analyse.py history --run runs/quickstart --output analysis/history.json
  python tools/analyse.py budgets --model runs/itt/hf --model runs/llama/hf --text heldout.jsonl.zst --output b.json
  python tools/analyse.py gradients --model gpt2_folder --questions aqua.jsonl --train 100 --output gradients.json
  python tools/analyse.py gradients --model runs/quickstart/hf --text heldout.jsonl.zst --output gradients.json
  python tools/analyse.py curves --run runs/llama --run runs/loop --run runs/itt --baseline runs/llama --output c.json
  python tools/analyse.py scaling --run runs/llama --run runs/itt_x2 --run runs/itt_x4 --output scaling.json
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, write the file, draw it with --plot, and print what a reader must know."""
    args = _parser().parse_args(argv)
    configure_logging()
    # After parsing: --help must not wait for torch.
    from megatron_itt.analysis.measurement import write_measurement

    if args.output.exists() and not args.overwrite:
        raise DataError(f"measurement {args.output} exists; choose another file or give --overwrite")
    measurement = args.measure(args)
    write_measurement(measurement, args.output, overwrite=args.overwrite)
    for note in measurement.notes:
        print(f"note: {note}")
    print(f"written to {args.output}")
    if args.plot is not None:
        from megatron_itt.analysis.figures.draw import draw_measurement

        figure = args.output.with_suffix(f".{args.plot}")
        draw_measurement(measurement, figure, overwrite=args.overwrite)
        print(f"written to {figure}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    routing = _command(commands, "routing", _routing, "who thinks in a passage, which token kinds more (Figure 7)")
    weights = _command(commands, "weights", _weights, "distribution of router weights (appendix A.4)")
    steps = _command(commands, "steps", _steps, "values of the step encodings (Figure 6, middle)")
    history = _command(commands, "history", _history, "thresholds and realised shares over training")
    budgets = _command(commands, "budgets", _budgets, "perplexity over thinking budgets (Table 2; Figure 6, left)")
    gradients = _command(commands, "gradients", _gradients, "gradient nuclear norms by layer (Figure 2)")
    curves = _command(commands, "curves", _curves, "training curves of runs side by side (Figure 4)")
    scaling = _command(commands, "scaling", _scaling, "perplexity by number of thinking steps (Figure 5)")
    for command in (routing, weights, steps, gradients):
        command.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    for command in (routing, weights, steps, budgets, gradients):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    for command in (routing, weights, budgets):
        command.add_argument("--text", type=Path, required=True, metavar="FILE", help="text (.txt, .jsonl, .zst, ...)")
        command.add_argument("--max-tokens", type=positive_int, metavar="N", help="read no more than N tokens")
    for command in (routing, weights):
        command.add_argument("--budget", metavar="0.5,0.5,0.5", help="share of tokens per routed step (as trained)")
    history.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder")
    for command in (curves, scaling):
        command.add_argument("--run", type=Path, required=True, action="append", metavar="DIR", help="repeat per run")
    curves.add_argument(
        "--baseline", type=Path, metavar="DIR", help="whose last loss others reach (default: first run)"
    )
    scaling.add_argument(
        "--evaluation", type=Path, action="append", default=[], metavar="FILE", help="results of tools/evaluate.py"
    )
    _add_gradient_arguments(gradients)
    _add_budget_arguments(budgets)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    measure: Callable[[argparse.Namespace], Measurement],
    text: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="the measurement, a JSON file")
    command.add_argument(
        "--plot", nargs="?", const="png", choices=["png", "svg"], help="draw it as well, beside the file (default: png)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace existing files")
    command.set_defaults(measure=measure)
    return command


def _add_gradient_arguments(gradients: argparse.ArgumentParser) -> None:
    source = gradients.add_mutually_exclusive_group(required=True)
    source.add_argument("--questions", type=Path, metavar="FILE", help="JSONL with question, options, correct (AQuA)")
    source.add_argument("--text", type=Path, metavar="FILE", help="any text; pieces of it are sorted by loss")
    gradients.add_argument("--samples", type=positive_int, default=100, metavar="N", help="to measure (default: 100)")
    gradients.add_argument("--train", type=int, default=0, metavar="N", help="questions to train on first (default: 0)")
    gradients.add_argument(
        "--tokens", type=positive_int, default=64, metavar="N", help="of a piece of text (default: 64)"
    )


def _add_budget_arguments(budgets: argparse.ArgumentParser) -> None:
    budgets.add_argument(
        "--model", type=Path, required=True, action="append", metavar="DIR", help="exports, LLaMA and Loop included"
    )
    budgets.add_argument("--budget", action="append", default=[], metavar="0.9,0.7,0.5", help="default: Table 2")
    budgets.add_argument("--grid", metavar="0.1,0.5,1.0", help="equal shares to sweep (default: 0 to 1)")
    budgets.add_argument("--tasks", metavar="paper|a,b,c", help="score lm-eval tasks at every budget as well")
    budgets.add_argument("--task-dir", type=Path, metavar="DIR", help="folder with further task files (YAML)")
    budgets.add_argument("--data-root", type=Path, metavar="DIR", help="offline copies of the data sets")
    budgets.add_argument("--limit", type=positive_int, metavar="N", help="records per task")


def _routing(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.routing import measure_routing
    from megatron_itt.evaluation.exported_model import load_export

    text = "\n\n".join(_texts(args.text))
    export = load_export(args.model, device=args.device)
    budget = _budget(args.budget)
    return measure_routing(export, text, budget=budget, max_tokens=args.max_tokens or 2048)


def _weights(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.router_weights import measure_router_weights
    from megatron_itt.evaluation.exported_model import load_export

    texts, export = _texts(args.text), load_export(args.model, device=args.device)
    return measure_router_weights(export, texts, budget=_budget(args.budget), max_tokens=args.max_tokens or 20_000)


def _steps(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.router_weights import measure_step_encoding
    from megatron_itt.evaluation.exported_model import load_export

    return measure_step_encoding(load_export(args.model, device=args.device))


def _history(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.collect import read_run
    from megatron_itt.analysis.router_history import measure_router_history

    return measure_router_history(read_run(args.run))


def _budgets(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.elastic import GRID, Tasks, measure_budgets
    from megatron_itt.evaluation.exported_model import parse_budget
    from megatron_itt.evaluation.harness import paper_task_names, task_names_in

    texts, tasks = _texts(args.text), None
    if args.tasks or args.task_dir:
        if args.tasks == "paper":
            names = paper_task_names()
        else:
            names = args.tasks.split(",") if args.tasks else task_names_in(args.task_dir)
        tasks = Tasks(
            names=names,
            folder=args.output.with_suffix(".tasks"),
            task_dirs=[args.task_dir] if args.task_dir else [],
            data_root=args.data_root,
            limit=args.limit,
            device=args.device,
            overwrite=args.overwrite,
        )
    return measure_budgets(
        args.model,
        texts,
        budgets=[parse_budget(text) for text in args.budget],
        grid=GRID if args.grid is None else parse_budget(args.grid),
        tasks=tasks,
        max_tokens=args.max_tokens,
        device=args.device,
    )


def _gradients(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.gradients import measure_question_gradients, measure_text_gradients
    from megatron_itt.analysis.samples import read_questions
    from megatron_itt.evaluation.exported_model import load_export

    if args.questions is None:
        texts = _texts(args.text)
        export = load_export(args.model, device=args.device)
        return measure_text_gradients(export, texts, num_samples=args.samples, num_tokens=args.tokens)
    questions = read_questions(args.questions)[: max(0, args.train) + args.samples]
    return measure_question_gradients(
        load_export(args.model, device=args.device), questions, num_train=max(0, args.train)
    )


def _curves(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.curves import measure_curves

    return measure_curves(args.run, baseline=args.baseline)


def _scaling(args: argparse.Namespace) -> Measurement:
    from megatron_itt.analysis.scaling import measure_scaling

    return measure_scaling(args.run, evaluations=args.evaluation)


def _texts(path: Path) -> list[str]:
    from megatron_itt.evaluation.heldout import read_texts

    texts = read_texts(path)
    if not texts:
        raise DataError(f"text {path} is empty; give a file with at least one word")
    return texts


def _budget(text: str | None) -> Budget | None:
    from megatron_itt.evaluation.exported_model import parse_budget

    return None if text is None else parse_budget(text)


if __name__ == "__main__":
    sys.exit(run_command(main))

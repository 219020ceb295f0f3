"""Evaluate an exported Hugging Face folder with lm-eval at one or more thinking budgets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.log import configure_logging, positive_int, run_command

EPILOG = """examples:
  python tools/evaluate.py --model runs/quickstart/hf --task-dir runs/quickstart/tasks \\
      --heldout code=data/code.jsonl.zst --heldout docs=data/docs.jsonl.zst \\
      --budget 0.25,0.25,0.25 --budget 0.5,0.5,0.5 --output runs/quickstart/evaluation
  python tools/evaluate.py --model runs/466m/hf --tasks paper --data-root ~/lm_eval_data --output runs/466m/evaluation
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, and print where the table is."""
    args = _parser().parse_args(argv)
    configure_logging()
    # After parsing: --help must not wait for torch and lm-eval.
    from megatron_itt.evaluation.exported_model import parse_budget
    from megatron_itt.evaluation.harness import EvaluationRequest, evaluate_export, paper_task_names, task_names_in
    from megatron_itt.evaluation.heldout import parse_domains, prepare_heldout

    texts = prepare_heldout(
        parse_domains(args.heldout), task_dir=args.task_dir, text_key=args.text_key, num_records=args.heldout_records
    )
    if args.tasks is None:
        tasks = task_names_in(args.task_dir) if args.task_dir is not None else []
    else:
        tasks = paper_task_names() if args.tasks == "paper" else [name for name in args.tasks.split(",") if name]
    evaluate_export(
        EvaluationRequest(
            model=args.model,
            output=args.output,
            tasks=tasks,
            task_dirs=[args.task_dir] if args.task_dir is not None else [],
            budgets=[parse_budget(text) for text in args.budget],
            data_root=args.data_root,
            limit=args.limit,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            overwrite=args.overwrite,
            perplexity_texts=texts,
            perplexity_max_tokens=args.perplexity_max_tokens,
        )
    )
    print((args.output / "results.md").read_text(encoding="utf-8"))
    print(f"written to {args.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results.json, results.md")
    parser.add_argument("--tasks", metavar="paper|a,b,c", help="lm-eval task names; default: all tasks of --task-dir")
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="folder with further task files (YAML)")
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="0.5,0.5,0.5",
        help="share of tokens at every routed thinking step; repeat for several budgets; default: as trained",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="offline copies of the data sets; no network")
    parser.add_argument(
        "--heldout",
        action="append",
        default=[],
        metavar="DOMAIN=FILE",
        help="held-out documents (jsonl, .zst, .gz): measures their perplexity and, with --task-dir, writes the two "
        "held-out tasks there; repeat for several domains",
    )
    parser.add_argument(
        "--heldout-records", type=positive_int, default=200, metavar="N", help="records per held-out task"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in the held-out documents")
    parser.add_argument(
        "--perplexity-max-tokens", type=positive_int, metavar="N", help="tokens per domain (default: all)"
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="first N records of each task only (a quick look)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

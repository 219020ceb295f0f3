"""Tell what the causal threshold rule costs against top-k, and show that it never looks ahead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.log import positive_int, run_command

EPILOG = """example:
  python tools/causality_report.py --model runs/quickstart/hf --heldout code=runs/quickstart/heldout/code.jsonl \\
      --output runs/quickstart/causality
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, write the report and print it."""
    args = _parser().parse_args(argv)
    from megatron_itt.evaluation.causality import CausalitySettings
    from megatron_itt.evaluation.causality_report import report_causality
    from megatron_itt.evaluation.exported_model import load_export, parse_budget
    from megatron_itt.evaluation.heldout import parse_domains, prepare_heldout

    texts = prepare_heldout(parse_domains(args.heldout), text_key=args.text_key)
    settings = CausalitySettings(
        lengths=args.length,
        budget=None if args.budget is None else parse_budget(args.budget),
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        num_cases=args.cases,
    )
    export = load_export(args.model, device=args.device, dtype=args.dtype)
    print(report_causality(export, texts, args.output, settings, overwrite=args.overwrite))
    print(f"written to {args.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for causality.json and .md")
    parser.add_argument(
        "--heldout",
        action="append",
        required=True,
        metavar="DOMAIN=FILE",
        help="held-out documents (jsonl, .zst, .gz, txt); repeat for several domains",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text in the documents")
    parser.add_argument(
        "--length",
        type=positive_int,
        action="append",
        default=[],
        metavar="N",
        help="tokens per piece; repeat for several",
    )
    parser.add_argument("--budget", metavar="0.5,0.5,0.5", help="share of tokens per routed step; default: as trained")
    parser.add_argument("--max-tokens", type=positive_int, default=20_000, metavar="N", help="per domain and length")
    parser.add_argument("--cases", type=positive_int, default=100, metavar="N", help="changed futures per rule")
    parser.add_argument("--batch-size", type=positive_int, default=8, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Write one self-contained HTML page about a training run, its export and its evaluation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.log import run_command

EPILOG = """example:
  python tools/report.py --run runs/quickstart --export runs/quickstart/hf \\
      --evaluation runs/quickstart/evaluation/results.json --text passage.txt --output runs/quickstart/report.html
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, write the page, and print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder (logging.run_dir)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="exported Hugging Face folder of the run")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="results.json of tools/evaluate.py, or its folder"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="passage to trace (.txt, or the first .jsonl document)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    args = parser.parse_args(argv)
    # After parsing: --help must not wait for torch.
    from megatron_itt.analysis.report import write_report
    from megatron_itt.evaluation.heldout import read_texts

    texts = read_texts(args.text) if args.text is not None else None
    write_report(
        args.run,
        output_html=args.output,
        export_dir=args.export,
        evaluation_json=args.evaluation,
        text=None if texts is None else (texts or [""])[0],
        overwrite=args.overwrite,
    )
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

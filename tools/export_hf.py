"""Export a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.config.optional_parts import hide_unusable_parts
from megatron_itt.log import run_command, silence_known_warnings


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(
        description="Export a checkpoint as a Hugging Face folder. Needs one process and no GPU.",
        epilog="example: python tools/export_hf.py --checkpoint runs/quickstart --output runs/quickstart/hf",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="type of the weights")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the training model")
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="tokenizer in place of the recipe's")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Export and print where the folder is."""
    arguments = parse_arguments(argv)
    silence_known_warnings()
    hide_unusable_parts()
    from megatron_itt.hf.export import ExportOptions, export_checkpoint

    options = ExportOptions(
        dtype=arguments.dtype,
        check=not arguments.no_check,
        tokenizer=arguments.tokenizer,
        with_tokenizer=not arguments.no_tokenizer,
    )
    report = export_checkpoint(arguments.checkpoint, arguments.output, options)
    if report.parity is not None:
        print(
            f"parity: logits within {report.parity.max_relative_difference:.1e} of the training model "
            f"({len(report.parity.cases)} comparisons)"
        )
    print(f"step {report.step}, {report.num_parameters:,} parameters, {options.dtype}: {report.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

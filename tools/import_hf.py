"""Make a checkpoint of a Hugging Face folder: an export back again, or a LLaMA as a warm start."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.config.optional_parts import hide_unusable_parts
from megatron_itt.log import run_command, silence_known_warnings


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(
        description="Make a checkpoint of a Hugging Face folder (safetensors). Needs one process and no GPU.",
        epilog="example: python tools/import_hf.py --model runs/quickstart/hf --recipe recipes/debug/itt_tiny.yaml "
        "--output runs/imported",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="exported folder, or any LLaMA-shaped one")
    parser.add_argument("--recipe", required=True, metavar="YAML", help="recipe of the model to make")
    parser.add_argument("--output", required=True, metavar="DIR", help="run folder to write checkpoints/ into")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Import and print where the checkpoint is."""
    arguments = parse_arguments(argv)
    from megatron_itt.config import load_config

    silence_known_warnings()
    hide_unusable_parts()
    from megatron_itt.hf.import_weights import import_folder

    config = load_config(arguments.recipe, arguments.overrides)
    report = import_folder(arguments.model, config, arguments.output)
    if report.fresh:
        print(f"{len(report.fresh)} tensors start as the recipe says: {', '.join(report.fresh)}")
    print(f"checkpoint: {report.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

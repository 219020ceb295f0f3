"""Write the held-out (validation) documents of a recipe as text, for evaluations of what it trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.log import run_command

EPILOG = "example: python tools/heldout_text.py recipes/debug/quickstart.yaml --output runs/quickstart/heldout"


def main(argv: list[str] | None = None) -> int:
    """Parse, write one .jsonl.zst per domain, print where."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("recipe", help="YAML recipe whose data section names the indexed datasets")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for DOMAIN.jsonl.zst")
    arguments = parser.parse_intermixed_args(argv)
    from megatron_itt.config import load_config
    from megatron_itt.data.heldout_text import write_heldout_text

    for domain, path in write_heldout_text(
        load_config(arguments.recipe, arguments.overrides), arguments.output
    ).items():
        print(f"{domain}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Build the sample indices of a recipe before its run: which documents make which sample, in which order.

Training builds them itself where they are missing, while all its processes wait; for large data build them first, on
one machine. Safe to start from many processes and nodes at once: one builds, the others wait for it. An index that is
there and undamaged is left alone.
"""

from __future__ import annotations

import argparse
import sys

from megatron_itt.config import load_config
from megatron_itt.config.optional_parts import hide_unusable_parts
from megatron_itt.data.tokenizer import recipe_tokenizer
from megatron_itt.log import configure_logging, run_command, silence_known_warnings

EXAMPLE = "example: python tools/build_index.py recipes/466m/itt_x4.yaml data.tokenizer=/data/tokenizer"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build or check the index, print the blend and where the index lies."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the recipe that will be trained")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the same as for training")
    arguments = parser.parse_intermixed_args(argv)
    silence_known_warnings()
    hide_unusable_parts()
    configure_logging()
    config = load_config(arguments.recipe, arguments.overrides)
    tokenizer = recipe_tokenizer(config)
    from megatron_itt.data.blend import resolve_blend
    from megatron_itt.data.datasets import prebuild_index

    print(resolve_blend(config).table())
    report = prebuild_index(config, tokenizer=tokenizer)
    done = "built" if report.was_built else "there already, undamaged"
    print(f"{report.folder}: {done}; {report.size_bytes / 1e6:,.1f} MB, {report.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

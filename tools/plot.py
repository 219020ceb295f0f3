"""Draw measurements of tools/analyse.py as PNG or SVG figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.errors import DataError
from megatron_itt.log import run_command

EPILOG = """examples:
  python tools/plot.py runs/quickstart/analysis/routing.json --output routing.svg
  python tools/plot.py runs/quickstart/analysis/*.json --format png     # each beside its measurement
"""


def main(argv: list[str] | None = None) -> int:
    """Draw every file and print where the figures are."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurements", nargs="+", type=Path, metavar="FILE", help="files of tools/analyse.py")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the figure, .png or .svg (for a single file)")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="without --output (default: png)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing figures")
    args = parser.parse_args(argv)
    if args.output is not None and len(args.measurements) > 1:
        raise DataError(f"--output names one figure but there are {len(args.measurements)} measurements; use --format")
    # After parsing: --help must not wait for matplotlib.
    from megatron_itt.analysis.figures.draw import draw_measurement
    from megatron_itt.analysis.measurement import read_measurement

    for path in args.measurements:
        figure = args.output or path.with_suffix(f".{args.format}")
        draw_measurement(read_measurement(path), figure, overwrite=args.overwrite)
        print(f"written to {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

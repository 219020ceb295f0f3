"""Run the whole line on this machine and leave a page that shows what happened; see `make quickstart`."""

from __future__ import annotations

import argparse
import sys
import time

from megatron_itt.log import run_command
from megatron_itt.quickstart import ROOT, run_stages, stages

EPILOG = "example: python tools/quickstart.py   (or make quickstart, which sets up .venv first)"


def main(argv: list[str] | None = None) -> int:
    """Run every stage that is not done, then say where the page is."""
    argparse.ArgumentParser(description=__doc__, epilog=EPILOG).parse_args(argv)
    started = time.monotonic()
    code = run_stages(stages())
    if code == 0:
        print(f"quickstart: {time.monotonic() - started:.0f} s; open {ROOT / 'report.html'}")
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))

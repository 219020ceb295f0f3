"""Run data preparation, training, export, evaluation and report on this machine; see `make quickstart`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_itt.quickstart import ROOT, run_stages, stages

EXAMPLES = "  itt quickstart          # or make quickstart, which sets up .venv first"


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    def execute(self) -> int:
        started = time.monotonic()
        code = run_stages(stages())
        if code == 0:
            print(f"quickstart: {time.monotonic() - started:.0f} s; open {ROOT / 'report.html'}")
        return code


COMMAND = Quickstart

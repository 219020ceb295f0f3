"""Show the status of runs: state, loss, speed, time left, last checkpoint. Reads files only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from megatron_itt.analysis.status import find_runs, format_starts, format_status, read_status, runs_of
from megatron_itt.commands.arguments import Flag

EXAMPLES = """
  itt status
  itt status runs/sweep_itt_tiny
  itt status runs/466m_itt_x4 --starts
  itt status runs/466m_itt_x4 runs/466m_llama --json
"""


@dataclass(frozen=True, kw_only=True)
class Status:
    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN")
    ] = ()  # run folders, or those of sweeps (default: those under --root)
    root: Path = Path("runs")  # where to look for run folders
    starts: Flag = False  # print the history of starts of each run
    json: Flag = False  # print JSON

    def execute(self) -> int:
        """Print one column per run; up to three side by side, more below each other."""
        found = [read_status(run) for folder in self.runs or find_runs(self.root) for run in runs_of(folder)]
        if self.json:
            print(json.dumps([asdict(status) for status in found], indent=2))
        elif self.starts:
            print("\n\n".join(f"{status.run}\n\n{format_starts(status)}" for status in found))
        else:
            print(format_status(found))
        return 0


COMMAND = Status

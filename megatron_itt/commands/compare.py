"""Compare two runs: differences of recipe and versions, losses, and the first step that differs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from megatron_itt.analysis.compare import compare_runs, format_comparison
from megatron_itt.commands.arguments import Flag

EXAMPLES = """
  itt compare runs/466m_itt_x4 runs/466m_llama
  itt compare runs/before runs/after --json
"""


@dataclass(frozen=True, kw_only=True)
class Compare:
    first: Annotated[Positional[Path], arg(metavar="RUN")]  # run folder
    second: Annotated[Positional[Path], arg(metavar="RUN")]  # run folder
    json: Flag = False  # print JSON

    def execute(self) -> int:
        found = compare_runs(self.first, self.second)
        print(json.dumps(found, indent=2) if self.json else format_comparison(found))
        return 0


COMMAND = Compare

"""Average the weights of a run's last checkpoints into a checkpoint, to export and evaluate like any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt import api
from megatron_itt.commands.arguments import Numbers, OptionalCount

EXAMPLES = """
  itt average --run runs/466m_itt_x4 --last 3 --output runs/466m_itt_x4_mean
  itt average --run runs/466m_itt_x4 --steps 48000,49000,50000 --output runs/466m_itt_x4_mean
"""


@dataclass(frozen=True, kw_only=True)
class Average:
    run: Path  # run folder
    output: Path  # run folder to write checkpoints/ into
    last: OptionalCount = None  # how many of the newest checkpoints
    steps: Numbers = ()  # or which ones

    def execute(self) -> int:
        print(f"checkpoint: {api.average_checkpoints(self.run, self.output, last=self.last, steps=self.steps)}")
        return 0


COMMAND = Average

"""Which checkpoints of a run stay. No torch.

Only steps with finite weights are saved (`training/loop.py`), so every intact checkpoint is one to return to. A damaged
one counts for nothing here and is never removed: resuming deals with it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_itt.checkpoint.hashes import find_misfits
from megatron_itt.checkpoint.layout import STATE_FILE, list_checkpoints, step_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The newest `keep_last`, every one whose step is a multiple of `keep_every_steps`, the best by validation loss."""

    keep_last: int
    keep_every_steps: int | None = None
    keep_best: bool = False

    def choose(self, validation_losses: Mapping[int, float | None]) -> set[int]:
        """The steps to keep, of checkpoints given as step -> validation loss (None: not measured at that step)."""
        steps = sorted(validation_losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every_steps is not None:
            kept |= {step for step in steps if step % self.keep_every_steps == 0}
        measured = [(loss, -step) for step, loss in validation_losses.items() if loss is not None]
        if self.keep_best and measured:
            kept.add(-min(measured)[1])
        return kept


def prune(root: Path, retention: Retention) -> list[Path]:
    """Remove the intact checkpoints that need not stay; returns what went."""
    intact = {step_of(path): path for path in list_checkpoints(root) if not find_misfits(path)[0]}
    kept = retention.choose({step: _validation_loss(path) for step, path in intact.items()})
    removed = [path for step, path in intact.items() if step not in kept]
    for path in removed:
        shutil.rmtree(path)
    return removed


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        loss = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None

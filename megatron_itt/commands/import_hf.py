"""Import a Hugging Face folder (safetensors) as a checkpoint: an export, or a LLaMA as a warm start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt import api
from megatron_itt.commands.arguments import Overrides

EXAMPLES = "  itt import --model runs/quickstart/hf --recipe recipes/debug/itt_tiny.yaml --output runs/imported"


@dataclass(frozen=True, kw_only=True)
class Import:
    model: Path  # exported folder, or any LLaMA-shaped one
    recipe: str  # recipe of the model to write
    output: Path  # run folder to write checkpoints/ into
    overrides: Overrides = ()

    def execute(self) -> int:
        """Import and print where the checkpoint is."""
        report = api.import_hf(self.model, self.recipe, self.output, self.overrides)
        if report.fresh:
            print(f"{len(report.fresh)} tensors are initialised as the recipe says: {', '.join(report.fresh)}")
        if report.changed:
            print(f"not as the folder was trained: {'; '.join(report.changed)}")
        print(f"checkpoint: {report.checkpoint}")
        return 0


COMMAND = Import

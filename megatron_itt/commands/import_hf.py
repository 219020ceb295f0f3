"""Make a checkpoint of a Hugging Face folder (safetensors): an export back again, or a LLaMA as a warm start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.commands.arguments import Overrides
from megatron_itt.config import load_config
from megatron_itt.config.optional_packages import hide_unusable_packages
from megatron_itt.log import silence_known_warnings

EXAMPLES = "  itt import --model runs/quickstart/hf --recipe recipes/debug/itt_tiny.yaml --output runs/imported"


@dataclass(frozen=True, kw_only=True)
class Import:
    model: Path  # exported folder, or any LLaMA-shaped one
    recipe: str  # recipe of the model to make
    output: Path  # run folder to write checkpoints/ into
    overrides: Overrides = ()

    def execute(self) -> int:
        """Import and print where the checkpoint is."""
        config = load_config(self.recipe, self.overrides)
        silence_known_warnings()
        hide_unusable_packages()
        from megatron_itt.hf.import_weights import import_folder

        report = import_folder(self.model, config, self.output)
        if report.fresh:
            print(f"{len(report.fresh)} tensors are initialised as the recipe says: {', '.join(report.fresh)}")
        if report.changed:
            print(f"not as the folder was trained: {'; '.join(report.changed)}")
        print(f"checkpoint: {report.checkpoint}")
        return 0


COMMAND = Import

"""Import a Hugging Face folder (safetensors) as a checkpoint: an export, or a pretrained model that learns to think."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from megatron_itt import api
from megatron_itt.commands.arguments import Overrides, separated
from megatron_itt.hf.options import ImportOptions

EXAMPLES = """\
  itt import --model SmolLM2-135M --think every_other --steps 4 --capacity 0.5 --output runs/smol
  itt import --model runs/quickstart/hf --recipe recipes/debug/itt_tiny.yaml --output runs/imported"""

NAMES = 6  # of tensors, in the output


@dataclass(frozen=True, kw_only=True)
class Import(ImportOptions):
    model: Path  # a LLaMA, Mistral, Qwen2, Qwen3 or exported folder
    output: Path  # run folder to write checkpoints/ into
    recipe: str | None = None  # recipe of the model to write; its keys replace the folder's shape and the options
    capacity: Annotated[tuple[float, ...], separated(",", float, like="0.5")] = ImportOptions.capacity
    overrides: Overrides = ()

    def execute(self) -> int:
        report = api.import_hf(**asdict(self))
        if report.fresh:
            shown = ", ".join(report.fresh[:NAMES]) + (", ..." if len(report.fresh) > NAMES else "")
            print(f"{len(report.fresh)} tensors are initialised as the recipe says: {shown}")
        if report.changed:
            print(f"not as the folder was trained: {'; '.join(report.changed)}")
        if report.calibrated:
            print(f"quantiles of router logits: from {report.calibrated}")
        if report.recipe:
            print(f"recipe: {report.recipe}")
        print(f"checkpoint: {report.checkpoint}")
        return 0


COMMAND = Import

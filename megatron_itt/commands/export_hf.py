"""Export a checkpoint as a Hugging Face folder. Needs one process and no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Suppress

from megatron_itt import api
from megatron_itt.commands.arguments import Flag
from megatron_itt.hf.options import ExportOptions

EXAMPLES = "  itt export --checkpoint runs/quickstart --output runs/quickstart/hf"


@dataclass(frozen=True, kw_only=True)
class Export(ExportOptions):
    checkpoint: Path  # a checkpoint, or a run folder (its newest)
    output: Path  # folder to write; must not exist
    no_tokenizer: Flag = False  # write no tokenizer
    with_tokenizer: Suppress[bool] = True
    max_shard_bytes: Suppress[int] = ExportOptions.max_shard_bytes

    def execute(self) -> int:
        """Export and print where the folder is."""
        options = asdict(self) | {"with_tokenizer": not self.no_tokenizer}
        del options["no_tokenizer"]
        report = api.export_hf(**options)
        if report.parity is not None:
            print(
                f"parity: logits within {report.parity.max_relative_difference:.1e} of the training model "
                f"({len(report.parity.cases)} comparisons)"
            )
        print(f"step {report.step}, {report.num_parameters:,} parameters, {report.dtype}: {report.folder}")
        return 0


COMMAND = Export

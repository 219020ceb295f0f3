"""Export a checkpoint as a Hugging Face folder, and upload it if asked to. Needs one process and no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Suppress

from megatron_itt import api
from megatron_itt.commands.arguments import Flag
from megatron_itt.errors import ConfigError
from megatron_itt.hf.options import ExportOptions

EXAMPLES = """
  itt export --checkpoint runs/quickstart --output runs/quickstart/hf
  itt export --checkpoint runs/466m_itt_x4 --output exports/466m --dtype bfloat16 --push-to-hub me/itt-466m
"""


@dataclass(frozen=True, kw_only=True)
class Export(ExportOptions):
    checkpoint: Path | None = None  # a checkpoint, or a run folder (its newest); left out: upload an earlier export
    output: Path  # folder to write, which must not exist; without --checkpoint, the one to upload
    push_to_hub: str | None = None  # repository to upload to, USER/NAME: in one commit; a new one is private
    public: Flag = False  # make the repository public after the upload
    no_tokenizer: Flag = False  # write no tokenizer
    with_tokenizer: Suppress[bool] = True
    max_shard_bytes: Suppress[int] = ExportOptions.max_shard_bytes

    def execute(self) -> int:
        options = asdict(self) | {"with_tokenizer": not self.no_tokenizer}
        name, public = options.pop("push_to_hub"), options.pop("public")
        del options["no_tokenizer"]
        if self.checkpoint is None and name is None:
            raise ConfigError("--checkpoint is missing; give a checkpoint or a run folder")
        if public and name is None:
            raise ConfigError("--public belongs to --push-to-hub NAME; give both, or leave it out")
        if name is not None:
            from megatron_itt.hf.hub import check_hub, push_folder

            check_hub(name)
        if self.checkpoint is not None:
            report = api.export_hf(**options)
            if report.parity is not None:
                print(
                    f"parity: logits within {report.parity.max_relative_difference:.1e} of the training model "
                    f"({len(report.parity.cases)} comparisons)"
                )
            print(f"step {report.step}, {report.num_parameters:,} parameters, {report.dtype}: {report.folder}")
        if name is not None:
            print(f"uploaded: {push_folder(self.output, name, public=public)}")
        return 0


COMMAND = Export

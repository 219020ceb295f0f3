"""Tokenize raw text into Megatron's indexed format: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

The same command resumes an interrupted run. Lines without a document are listed in PREFIX.rejected.jsonl. Folders are
read recursively, through links. Hidden entries, markers of other programs such as _SUCCESS, and files that are not data
by content or by name are left out and named in the log and in PREFIX.json; a file that is named like data and holds
none is an error.

Several machines that share the folders can divide the work: each runs the same command with its own --part I/N, in any
order or at the same time, and the one that finishes last merges. slurm/preprocess.sbatch does this as an array job.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import Suppress, arg

from megatron_itt.commands.arguments import Flag
from megatron_itt.data.text.parts import parse_part
from megatron_itt.data.text.preprocess import Outcome, PreprocessOptions, preprocess, preprocess_part
from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging

EXAMPLES = "  itt preprocess --input corpus/code --tokenizer runs/tokenizer --output-prefix data/code --workers 8"


@dataclass(frozen=True, kw_only=True)
class Preprocess(PreprocessOptions):
    inputs: Annotated[tuple[str, ...], arg(name="input", metavar="PATH")]
    """files, folders, globs or hf://NAME[:CONFIG]; .jsonl, .zst, .gz and .parquet are recognised by content"""
    num_workers: Annotated[int, arg(name="workers")] = field(default_factory=lambda: os.cpu_count() or 1)  # processes
    engine: Annotated[str, arg(name="tokenizer-engine", metavar="auto|hf|gigatoken")] = "auto"  # library that encodes
    part: Annotated[str | None, arg(metavar="I/N")] = None
    """make only this part of the shards; the last part to finish merges"""
    merge: Flag = False  # only merge the parts, which must all be finished
    quiet: Flag = False  # no progress bar
    shard_bytes: Suppress[int | None] = None
    show_progress: Suppress[bool] = True

    def execute(self) -> int:
        configure_logging()
        if self.merge and self.part is not None:
            raise ConfigError("--part and --merge exclude each other; give one of them")
        options = replace(self, show_progress=not self.quiet)
        if self.part is None:
            print(describe(self.output_prefix, preprocess(options, merge_only=self.merge)))
            return 0
        part = preprocess_part(options, parse_part(self.part))
        print(f"{self.output_prefix}: part {self.part} is made, {part.num_shards} shards")
        if part.merged is not None:
            print(describe(self.output_prefix, part.merged))
        else:
            shown = ", ".join(map(str, part.waiting_for[:8])) + (", ..." if len(part.waiting_for) > 8 else "")
            print(f"{self.output_prefix}: not made yet, in all {len(part.waiting_for)}: {shown}; the last one merges")
        return 0


def describe(prefix: str, outcome: Outcome) -> str:
    """Return one line about a finished dataset."""
    manifest = outcome.manifest
    state = "already done" if outcome.reused else f"written in {manifest.wall_seconds:.1f} s"
    return (
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.rejected:,} rejected, "
        f"{manifest.duplicates:,} duplicates, {manifest.text_bytes / 1e6:.1f} MB of text ({state})"
        + (f", {manifest.num_left_out:,} files or folders of the input left out" if manifest.num_left_out else "")
    )


COMMAND = Preprocess

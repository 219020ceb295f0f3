"""Check that indexed data or the files of a checkpoint are as they were written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from megatron_itt.errors import CheckpointError

EXAMPLES = """
  itt verify data --prefix data/code --tokenizer runs/tokenizer --show 2
  itt verify checkpoint runs/466m_itt_x4 runs/466m_itt_x4/checkpoints/step_0001000
"""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Indexed data: structure, sizes, token range, document ends, agreement with the manifest."""

    prefix: tuple[str, ...]  # paths without .bin or .idx
    tokenizer: str  # the tokenizer the data was written with
    level: Literal["cheap", "full"] = "full"  # how much is read
    show: int = 0  # print the beginning of so many documents

    def execute(self) -> int:
        from megatron_itt.data.text.tokenizer import load_tokenizer
        from megatron_itt.data.text.verify import decode_samples, verify_indexed_dataset

        tokenizer = load_tokenizer(self.tokenizer)
        for prefix in self.prefix:
            index, manifest = verify_indexed_dataset(prefix, tokenizer.vocab_size, self.level)
            contents = f"{index.num_documents:,} documents, {index.num_tokens:,} {index.dtype.name} tokens"
            print(f"{prefix}: {contents}, {'manifest agrees' if manifest else 'no manifest'}: fine")
            for document_idx, text in decode_samples(prefix, tokenizer, self.show):
                print(f"  document {document_idx}: {text[:200]!r}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files of checkpoints against the hashes that were saved with them."""

    checkpoint: Annotated[Positional[tuple[str, ...]], arg(metavar="DIR")]
    """checkpoints, or run folders for their newest ones"""

    def execute(self) -> int:
        from megatron_itt.checkpoint.integrity import find_damage, read_hashes
        from megatron_itt.checkpoint.store import resolve_checkpoint

        for given in self.checkpoint:
            checkpoint = resolve_checkpoint(given)
            problems = find_damage(checkpoint)
            if problems:
                raise CheckpointError(f"{checkpoint} is damaged: {', '.join(problems)}; use an earlier checkpoint")
            records = read_hashes(checkpoint)
            size = sum(record.size for record in records.values())
            print(f"{checkpoint}: {len(records)} files, {size:,} bytes: intact")
        return 0


COMMAND = {"data": Data, "checkpoint": Checkpoint}

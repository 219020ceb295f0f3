"""Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.commands.arguments import Flag
from megatron_itt.data.text.documents import sample_texts
from megatron_itt.data.text.tokenizer import train_tokenizer
from megatron_itt.log import configure_logging

EXAMPLES = "  itt tokenizer --input corpus/code corpus/docs --vocab-size 4096 --output tokenizer"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    input: tuple[str, ...]  # files, folders or globs
    vocab_size: int  # ids, special tokens included
    output: Path  # folder to write
    text_key: str = "text"  # key or column of the text; a.b: inside an object
    max_bytes: int = 200_000_000  # text to read, spread over the files
    quiet: Flag = False  # no progress bar

    def execute(self) -> int:
        configure_logging()
        texts = sample_texts(self.input, text_key=self.text_key, max_bytes=self.max_bytes)
        tokenizer = train_tokenizer(texts, self.output, vocab_size=self.vocab_size, show_progress=not self.quiet)
        print(f"{self.output}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")
        return 0


COMMAND = TrainTokenizer

"""Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer folder."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.data.corpus_sample import sample_texts
from megatron_itt.data.tokenizer import train_tokenizer
from megatron_itt.log import configure_logging, run_command

EXAMPLE = (
    "example: python tools/train_tokenizer.py --input corpus/code corpus/docs --vocab-size 4096 --output tokenizer"
)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text; a.b: inside an object (default %(default)s)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=200_000_000, help="text to read, spread over the files (default %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    configure_logging()
    texts = sample_texts(arguments.input, text_key=arguments.text_key, max_bytes=arguments.max_bytes)
    tokenizer = train_tokenizer(
        texts, arguments.output, vocab_size=arguments.vocab_size, show_progress=not arguments.quiet
    )
    print(f"{arguments.output}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

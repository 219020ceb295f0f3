"""Check an indexed dataset: structure, sizes, token range, document ends, agreement with its manifest."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.data.tokenizer import load_tokenizer
from megatron_itt.data.verify import decode_samples, verify_indexed_dataset
from megatron_itt.log import run_command

EXAMPLE = "example: python tools/verify_data.py --prefix data/code --tokenizer runs/tokenizer --show 2"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, verify, print what the dataset holds."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--prefix", nargs="+", required=True, metavar="PREFIX", help="path without .bin or .idx")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer the data was written with")
    parser.add_argument("--level", choices=("cheap", "full"), default="full", help="default %(default)s")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the beginning of N documents")
    arguments = parser.parse_args(argv)
    tokenizer = load_tokenizer(arguments.tokenizer)
    for prefix in arguments.prefix:
        verified = verify_indexed_dataset(prefix, tokenizer.vocab_size, arguments.level)
        manifest = "manifest agrees" if verified.has_manifest else "no manifest"
        print(
            f"{prefix}: {verified.documents:,} documents, {verified.tokens:,} {verified.dtype} tokens, {manifest}: fine"
        )
        for document_idx, text in decode_samples(prefix, tokenizer, arguments.show):
            print(f"  document {document_idx}: {text[:200]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

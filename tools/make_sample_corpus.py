"""Write a small corpus of real text (Python's library and documentation) that needs no download."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.data.sample_corpus import build_sample_corpus
from megatron_itt.log import run_command

EXAMPLE = "example: python tools/make_sample_corpus.py --output runs/quickstart/corpus"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build the corpus, print its size."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--output", required=True, help="folder to create; an existing corpus is reused")
    parser.add_argument("--min-bytes", type=int, default=8_000_000, help="least size of the text (default %(default)s)")
    arguments = parser.parse_args(argv)
    summary = build_sample_corpus(arguments.output, min_bytes=arguments.min_bytes)
    for name, counts in summary.items():
        print(f"{name}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['shards']} shards")
    print(f"corpus: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Tokenize raw text into Megatron's indexed format: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_itt.data.engine import ENGINES
from megatron_itt.data.preprocess import Outcome, PreprocessOptions, preprocess, preprocess_part
from megatron_itt.data.shares import parse_share
from megatron_itt.log import configure_logging, run_command

EXAMPLE = """example:
  python tools/preprocess.py --input corpus/code --tokenizer runs/tokenizer --output-prefix data/code --workers 8

An interrupted run continues when the same command is given again. Lines that give no document are listed in
PREFIX.rejected.jsonl. Folders are read through links. Left out, and named in the log and in PREFIX.json, are hidden
entries, markers of other programs such as _SUCCESS, and files that are not data by content or by name; a file that is
named like data and holds none stops the run. An <end of document> token is appended to every document unless
--no-append-eod is given.

Several machines that see the same folders share the work: each runs the same command with its own --part I/N, in any
order or at the same time, and the one that finishes last merges. slurm/preprocess.sbatch does this as an array job."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, globs or hf://NAME[:CONFIG]; .jsonl, .zst, .gz and .parquet are recognised by content",
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder, tokenizer.json, or name on the hub")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text; a.b: inside an object (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes; Megatron-LM's own tool: no)",
    )
    parser.add_argument("--append-bos", action="store_true", help="begin every document with the tokenizer's bos token")
    parser.add_argument("--min-length", type=int, default=1, metavar="N", help="drop documents of fewer characters")
    parser.add_argument("--deduplicate", action="store_true", help="keep only the first of exactly equal documents")
    parser.add_argument("--max-bad-fraction", type=float, default=0.001, help="refuse above (default %(default)s)")
    parser.add_argument("--tokenizer-engine", choices=ENGINES, default="auto", help="default %(default)s")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue from finished shards in PREFIX.partial/ (default: yes)",
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--part", metavar="I/N", help="make only this part of the shards; the last part to finish merges")
    who.add_argument("--merge", action="store_true", help="make nothing, merge the parts, which must all be made")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, write the dataset or a part of it, print what was written."""
    arguments = build_parser().parse_args(argv)
    configure_logging()
    options = PreprocessOptions(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        text_key=arguments.text_key,
        append_eod=arguments.append_eod,
        append_bos=arguments.append_bos,
        min_length=arguments.min_length,
        deduplicate=arguments.deduplicate,
        num_workers=arguments.workers,
        max_bad_fraction=arguments.max_bad_fraction,
        engine=arguments.tokenizer_engine,
        resume=arguments.resume,
        show_progress=not arguments.quiet,
    )
    if arguments.part is None:
        print(describe(arguments.output_prefix, preprocess(options, merge_only=arguments.merge)))
        return 0
    part = preprocess_part(options, parse_share(arguments.part))
    print(f"{arguments.output_prefix}: part {arguments.part} is made, {part.num_shards} shards")
    if part.merged is not None:
        print(describe(arguments.output_prefix, part.merged))
    else:
        shown = ", ".join(map(str, part.waiting_for[:8])) + (", ..." if len(part.waiting_for) > 8 else "")
        print(f"{arguments.output_prefix}: not made yet, in all {len(part.waiting_for)}: {shown}; the last one merges")
    return 0


def describe(prefix: str, outcome: Outcome) -> str:
    """One line about a finished dataset."""
    manifest = outcome.manifest
    state = "already done" if outcome.reused else f"written in {manifest.wall_seconds:.1f} s"
    return (
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.rejected:,} rejected, "
        f"{manifest.duplicates:,} duplicates, {manifest.text_bytes / 1e6:.1f} MB of text ({state})"
        + (f", {manifest.num_left_out:,} files or folders of the input left out" if manifest.num_left_out else "")
    )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Measure preprocessing on this machine: the encoding engine alone on text in memory, then the whole command."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_itt.data.engine import ENGINES
from megatron_itt.data.manifest import read_manifest
from megatron_itt.data.speed import measure_command, measure_engine, num_cores
from megatron_itt.log import run_command

EXAMPLE = """example: python tools/data_speed.py --input corpus/*.jsonl.zst --tokenizer runs/tokenizer --workers 2

Give at least 200 MB of text: below that, starting the processes is most of the time."""


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="as for tools/preprocess.py")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: %(default)s)")
    parser.add_argument("--tokenizer-engine", choices=ENGINES, default="auto", help="default %(default)s")
    parser.add_argument("--engine-mb", type=int, default=200, metavar="MB", help="text for the engine (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write and delete (default: a new folder)")
    arguments = parser.parse_args(argv)
    alone = measure_engine(
        arguments.input,
        arguments.tokenizer,
        arguments.tokenizer_engine,
        num_workers=arguments.workers,
        max_text_bytes=arguments.engine_mb * 10**6,
    )
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        prefix = f"{folder}/measured"
        command = [sys.executable, str(Path(__file__).with_name("preprocess.py")), "--input", *arguments.input]
        command += ["--tokenizer", arguments.tokenizer, "--tokenizer-engine", arguments.tokenizer_engine]
        command += ["--workers", str(arguments.workers), "--output-prefix", prefix, "--quiet"]
        cost = measure_command(command)
        manifest = read_manifest(prefix)
    assert manifest is not None, "the command has written its manifest"
    print(f"engine {alone.engine}, {arguments.workers} workers, {manifest.tokens:,} tokens")
    for name, texts, tokens in (
        ("engine alone", alone.text_bytes_per_second, alone.tokens_per_second),
        ("whole command", manifest.text_bytes / cost.seconds, manifest.tokens / cost.seconds),
    ):
        print(f"{name:<14} {texts / 1e6:8.1f} MB/s of text {tokens:14,.0f} tokens/s")
    print(f"{cost.seconds:.1f} s, peak of all processes {cost.peak_bytes / 1e6:,.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

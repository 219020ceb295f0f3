"""Check that every file of a checkpoint is as it was saved."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.checkpoint.hashes import find_damage, read_hashes
from megatron_itt.checkpoint.layout import resolve_checkpoint
from megatron_itt.errors import CheckpointError
from megatron_itt.log import run_command

EXAMPLE = "example: python tools/verify_checkpoint.py runs/466m_itt_x4 runs/466m_itt_x4/checkpoints/step_0001000"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, read the files, print which checkpoints are intact."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("checkpoint", nargs="+", help="a checkpoint, or a run folder for its newest one")
    arguments = parser.parse_args(argv)
    for given in arguments.checkpoint:
        checkpoint = resolve_checkpoint(given)
        problems = find_damage(checkpoint)
        if problems:
            raise CheckpointError(f"{checkpoint} is damaged: {', '.join(problems)}; use an earlier checkpoint")
        records = read_hashes(checkpoint)
        print(f"{checkpoint}: {len(records)} files, {sum(record.size for record in records.values()):,} bytes: intact")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

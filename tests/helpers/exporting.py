"""Stand-ins for an export that run in a process of their own. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_itt.errors import ExportError
from megatron_itt.files import publishing


def export_quickly(checkpoint: Path, output: Path) -> None:
    with publishing(output) as staging:
        (staging / "weights").write_text((checkpoint / "weights").read_text())


def export_at_length(checkpoint: Path, output: Path) -> None:
    with publishing(output) as staging:
        (staging / "weights").write_text("half")
        time.sleep(600.0)


def fail_to_export(checkpoint: Path, output: Path) -> None:
    raise ExportError(f"{checkpoint.name} cannot be exported")

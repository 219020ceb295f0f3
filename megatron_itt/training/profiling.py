"""A window of steps under torch.profiler, and on GPUs a memory snapshot, asked for by the recipe or by touching a file.

Writes RUN/profile/step_N_rank_R.json (open it at ui.perfetto.dev or chrome://tracing) and, on GPUs,
step_N_rank_R_memory.pickle (open it at pytorch.org/memory_viz).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_itt.config.run import ProfileConfig
from megatron_itt.log import get_logger

REQUEST_FILE = "profile_now"
FOLDER = "profile"
_REQUESTED_STEPS = 2


class Profiler:
    """Starts and ends windows between steps. On ranks that nobody asked for it does nothing."""

    def __init__(self, settings: ProfileConfig | None, run_dir: Path, *, rank: int, device: torch.device) -> None:
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._run_dir, self._rank, self._device = run_dir, rank, device
        self._profile: Any = None
        self._first = self._end = 0

    def before_step(self, step: int) -> None:
        """Start a window if one begins with this step. A file is looked for by rank 0 alone."""
        if self._profile is not None:
            return
        settings = self._settings
        if settings is not None and step == settings.start:
            self._start(step, settings.steps)
        elif self._rank == 0 and self._is_requested():
            self._start(step, _REQUESTED_STEPS)

    def after_step(self, step: int) -> None:
        """Write the window out if it ends with this step."""
        if self._profile is not None and step + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """End a window that is open."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        folder = self._run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{self._first}_rank_{self._rank}.json"
        profile.export_chrome_trace(str(path))
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(path.with_name(f"{path.stem}_memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        get_logger().info("wrote %s", path)

    def _start(self, step: int, num_steps: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._first, self._end = step, step + num_steps
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _is_requested(self) -> bool:
        request = self._run_dir / REQUEST_FILE
        if not request.exists():
            return False
        request.unlink(missing_ok=True)
        return True

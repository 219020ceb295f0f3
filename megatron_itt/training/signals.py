"""Stop requests: a signal to any process of the job makes all of them stop after the same step."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from megatron_itt.parallel.collectives import any_rank

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The first stop signal of this process. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # the parent process may have blocked them

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def is_requested(self) -> bool:
        """Whether this process was asked to stop; the step statistics carry it to the others."""
        return self.received is not None

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any process of the job was asked to stop; the same answer on all. A collective call."""
        return any_rank(self.is_requested, device)

    def restore(self) -> None:
        """Give the signals back to their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

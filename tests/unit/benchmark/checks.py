"""Checks of every outcome, for processes of their own. Imports nothing heavy: each process imports this module."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from megatron_itt.benchmark.isolated import Row
from megatron_itt.errors import ConfigError


def report_process() -> Iterator[Row]:
    yield {"process": os.getpid()}


def die() -> Iterator[Row]:
    yield {"figure": 1}
    os._exit(7)


def hang() -> Iterator[Row]:
    yield {"figure": 2}
    time.sleep(600)


def fail() -> Iterator[Row]:
    yield {"figure": 3}
    raise ConfigError("no such thing")


def disagree() -> Iterator[Row]:
    yield {"difference": 3.0, "allowed": 1.0, "agrees": False}
    yield {"process": os.getpid()}


def prepare_nothing() -> None:
    """Importing this module in the new process counts as its setup."""


def fail_to_prepare() -> None:
    raise ConfigError("no backend")


def take_a_while() -> Iterator[Row]:
    time.sleep(0.3)
    yield {"waited": True}

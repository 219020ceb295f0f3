"""Kernel dispatch: Triton is used only where it can build its launchers, and the reason is said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from megatron_itt.log import get_logger
from megatron_itt.ops.dispatch import has_triton

triton_driver = pytest.importorskip("triton.runtime").driver


@pytest.fixture(autouse=True)
def _forget_the_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(get_logger(), "propagate", True)
    monkeypatch.setenv("CC", "cc")
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


def use_device(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def get_current_device() -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(triton_driver, "_active", SimpleNamespace(get_current_device=get_current_device))


def test_triton_is_used_where_it_can_launch_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_device(monkeypatch, None)
    assert has_triton() and not caplog.records


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "no C compiler"),
        (
            RuntimeError("Failed to find C compiler. Please specify\nvia CC"),
            "RuntimeError: Failed to find C compiler. ",
        ),
        (AssertionError("libcuda.so cannot found!"), "AssertionError: libcuda.so cannot found!"),
    ],
)
def test_one_line_says_why_an_installed_triton_is_not_used(
    error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if error is None:
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", "")
    use_device(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert not has_triton() and not has_triton()
    (record,) = caplog.records
    message = record.getMessage()
    assert reason in message and "install gcc and python3-dev, or set CC" in message and "\n" not in message

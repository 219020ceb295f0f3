"""Exports beside the training: one at a time, complete or absent, made up for after a kill."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_itt.errors import ConfigError
from megatron_itt.training.exports import BackgroundExports
from tests.helpers.exporting import export_at_length, export_quickly, fail_to_export
from tests.helpers.one_rank import tiny_recipe

Opened = Callable[..., BackgroundExports]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """A function that opens the exports of a run of 5 steps; the steps it releases are in its `released`."""
    found: list[BackgroundExports] = []

    def open_exports(export: object, released: list[set[int]]) -> BackgroundExports:
        config = tiny_recipe(checkpoint={"save_interval_steps": 2, "export_every_steps": 2})
        found.append(BackgroundExports(config, tmp_path, export, release=released.append))  # type: ignore[arg-type]
        return found[-1]

    yield open_exports
    for exports in found:
        exports.stop()


def checkpoint(root: Path, step: int) -> Path:
    folder = root / "checkpoints" / f"step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"of step {step}")
    return folder


def exported(root: Path) -> dict[str, str]:
    return {path.name: (path / "weights").read_text() for path in (root / "exports").glob("*") if path.is_dir()}


def test_checkpoints_stay_until_they_are_exported_and_a_kill_is_made_up_for(opened: Opened, tmp_path: Path) -> None:
    released: list[set[int]] = []
    exports = opened(export_at_length, released)
    checkpoints = [checkpoint(tmp_path, step) for step in (2, 3, 4, 5)]
    assert [exports.add(each) for each in checkpoints] == [{2}, {2}, {2, 4}, {2, 4, 5}]  # step 3 is not due
    deadline = time.monotonic() + 120
    while not list((tmp_path / "exports").glob(".*/weights")):
        assert time.monotonic() < deadline and exports.poll()
        time.sleep(0.05)
    assert not exports.finish(lambda: False)
    exports.stop()
    again = opened(export_quickly, released)
    again.recover(checkpoints)
    assert list((tmp_path / "exports").iterdir()) == []
    assert again.finish(lambda: True)
    assert exported(tmp_path) == {f"step_{step:07d}": f"of step {step}" for step in (2, 4, 5)}
    assert released == [{4, 5}, {5}, set()]
    last = opened(export_quickly, released)
    last.recover(checkpoints)
    assert not last.poll()
    (checkpoints[2] / "weights").write_text("of step 4, trained again")
    last.add(checkpoints[2])
    assert last.finish(lambda: True)
    assert exported(tmp_path)["step_0000004"] == "of step 4, trained again"


def test_an_export_that_fails_is_one_line_of_the_log(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_itt"), "propagate", True)
    released: list[set[int]] = []
    exports = opened(fail_to_export, released)
    exports.add(checkpoint(tmp_path, 2))
    assert exports.finish(lambda: True)
    [message] = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert "step_0000002 was not exported (step_0000002 cannot be exported); itt export --checkpoint" in message
    assert released == [set()] and exported(tmp_path) == {}


def test_a_start_that_cannot_export_refuses_the_setting(opened: Opened) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.export_every_steps is set"):
        opened(None, [])

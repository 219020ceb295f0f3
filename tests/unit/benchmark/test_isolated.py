"""Sections in processes: crashes, hangs and errors cost one section, and a fresh process takes the next."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_itt.benchmark.isolated import Action, run_isolated
from megatron_itt.benchmark.sections import Outcome, Section
from megatron_itt.errors import ConfigError


def tell_process() -> Section:
    return Section(title="process", rows=[{"id": os.getpid()}], table="")


def crash() -> Section:
    os._exit(7)


def hang() -> Section:
    time.sleep(600)
    raise AssertionError("it is stopped before that")


def refuse() -> Section:
    raise ConfigError("no such thing")


def prepare(mark: str) -> None:
    Path(mark).touch()


def fail_to_prepare() -> None:
    raise ConfigError("no parts")


def action(name: str, function: object, limit_s: float = 60.0, **keys: object) -> Action:
    return Action(name=name, function=function, arguments=(), limit_s=limit_s, **keys)  # type: ignore[arg-type]


def test_each_kind_of_failure_costs_one_section(tmp_path: Path) -> None:
    setup = (prepare, (str(tmp_path / "prepared"),))
    actions = [
        action("first", tell_process, setup=setup),
        action("second", tell_process, setup=setup),
        action("refused", refuse, setup=setup),
        action("crashed", crash, setup=setup),
        action("hung", hang, limit_s=0.5, setup=setup),
        action("last", tell_process, setup=setup),
    ]
    seen: list[Outcome] = []
    outcomes = {outcome.name: outcome for outcome in run_isolated(actions, total_s=300.0, report=seen.append)}
    assert [outcome.name for outcome in seen] == [entry.name for entry in actions]
    processes = []
    for name in ("first", "second", "last"):
        section = outcomes[name].section
        assert section is not None
        processes.append(section.rows[0]["id"])
    assert processes[0] == processes[1] != processes[2]
    assert os.getpid() not in processes
    assert (tmp_path / "prepared").exists()
    assert outcomes["refused"].error == "no such thing"
    assert outcomes["crashed"].error == "the process ended with code 7"
    assert outcomes["hung"].error == "had not ended after 0 s, and was stopped"
    assert outcomes["hung"].seconds < 30


def test_a_setup_that_fails_is_the_error_of_its_sections() -> None:
    setup = (fail_to_prepare, ())
    outcomes = run_isolated([action("one", tell_process, setup=setup)], total_s=60.0)
    assert outcomes[0].error == "could not be prepared: no parts"


def test_nothing_begins_after_the_time_of_all() -> None:
    outcomes = run_isolated([action("late", tell_process)], total_s=0.0)
    assert outcomes[0].error == "not begun: the 0 s are over"

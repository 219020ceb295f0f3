"""Learning-rate schedules: the table of decays."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from megatron_itt.config.run import ScheduleConfig
from megatron_itt.errors import ConfigError
from megatron_itt.training.schedule import DECAYS, build_schedule
from tests.helpers.one_rank import tiny_recipe


def test_every_decay_of_a_recipe_is_in_the_table() -> None:
    assert set(DECAYS) == set(get_args(get_type_hints(ScheduleConfig)["decay"]))


def test_an_unknown_decay_is_refused() -> None:
    config = tiny_recipe()
    unknown = replace(config, schedule=replace(config.schedule))
    object.__setattr__(unknown.schedule, "decay", "staircase")
    with pytest.raises(ConfigError, match=r"schedule\.decay is 'staircase'"):
        build_schedule(unknown, None)  # type: ignore[arg-type]

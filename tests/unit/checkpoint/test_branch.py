"""Which checkpoints of which runs a branch may start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_itt.checkpoint.branch import branch_overrides, find_branch_point
from megatron_itt.checkpoint.state import new_run_state, write_run_state
from megatron_itt.config import dump_config, load_config
from megatron_itt.errors import IttError
from tests.helpers.one_rank import tiny_recipe

WSD = {"steps": 20, "warmup_steps": 4, "decay": "wsd", "decay_steps": 5}


def write_trunk(folder: Path, steps: tuple[int, ...], schedule: dict[str, Any]) -> Path:
    """A run folder with the state of checkpoints, and its recipe as `recipe.yaml` beside it."""
    config = tiny_recipe(schedule=schedule, logging={"run_dir": str(folder / "trunk")})
    for step in steps:
        checkpoint = folder / "trunk" / "checkpoints" / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        write_run_state(new_run_state(config, step=step), checkpoint)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dump_config(config)), encoding="utf-8")
    return path


def branch(recipe: Path, step: int, *overrides: str) -> Path | None:
    given = (f"logging.run_dir={recipe.parent / 'branch'}", *overrides)
    found = branch_overrides(recipe, given, trunk=recipe.parent / "trunk", step=step)
    config = load_config(recipe, found)
    assert config.schedule.steps == step + (config.schedule.decay_steps or 0)
    assert config.num_training_samples == 20 * 4, "the order of samples is the trunk's"
    return find_branch_point(config)


def test_a_branch_decays_from_the_step_it_is_taken_at(tmp_path: Path) -> None:
    recipe = write_trunk(tmp_path, (4, 8, 15), WSD)
    for step, decay_steps in ((4, 5), (8, 2), (15, 5)):
        assert branch(recipe, step, f"schedule.decay_steps={decay_steps}") is not None
    phases = "data.phases=[{until_tokens: 500}, {until_tokens: 1920}]"  # of the trunk, 20 steps of 96 tokens
    assert branch(recipe, 8, phases, "schedule.steps=10") is not None
    constant = write_trunk(tmp_path / "constant", (10,), {"steps": 20, "decay": "constant", "warmup_steps": 0})
    assert branch(constant, 10, "schedule.decay=wsd", "schedule.decay_steps=3") is not None


@pytest.mark.parametrize(
    ("step", "overrides", "message"),
    [
        (9, [], r"has no checkpoint of that step \(it has: 2, 8, 17\).*keep_every_steps"),
        (17, ["schedule.decay_steps=3"], "of step 17, but its learning rate is stable from step 4 to 15"),
        (2, ["schedule.warmup_steps=0"], "of step 2, but its learning rate is stable from step 4 to 15"),
        (8, ["schedule.decay_steps=14"], "the branch ends at schedule.steps = 22; branch earlier"),
        (8, ["schedule.decay=cosine", "schedule.decay_steps=null"], "set schedule.decay=wsd and schedule.decay_steps"),
        (8, ["logging.run_dir={trunk}"], "a branch needs a run folder of its own"),
        (8, ["checkpoint.initial_weights=runs/other"], "a run starts from one of them"),
    ],
)
def test_a_branch_that_continues_no_trunk_is_refused(
    tmp_path: Path, step: int, overrides: list[str], message: str
) -> None:
    recipe = write_trunk(tmp_path, (2, 8, 17), WSD)
    with pytest.raises(IttError, match=message):
        branch(recipe, step, *(override.format(trunk=tmp_path / "trunk") for override in overrides))


def test_a_trunk_without_a_stable_part_is_refused(tmp_path: Path) -> None:
    recipe = write_trunk(tmp_path, (8,), {"steps": 20, "warmup_steps": 4, "decay": "cosine"})
    with pytest.raises(IttError, match=r"its schedule\.decay is cosine, which has no stable part"):
        branch(recipe, 8, "schedule.decay=wsd", "schedule.decay_steps=3")


def test_a_branch_made_by_hand_names_what_does_not_continue(tmp_path: Path) -> None:
    recipe = write_trunk(tmp_path, (8,), WSD)
    keys = [f"checkpoint.branch_from={tmp_path}/trunk/checkpoints/step_0000008", "schedule.steps=11"]
    with pytest.raises(IttError, match=r"schedule\.trunk_steps is not; use --branch-from"):
        load_config(recipe, keys)
    with pytest.raises(IttError, match=r"would begin after step 6.*at least 13.*set schedule\.trunk_steps=20"):
        find_branch_point(load_config(recipe, [*keys, "schedule.trunk_steps=30"]))

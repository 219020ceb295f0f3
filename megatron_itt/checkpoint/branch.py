"""Branches: a run that starts from a stable checkpoint of another one, its trunk, to decay the learning rate.

The state of optimizer, random generators and data order continue. One trunk serves many lengths of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_itt.checkpoint.store import STATE_FILE, checkpoint_name, checkpoint_root, list_checkpoints, step_of
from megatron_itt.config import RunConfig, load_config
from megatron_itt.errors import CheckpointError, ConfigError

BRANCHES_FILE = "branches.jsonl"  # in the run folder of the trunk


def branch_overrides(recipe: str | Path, overrides: Iterable[str], *, trunk: str | Path, step: int) -> tuple[str, ...]:
    """Return the overrides that make a recipe a branch of `trunk` (a run folder) whose decay starts after `step`.

    Raises ConfigError when the recipe has no decay, CheckpointError when there is no such checkpoint.
    """
    given = tuple(overrides)
    config = load_config(recipe, (*given, "data.phases=[]"))  # phases divide the trunk, whose length is not known yet
    if config.schedule.decay_steps is None:
        raise ConfigError("--branch-from starts a decay: set schedule.decay=wsd and schedule.decay_steps")
    if Path(config.logging.run_dir).resolve() == Path(trunk).resolve():
        raise ConfigError(f"logging.run_dir is {trunk}, the trunk's; a branch needs a run folder of its own")
    folder = checkpoint_root(trunk) / checkpoint_name(step)
    own = list_checkpoints(checkpoint_root(config.logging.run_dir))  # of a branch that resumes: the trunk may be gone
    source = own[-1] if own else folder
    if not source.is_dir():
        steps = ", ".join(str(step_of(path)) for path in list_checkpoints(checkpoint_root(trunk))) or "none"
        raise CheckpointError(
            f"--at is {step}, but {trunk} has no checkpoint of that step (it has: {steps}); the trunk's "
            "checkpoint.keep_every_steps keeps them"
        )
    try:
        order_steps = _order_steps(json.loads((source / STATE_FILE).read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source / STATE_FILE} is damaged ({error}); use another checkpoint") from None
    return (
        *given,
        f"schedule.steps={step + config.schedule.decay_steps}",
        f"schedule.trunk_steps={order_steps}",
        f"checkpoint.branch_from={json.dumps(str(folder))}",
    )


def find_branch_point(config: RunConfig) -> Path | None:
    """Return the checkpoint that a new run branches from; None for a recipe that is no branch.

    CheckpointError when there is none, or when the branch does not continue it: its learning rate or its data.
    """
    if config.checkpoint.branch_from is None:
        return None
    from megatron_itt.checkpoint.state import read_run_state  # megatron-core, which a login node may lack

    folder, schedule = Path(config.checkpoint.branch_from), config.schedule
    state = read_run_state(folder)
    trunk: dict[str, Any] = state.recipe["schedule"]
    begin, order_steps = schedule.steps - (schedule.decay_steps or 0), _order_steps(state.recipe)
    is_wsd = trunk["decay"] == "wsd"
    last_stable = trunk["steps"] - trunk["decay_steps"] if is_wsd else trunk["steps"]
    problems = []
    if trunk["decay"] not in ("wsd", "constant"):
        problems.append(
            f"its schedule.decay is {trunk['decay']}, which has no stable part; branch from wsd or constant"
        )
    elif not trunk["warmup_steps"] <= state.step <= last_stable:
        problems.append(
            f"it is of step {state.step}, but its learning rate is stable from step {trunk['warmup_steps']} to "
            f"{last_stable}; take a checkpoint in between"
        )
    if begin < state.step:
        problems.append(
            f"the decay would begin after step {begin}; use schedule.steps of at least "
            f"{state.step + (schedule.decay_steps or 0)}"
        )
    if order_steps != schedule.trunk_steps:
        problems.append(f"its order of samples is that of {order_steps} steps; set schedule.trunk_steps={order_steps}")
    if problems:
        raise CheckpointError(f"checkpoint.branch_from is {folder}: {'; '.join(problems)}")
    return folder


def record_branch(config: RunConfig, step: int) -> None:
    """Add a line on a branch to `branches.jsonl` in the run folder of its trunk."""
    assert config.checkpoint.branch_from is not None, "called for branches"
    path = Path(config.checkpoint.branch_from).resolve().parents[1] / BRANCHES_FILE
    line = {"step": step, "run_dir": str(Path(config.logging.run_dir).resolve()), "steps": config.schedule.steps}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "started": now}) + "\n")


def _order_steps(recipe: dict[str, Any]) -> int:
    """The steps of the run whose order of samples a recipe has."""
    return recipe["schedule"].get("trunk_steps") or recipe["schedule"]["steps"]

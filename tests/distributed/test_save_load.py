"""A checkpoint, optimizer included, of any layout continues under any other as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessPlace
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import NUM_STEPS, Observed, observe_steps

JOBS_AT_ONCE = 8  # ports are chosen when ranks start, and on a busy machine do not stay free for long
SAVED_AFTER = 3  # steps; by then Adam's moments and its step count matter
TOLERANCE = 1e-5  # float32 sums in another order
# One bfloat16 rounding is up to 2^-9 of a value. Ranks that add parts round at other places, so losses agree to a few
# of those; states on disk are only moved, never rounded, which the round trip tests without any tolerance.
BF16_TOLERANCE = 2**-8


@dataclass(frozen=True)
class Layout:
    """Processes and how they divide the model; what is left is data parallel."""

    name: str
    world_size: int
    parallel: dict[str, Any]


LAYOUTS = [
    Layout("one", 1, {}),
    Layout("data2", 2, {}),
    Layout("tensor2", 2, {"tensor": 2, "sequence": True}),
    Layout("pipeline2", 2, {"pipeline": 2}),
    Layout("interleaved2", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    Layout("tensor2_data2", 4, {"tensor": 2}),
    Layout("tensor2_pipeline2", 4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    Layout("pipeline2_data2", 4, {"pipeline": 2}),
]


def recipe(layout: Layout, *, distributed: bool, dtype: str = "fp32") -> RunConfig:
    return tiny_recipe(
        model={"num_query_groups": 4},
        parallel=layout.parallel,
        batch={"global": 8, "micro": 1},
        optimizer={"distributed": distributed, "weight_decay": 0.1},
        precision={"dtype": dtype},
    )


def save_in_the_middle(place: ProcessPlace, config: RunConfig, root: str) -> Observed:
    """The first steps, then a checkpoint."""
    return observe_steps(place, config, save_to=root, steps=(0, SAVED_AFTER))


def continue_from(place: ProcessPlace, config: RunConfig, root: str) -> Observed:
    """The steps after a checkpoint."""
    return observe_steps(place, config, load_from=checkpoint_in(root), steps=(SAVED_AFTER, NUM_STEPS))


def pass_on(place: ProcessPlace, config: RunConfig, root: str, copy: str) -> Observed:
    """Load a checkpoint and save it again, without a step."""
    return observe_steps(place, config, load_from=checkpoint_in(root), save_to=copy, steps=(SAVED_AFTER, SAVED_AFTER))


def checkpoint_in(root: str) -> str:
    return str(Path(root) / f"step_{SAVED_AFTER:07d}")


def save_and_continue(folder: Path, layouts: list[Layout], **options: Any) -> dict[tuple[str, str], Observed]:
    """Save under every layout and continue each under every layout. (saved, loaded) -> what the first rank saw."""
    found: dict[tuple[str, str], Observed] = {}
    sizes = sorted({layout.world_size for layout in layouts})
    groups = {size: [layout for layout in layouts if layout.world_size == size] for size in sizes}
    for size, group in groups.items():
        run_ranks(size, save_in_the_middle, [(recipe(to, **options), str(folder / to.name)) for to in group])
    for size, group in groups.items():
        pairs = [(saved, loaded) for saved in layouts for loaded in group]
        jobs = [(recipe(loaded, **options), str(folder / saved.name)) for saved, loaded in pairs]
        for first in range(0, len(jobs), JOBS_AT_ONCE):
            results = run_ranks(size, continue_from, jobs[first : first + JOBS_AT_ONCE])
            for (saved, loaded), ranks in zip(pairs[first : first + JOBS_AT_ONCE], results, strict=True):
                found[saved.name, loaded.name] = ranks[0]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "plain_optimizer"])
def test_every_layout_continues_from_every_other(tmp_path: Path, distributed: bool) -> None:
    """Every pair of layouts sees the losses and norms of one rank that never stopped."""
    whole = observe_steps(ONE_PROCESS, recipe(LAYOUTS[0], distributed=distributed))
    continued = save_and_continue(tmp_path, LAYOUTS, distributed=distributed)
    assert len(continued) == len(LAYOUTS) ** 2
    for pair, observed in continued.items():
        assert observed.losses == pytest.approx(whole.losses[SAVED_AFTER:], rel=TOLERANCE), pair
        assert observed.grad_norms == pytest.approx(whole.grad_norms[SAVED_AFTER:], rel=TOLERANCE), pair
        assert observed.validation == pytest.approx(whole.validation, rel=TOLERANCE), pair


def test_a_bf16_checkpoint_survives_a_round_trip_through_other_layouts_bit_for_bit(tmp_path: Path) -> None:
    """Weights, float32 master weights, moments, quantiles: one rank saves, two ranks load and save, one continues."""
    options: dict[str, Any] = {"distributed": True, "dtype": "bf16"}
    one, through = LAYOUTS[0], LAYOUTS[1:3]
    root = str(tmp_path / one.name)
    config = recipe(one, **options)
    whole = observe_steps(ONE_PROCESS, config)
    save_in_the_middle(ONE_PROCESS, config, root)
    jobs = [(recipe(layout, **options), root, str(tmp_path / layout.name)) for layout in through]
    run_ranks(2, pass_on, jobs)
    for layout in through:
        back = continue_from(ONE_PROCESS, config, str(tmp_path / layout.name))
        assert (back.losses, back.grad_norms) == (whole.losses[SAVED_AFTER:], whole.grad_norms[SAVED_AFTER:])
        assert back.validation == whole.validation
        assert all(back.quantiles[layer_idx].equal(table) for layer_idx, table in whole.quantiles.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "plain_optimizer"])
def test_bf16_runs_continue_under_other_layouts(tmp_path: Path, distributed: bool) -> None:
    options: dict[str, Any] = {"distributed": distributed, "dtype": "bf16"}
    layouts = [LAYOUTS[0], LAYOUTS[2], LAYOUTS[3], LAYOUTS[6]]
    continued = save_and_continue(tmp_path, layouts, **options)
    for (saved, loaded), observed in continued.items():
        # The same checkpoint, continued by one rank: what differs is two steps of bfloat16 arithmetic.
        expected = continued[saved, LAYOUTS[0].name]
        assert observed.losses == pytest.approx(expected.losses, rel=BF16_TOLERANCE), (saved, loaded)
        assert observed.validation == pytest.approx(expected.validation, rel=BF16_TOLERANCE), (saved, loaded)

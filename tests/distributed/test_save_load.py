"""A checkpoint, optimizer included, of any layout continues under any other as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.errors import CheckpointError
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import NUM_STEPS, Observed, microbatches, observe_steps

SAVED_AFTER = NUM_STEPS - 1  # steps; by then Adam's moments and its step count matter
TOLERANCE = 1e-6  # in float64; a norm that megatron-core rounds to float32 is left
# One bfloat16 rounding is up to 2^-9 of a value. Ranks that add parts round at other places, so losses agree to a few
# of those; states on disk are only moved, never rounded, which the round trip tests without any tolerance.
BF16_TOLERANCE = 2**-8
BF16_MUON: dict[str, Any] = {"kind": "muon", "distributed": True, "dtype": "bf16"}


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


def recipe(
    layout: Layout, *, distributed: bool, dtype: str = "fp32", overlap: bool = False, kind: str = "adamw"
) -> RunConfig:
    return tiny_recipe(
        model={"num_query_groups": 4},
        parallel=layout.parallel,
        batch={"global": 8, "micro": 1},
        optimizer={
            "kind": kind,
            "distributed": distributed,
            "weight_decay": 0.1,
            "overlap_grad_reduce": overlap,
            "groups": [  # of the second, one of two pipeline stages has none
                {"match": "router", "learning_rate": "x0.5", "weight_decay": 0.2},
                {"match": "embedding", "learning_rate": 0.02},
            ],
        },
        precision={"dtype": dtype},
    )


def save_in_the_middle(place: ProcessInfo, config: RunConfig, root: str) -> Observed:
    """The first steps, then a checkpoint."""
    return observe_steps(place, config, save_to=root, steps=(0, SAVED_AFTER))


def continue_from(place: ProcessInfo, config: RunConfig, root: str) -> Observed:
    """The steps after a checkpoint."""
    return observe_steps(place, config, load_from=checkpoint_in(root), steps=(SAVED_AFTER, NUM_STEPS))


def pass_on(place: ProcessInfo, config: RunConfig, root: str, copy: str) -> Observed:
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
        for (saved, loaded), ranks in zip(pairs, run_ranks(size, continue_from, jobs), strict=True):
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


def do_part(place: ProcessInfo, config: RunConfig, root: str, part: str) -> Observed:
    """All steps, or those before or after a checkpoint, in the precision of the recipe."""
    options: dict[str, dict[str, Any]] = {
        "first": {"save_to": root, "steps": (0, SAVED_AFTER)},
        "second": {"load_from": checkpoint_in(root), "steps": (SAVED_AFTER, NUM_STEPS)},
        "whole": {},
    }
    return observe_steps(place, config, as_trained=True, **options[part])


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (
            LAYOUTS[0],
            [{"distributed": True}, {"distributed": False, "dtype": "bf16"}, {**BF16_MUON, "distributed": False}],
        ),
        (LAYOUTS[1], [{"distributed": True, "overlap": True}, {"distributed": False}, BF16_MUON]),
    ],
    ids=["one rank", "two ranks"],
)
def test_the_same_layout_continues_bit_for_bit(tmp_path: Path, layout: Layout, options: list[dict[str, Any]]) -> None:
    configs = [recipe(layout, **option) for option in options]
    parts = ("first", "second", "whole")
    jobs = [(config, str(tmp_path / str(number)), part) for number, config in enumerate(configs) for part in parts]
    results = run_ranks(layout.world_size, do_part, jobs)
    for position in range(0, len(jobs), len(parts)):
        for first, second, whole in zip(*results[position : position + len(parts)], strict=True):
            assert first.losses + second.losses == whole.losses
            assert first.grad_norms + second.grad_norms == whole.grad_norms
            assert second.validation == whole.validation
            assert all(second.quantiles[layer].equal(table) for layer, table in whole.quantiles.items())


def draw_before_and_after(place: ProcessInfo, config: RunConfig, root: str) -> tuple[list[float], list[float]]:
    """Random numbers of every kind after a save, and again after loading it."""
    from megatron_itt.checkpoint.save import save_checkpoint
    from megatron_itt.checkpoint.state import new_run_state
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.checkpointing import load_trainer, trainer_state
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place)
        train_step(trainer, iter(microbatches(trainer, 0)), 1)  # before it, an optimizer has no state to save
        for _ in range(place.rank + 1):
            draw()
        state = trainer_state(trainer, loading=False)
        folder = save_checkpoint(state, new_run_state(config, step=1), Path(root), keep_last=1)
        before = draw()
        load_trainer(trainer, folder, with_random_states=True)
        return before, draw()
    finally:
        stop_parallel()


def draw() -> list[float]:
    """Numbers from Python, numpy, torch and megatron-core's tracker; also those that a generator keeps for later."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()]
    with get_cuda_rng_tracker().fork():
        return [*numbers, torch.rand(1).item()]


def test_random_states_of_every_rank_continue(tmp_path: Path) -> None:
    config = recipe(LAYOUTS[2], distributed=True)
    (ranks,) = run_ranks(2, draw_before_and_after, [(config, str(tmp_path))])
    for before, after in ranks:
        assert before == after
    assert ranks[0][0] != ranks[1][0]


def choose(place: ProcessInfo, config: RunConfig, root: str) -> str:
    """The checkpoint that all ranks agree on, or why there is none."""
    from megatron_itt.checkpoint.load import find_intact
    from megatron_itt.checkpoint.store import LocalStore
    from megatron_itt.parallel.groups import start_parallel, stop_parallel

    start_parallel(config, process=place)
    try:
        found = find_intact(LocalStore(Path(root)))
        return "none" if found is None else found.name
    except CheckpointError as error:
        return str(error)
    finally:
        stop_parallel()


def test_ranks_agree_on_the_newest_intact_checkpoint(tmp_path: Path) -> None:
    """Each rank reads a part of the files; damage that one of them finds counts for all."""
    config = recipe(LAYOUTS[1], distributed=True)
    save_in_the_middle(ONE_PROCESS, recipe(LAYOUTS[0], distributed=True), str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        root = tmp_path / name
        shutil.copytree(checkpoint_in(str(root)), root / "step_0000009")
        for folder in root.glob("step_*") if name == "b" else [root / "step_0000009"]:
            data = next(folder.glob("*.distcp"))
            data.write_bytes(data.read_bytes()[:-1] + b"?")
        (root / "latest").write_text("step_0000009")
    jobs = [(config, str(tmp_path / name)) for name in ("a", "b", "c")]
    intact, damaged, absent = run_ranks(2, choose, jobs)
    assert intact == [Path(checkpoint_in("")).name] * 2
    assert damaged[0] == damaged[1]
    assert intact[0] in damaged[0] and "step_0000009" in damaged[0]
    assert absent == ["none"] * 2

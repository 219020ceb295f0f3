"""Runs with TransformerEngine's layers and AdamW, as far as its stand-in goes: build, train, save, load, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import NUM_STEPS, Observed, observe_steps
from tests.helpers.transformer_engine import install_stand_in

SAVED_AFTER = NUM_STEPS - 1
NAME = f"step_{SAVED_AFTER:07d}"
TOLERANCE = 1e-6  # float64 throughout, but for norms that megatron-core rounds to float32
LAYOUTS: list[dict[str, Any]] = [{"tensor": 2, "sequence": True}, {"tensor": 2}, {"pipeline": 2}]


def recipe(parallel: dict[str, Any], *, attend: str = "all") -> Any:
    return tiny_recipe(
        model={"num_query_groups": 4, "seq_length": 32},
        thinking={"attend": attend},
        parallel=parallel,
        batch={"global": 8, "micro": 1},
    )


def observe_with_stand_in(place: Any, config: Any, options: dict[str, Any]) -> tuple[Observed, set[str]]:
    """`observe_steps`, names of the model's state, and the module of the optimizer's class."""
    install_stand_in()
    from megatron_itt.training import trainer
    from megatron_itt.training.optimizer import build_optimizer

    made: set[str] = set()

    def build_and_note(config: Any, wrapped: Any, *chunks: Any) -> Any:
        made.update(name for chunk in wrapped for name in chunk.state_dict())
        optimizer = build_optimizer(config, wrapped, *chunks)
        made.update(type(part.optimizer).__module__ for part in getattr(optimizer, "chained_optimizers", [optimizer]))
        return optimizer

    with patch.object(trainer, "build_optimizer", build_and_note):
        return observe_steps(place, config, **options), made


def test_a_run_computes_saves_and_resumes_what_a_native_one_does(tmp_path: Path) -> None:
    folder = str(tmp_path)
    native = observe_steps(ONE_PROCESS, recipe({}))
    selected = observe_steps(ONE_PROCESS, recipe({}, attend="selected"))
    jobs: list[tuple[Any, dict[str, Any]]] = [(recipe(parallel), {}) for parallel in LAYOUTS]
    jobs.append((recipe(LAYOUTS[0], attend="selected"), {}))
    jobs.append((recipe(LAYOUTS[0]), {"save_to": folder, "steps": (0, SAVED_AFTER)}))
    jobs.append((recipe(LAYOUTS[1]), {"load_from": f"{folder}/{NAME}", "steps": (SAVED_AFTER, NUM_STEPS)}))
    results = [ranks[0] for ranks in run_ranks(2, observe_with_stand_in, jobs, start_method="spawn")]
    for _, made in results:
        assert any(name.endswith("_extra_state") for name in made) and "tests.helpers.transformer_engine" in made
    observed = [run for run, _ in results]
    for run in observed[: len(LAYOUTS)]:
        assert_same(run, native)
    assert_same(observed[len(LAYOUTS)], selected)
    saved, resumed = observed[-2:]
    assert saved.losses + resumed.losses == pytest.approx(native.losses, rel=TOLERANCE)
    assert resumed.validation == pytest.approx(native.validation, rel=TOLERANCE)
    continued = observe_steps(ONE_PROCESS, recipe({}), load_from=f"{folder}/{NAME}", steps=(SAVED_AFTER, NUM_STEPS))
    assert continued.losses == pytest.approx(native.losses[SAVED_AFTER:], rel=TOLERANCE)
    assert continued.grad_norms == pytest.approx(native.grad_norms[SAVED_AFTER:], rel=TOLERANCE)


def assert_same(observed: Observed, expected: Observed) -> None:
    assert observed.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert observed.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    assert observed.validation == pytest.approx(expected.validation, rel=TOLERANCE)

"""Building the ranks of a large job in one process, without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_itt.accounting.memory import rank_memory
from megatron_itt.accounting.report import format_check
from megatron_itt.errors import ConfigError
from megatron_itt.training import trainer as module
from megatron_itt.training.trainer import MiscountedRankError, built_check_report, dry_build
from tests.helpers.one_rank import tiny_recipe

WORLD_SIZE = 8
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2, "sequence": True},
    {"pipeline": 4},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2},
]


def recipe(parallel: dict[str, Any], **sections: Any) -> Any:
    return tiny_recipe(parallel=parallel, batch={"global": 16, "micro": 2}, **sections)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["itt", "loop", "none"])
def test_every_stage_of_a_job_of_eight_holds_what_is_counted(kind: str, parallel: dict[str, Any]) -> None:
    capacity = {"itt": [0.5, 0.75], "loop": [1.0, 1.0], "none": []}[kind]
    config = recipe(parallel, thinking={"kind": kind, "capacity": capacity})
    built = dry_build(config, WORLD_SIZE)
    assert [rank.parameters for rank in built] == [stage.parameters for stage in rank_memory(config, WORLD_SIZE)]
    assert sorted(layer for rank in built for layer in rank.layers) == [0, 1, 2, 3]
    stages = config.parallel.pipeline
    assert [rank.rank for rank in built] == [stage * WORLD_SIZE // stages for stage in range(stages)]
    assert not dist.is_initialized()


@pytest.mark.parametrize("pipeline", [1, 2])
def test_tied_embeddings_and_bf16_are_counted(pipeline: int) -> None:
    config = recipe({"pipeline": pipeline}, model={"tie_embeddings": True}, precision={"dtype": "bf16"})
    assert len(dry_build(config, WORLD_SIZE)) == pipeline


def test_the_report_lists_the_ranks_with_their_layers() -> None:
    report = built_check_report(recipe({"pipeline": 2, "virtual_pipeline": 2}), WORLD_SIZE)
    assert [rank["layers"] for rank in report["ranks"]] == [(0, 2), (1, 3)]
    assert "built rank 4      stage 1, tensor rank 0, layers 1, 3: 0.0" in format_check(report)


def test_a_rank_that_is_not_what_is_counted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stage_layers", lambda config, stage: [0, 1, 2])
    with pytest.raises(MiscountedRankError, match=r"rank 0 of 8 .* in layers \[0, 1, 2, 3\], but .* \[0, 1, 2\]"):
        dry_build(recipe({}), WORLD_SIZE)
    assert not dist.is_initialized()


def test_what_megatron_core_refuses_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("such a model\nhas no place here")

    monkeypatch.setattr(module, "build_model", refuse)
    with pytest.raises(ConfigError, match=r"pipeline stage 0, tensor rank 0\) cannot be built: such a model has no"):
        dry_build(recipe({}), WORLD_SIZE)
    assert not dist.is_initialized()


def test_a_world_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="the world size is 6"):
        dry_build(recipe({"tensor": 2, "pipeline": 2}), 6)


def test_parameter_groups_are_checked_over_all_stages() -> None:
    groups = [{"match": "embedding", "learning_rate": "x2"}, {"match": "output_layer", "weight_decay": 0.0}]
    assert len(dry_build(recipe({"pipeline": 2}, optimizer={"groups": groups}), WORLD_SIZE)) == 2
    with pytest.raises(ConfigError, match="head matches no parameter"):
        dry_build(recipe({"pipeline": 2}, optimizer={"groups": [{"match": "head", "weight_decay": 0.0}]}), WORLD_SIZE)

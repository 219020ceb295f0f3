"""Memory per rank: counts that can be worked out, and the rules of layouts (the real model: test_measured.py)."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.accounting.flops import count_parameters
from megatron_itt.accounting.memory import layer_activations, rank_memory, stage_layers
from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config import RunConfig, parse_config
from megatron_itt.errors import ConfigError


def make_config(**sections: dict[str, Any]) -> RunConfig:
    recipe: dict[str, Any] = {
        "model": {
            "hidden_size": 1024,
            "ffn_hidden_size": 2560,
            "num_layers": 8,
            "num_attention_heads": 32,
        },
        "thinking": {"kind": "itt", "capacity": [0.5, 0.5, 0.5]},
        "schedule": {"steps": 10},
        "logging": {"run_dir": "runs/x"},
    }
    return parse_config({**recipe, **sections})


@pytest.mark.parametrize(
    ("dtype", "distributed", "world_size", "bytes_per_parameter"),
    [
        ("bf16", True, 1, (2, 4, 12)),
        ("bf16", True, 4, (2, 4, 3)),
        ("bf16", False, 4, (2, 4, 12)),
        ("fp32", True, 4, (4, 4, 2)),
        ("fp32", False, 4, (4, 4, 8)),
    ],
)
def test_states_per_parameter(
    dtype: str, distributed: bool, world_size: int, bytes_per_parameter: tuple[int, int, int]
) -> None:
    config = make_config(precision={"dtype": dtype}, optimizer={"distributed": distributed})
    (rank,) = rank_memory(config, world_size)
    assert rank.parameters == count_parameters(config.model, config.thinking).total
    states = (rank.weights, rank.gradients, rank.optimizer)
    assert states == tuple(size * rank.parameters for size in bytes_per_parameter)
    assert rank.total == sum(states) + rank.activations


def test_pipeline_stages_hold_the_model_between_them() -> None:
    config = make_config(parallel={"pipeline": 4})
    stages = rank_memory(config, 4)
    assert sum(stage.parameters for stage in stages) == count_parameters(config.model, config.thinking).total
    assert min(stages[0].parameters, stages[3].parameters) > max(stages[1].parameters, stages[2].parameters)


def test_tensor_parallel_ranks_share_matrices_and_repeat_the_rest() -> None:
    config, whole = make_config(parallel={"tensor": 4}), make_config()
    count = count_parameters(whole.model, whole.thinking)
    repeated = count.norms + count.thinking
    assert rank_memory(config, 4)[0].parameters == (count.total - repeated) / 4 + repeated


def test_sequence_parallelism_and_smaller_micro_batches_save_activations() -> None:
    def activations(**sections: dict[str, Any]) -> float:
        return rank_memory(make_config(**sections), 2)[0].activations

    without = activations(parallel={"tensor": 2})
    assert activations(parallel={"tensor": 2, "sequence": True}) < without
    assert without < activations(parallel={"tensor": 2}, batch={"micro": 2}) <= 2 * without


def test_recomputation_saves_activations() -> None:
    def activations(recompute: str) -> float:
        thinking = {"kind": "itt", "capacity": [0.5, 0.5, 0.5], "recompute": recompute}
        return rank_memory(make_config(thinking=thinking), 1)[0].activations

    assert activations("layer") < activations("routed") < activations("none")


def test_a_drawn_capacity_is_costed_at_its_largest() -> None:
    def activations(capacity: Any) -> float:
        return rank_memory(make_config(thinking={"kind": "itt", "capacity": capacity}), 1)[0].activations

    assert activations({"sample": [0.3, 0.9], "steps": 2}) == activations([0.9, 0.9])


def test_early_stages_hold_more_micro_batches() -> None:
    config = make_config(parallel={"pipeline": 4}, thinking={})
    stages = rank_memory(config, 4)[:3]
    per_layer = layer_activations(config, thinks=False)
    layers = [len(stage_layers(config, stage.pipeline_stage)) for stage in stages]
    assert [
        stage.activations / (per_layer * count) for stage, count in zip(stages, layers, strict=True)
    ] == pytest.approx([4, 3, 2])


def test_interleaved_stages_hold_their_layers_in_chunks() -> None:
    config = make_config(parallel={"pipeline": 2, "virtual_pipeline": 2})
    chunks = cut_pipeline(config).chunks
    assert stage_layers(config, 0) == [*chunks[0], *chunks[2]]
    assert stage_layers(config, 1) == [*chunks[1], *chunks[3]]
    assert sorted(stage_layers(config, 0) + stage_layers(config, 1)) == list(range(8))


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"world size is 6.*start a multiple of 4 processes"):
        rank_memory(make_config(parallel={"pipeline": 4}), 6)

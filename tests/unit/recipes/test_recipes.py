"""Every shipped recipe loads, keeps all rules, and is the model that it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.accounting.flops import count_parameters, paper_flops
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.accounting.pipeline import cut_pipeline
from megatron_itt.config import RunConfig, ThinkingConfig, load_config
from megatron_itt.training.optimizer import match_group

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
SIZES = {"162m": 162.02, "230m": 249.33, "466m": 466.65}
SCALE = {"1b3": 1345.42, "7b": 6738.42}  # the 7B count is the published one of LLaMA-7B
TABLE_1 = {
    "llama": (),
    "loop_x3": (1.0, 1.0),
    "loop_x4": (1.0, 1.0, 1.0),
    "itt_x2": (0.9,),
    "itt_x3": (0.7, 0.7),
    "itt_x4": (0.5, 0.5, 0.5),
}
# Ablation -> the one switch that differs from the reference (Table 3), and the FLOPs the paper prints.
TABLE_3: dict[str, tuple[dict[str, Any], float]] = {
    "itt_x4": ({}, 3.29),
    "llama": ({"kind": "none", "capacity": ()}, 1.88),
    "without_residual_thinking": ({"residual": "replace"}, 3.29),
    "without_token_routing": ({"routing": "none", "capacity": (1.0, 1.0, 1.0)}, 4.70),
    "without_step_encoding": ({"step_encoding": False}, 3.29),
    "top_p_routing": ({"routing": "topp"}, 3.29),
    "tanh_gate": ({"gate": "tanh"}, 3.29),
    "symmetric_reweighting": ({"reweight": "symmetric"}, 3.29),
}


# Parameters of the published models, in millions.
RETROFIT = {"smollm2_135m": 134.52, "smollm2_360m": 361.82, "smollm2_1b7": 1711.38}
RETROFIT |= {"llama3.2_1b": 1235.81, "qwen2.5_0b5": 494.03, "qwen3_0b6": 596.05}


def load(name: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml")


def trained_recipes() -> list[str]:
    paths = sorted(RECIPES.glob("*/*.yaml"))
    return [path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths if path.parent.name != "base"]


@pytest.mark.parametrize("name", trained_recipes())
def test_every_recipe_loads_and_writes_to_a_folder_of_its_own(name: str) -> None:
    config = load(name)
    run_dirs = [load(other).logging.run_dir for other in trained_recipes()]
    assert run_dirs.count(config.logging.run_dir) == 1
    assert config.logging.run_dir != "runs/unnamed"


@pytest.mark.parametrize("kind", TABLE_1)
@pytest.mark.parametrize("size", SIZES)
def test_the_rows_of_table_1(size: str, kind: str) -> None:
    config = load(f"{size}/{kind}")
    count = count_parameters(config.model, config.thinking)
    assert round(count.base / 1e6, 2) == SIZES[size]
    assert config.thinking.capacity == TABLE_1[kind]
    assert config.thinking.kind == {"l": "loop", "i": "itt"}[kind[0]] if kind != "llama" else "none"
    assert config.thinking.layer_indices(8) == (() if kind == "llama" else (1, 3, 5, 7))
    assert count.thinking == (len(TABLE_1[kind]) * 2 + 1) * 4 * config.model.hidden_size * (kind[:3] == "itt")


@pytest.mark.parametrize("name", TABLE_3)
def test_the_variants_of_table_3(name: str) -> None:
    config, reference = load(f"ablations/{name}"), load("162m/itt_x4")
    changed, published = TABLE_3[name]
    assert config.thinking == replace(reference.thinking, **changed)
    assert config.model == reference.model and config.schedule == reference.schedule
    assert paper_flops(config.model, config.thinking) / 1e12 == pytest.approx(published, abs=0.01)


def test_no_ablation_is_missing() -> None:
    assert {path.stem for path in (RECIPES / "ablations").glob("*.yaml")} == set(TABLE_3)


def test_the_elastic_and_the_one_layer_recipe() -> None:
    elastic, one_layer = load("162m/itt_x4_elastic"), load("466m/itt_x4_one_layer")
    assert elastic.thinking.capacity == (0.7, 0.7, 0.7) and len(elastic.validation.budgets) == 7
    assert paper_flops(elastic.model, elastic.thinking) / 1e12 == pytest.approx(3.85, abs=0.01)
    assert paper_flops(one_layer.model, one_layer.thinking) / 1e12 == pytest.approx(5.84, abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_the_paper_settings_of_training(size: str) -> None:
    config = load(f"{size}/itt_x4")
    assert config.schedule.steps * config.tokens_per_step == pytest.approx(52.4e9, rel=0.001)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (3e-4, (0.9, 0.95))
    assert config.schedule.warmup_steps == 0.03 * config.schedule.steps
    assert sum(domain.weight for domain in config.data.blend.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", [f"{size}/{kind}" for size in SIZES for kind in TABLE_1])
def test_the_recipes_of_table_1_fit_eight_gpus_of_80_gb(name: str) -> None:
    assert max(stage.total for stage in rank_memory(load(name), 8)) < 0.6 * 80e9


@pytest.mark.parametrize("size", SCALE)
def test_the_recipes_beyond_the_paper_are_the_shapes_they_say(size: str) -> None:
    llama, itt = load(f"scale/{size}_llama"), load(f"scale/{size}_itt_x4")
    for config in (llama, itt):
        assert round(count_parameters(config.model, config.thinking).base / 1e6, 2) == SCALE[size]
    assert (llama.thinking.kind, itt.thinking.kind, itt.thinking.capacity) == ("none", "itt", (0.5, 0.5, 0.5))
    differing = {"thinking": itt.thinking, "validation": itt.validation, "logging": itt.logging}
    assert replace(llama, **differing) == itt  # what a comparison of the two compares


@pytest.mark.parametrize("world_size", [32, 64])
@pytest.mark.parametrize("name", [f"scale/{size}_{kind}" for size in SCALE for kind in ("llama", "itt_x4")])
def test_the_recipes_beyond_the_paper_fit_gpus_of_40_gb_in_balance(name: str, world_size: int) -> None:
    config = load(name)
    assert max(stage.total for stage in rank_memory(config, world_size)) < 0.7 * 40e9
    assert cut_pipeline(config).imbalance < 1.15


def test_the_recipes_beyond_the_paper_keep_their_published_budgets() -> None:
    tokens = {size: load(f"scale/{size}_llama") for size in SCALE}
    trained = {size: config.schedule.steps * config.tokens_per_step for size, config in tokens.items()}
    assert trained == {"1b3": pytest.approx(300e9, rel=0.001), "7b": pytest.approx(1e12, rel=0.001)}


@pytest.mark.parametrize("name", RETROFIT)
def test_the_recipes_for_pretrained_models_are_their_shapes_and_train_layers_that_think_apart(name: str) -> None:
    config = load(f"retrofit/{name}")
    num_layers = config.model.num_layers
    layers = config.thinking.layer_indices(num_layers)
    assert round(count_parameters(config.model, config.thinking).base / 1e6, 2) == RETROFIT[name]
    assert num_layers // 4 <= layers[0] <= layers[-1] < num_layers - num_layers // 4
    weights = config.optimizer.groups[2:]  # after routers and step encodings
    for layer_idx in range(num_layers):
        weight = f"decoder.layers.{layer_idx}.mlp.linear_fc1.weight"
        assert sum(match_group(group, weight) for group in weights) == (layer_idx in layers)
        assert not any(match_group(group, f"decoder.layers.{layer_idx}.thinking.router") for group in weights)
    assert config.thinking.step_init == 0.0 and config.thinking.ramp_steps == config.schedule.steps / 4
    assert config.schedule.steps * config.tokens_per_step == 65_536_000


def test_the_control_of_a_recipe_for_a_pretrained_model_differs_in_thinking_alone() -> None:
    itt, control = load("retrofit/smollm2_135m"), load("retrofit/smollm2_135m_llama")
    assert control.thinking == ThinkingConfig()
    optimizer = replace(itt.optimizer, groups=())
    assert replace(itt, thinking=control.thinking, optimizer=optimizer, logging=control.logging) == control

"""What is compared with what, and recipes that cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.benchmark.shapes import (
    BASE,
    SHAPES,
    STOCK,
    choose_models,
    compared_models,
    load_shape,
    random_batches,
)
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe


def test_the_models_have_the_capacities_that_the_paper_implies() -> None:
    models = compared_models(tiny_recipe(parallel={"tensor": 2}))
    capacities = {name: config.thinking.nominal_capacity for name, config in models.items()}
    assert capacities[BASE] == capacities[STOCK] == ()
    assert capacities["ITT x2"] == capacities["ITT x2, selected"] == (0.9,)
    assert capacities["ITT x3"] == (0.7, 0.7)
    assert capacities["ITT x4"] == (0.5, 0.5, 0.5)
    assert capacities["Loop x4"] == (1.0, 1.0, 1.0)
    assert {name for name, config in models.items() if config.thinking.attend == "selected"} == {
        name for name in models if name.endswith("selected")
    }
    assert all(config.parallel.tensor == 1 for config in models.values())


def test_llama_is_always_among_the_models() -> None:
    assert list(choose_models(tiny_recipe(), ["ITT x3"])) == [BASE, "ITT x3"]
    with pytest.raises(ConfigError, match=r"no model 'ITT x9' to compare; choose from: LLaMA; stock"):
        choose_models(tiny_recipe(), ["ITT x9"])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_paper_are_cut_on_cpus_and_whole_on_gpus(name: str) -> None:
    small, whole = (load_shape(name, [], device=device) for device in ("cpu", "cuda"))
    assert small.config.model.hidden_size == whole.config.model.hidden_size
    assert small.config.model.seq_length == whole.config.model.seq_length
    assert whole.cut == ""
    if name != "tiny":
        assert small.cut == "cut: 2 of 8 layers, 8000 of 32000 tokens of the vocabulary"
        assert small.describe().endswith(f"({small.cut})")
        # The head keeps its share of the work.
        ratios = [shape.config.model.vocab_size / shape.config.model.num_layers for shape in (small, whole)]
        assert ratios[0] == ratios[1]


def test_overrides_have_the_last_word() -> None:
    shape = load_shape("162m", ["model.num_layers=4", "batch.global=2"], device="cpu")
    assert (shape.config.model.num_layers, shape.config.batch.global_size) == (4, 2)


def test_a_shape_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"999m is neither a shape \(162m, 230m, 466m, tiny\) nor a recipe's path"):
        load_shape("999m", [], device="cpu")


def test_a_recipe_without_thinking_steps_is_refused() -> None:
    recipe = Path(__file__).parents[3] / "recipes" / "162m" / "llama.yaml"
    with pytest.raises(ConfigError, match=r"llama.yaml: thinking.kind is none; give the recipe of an ITT"):
        load_shape(str(recipe), [], device="cpu")


def test_random_batches_depend_on_the_seed_alone() -> None:
    config = tiny_recipe()
    first, again, other = (random_batches(config, 2, seed=seed) for seed in (1, 1, 2))
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(first, again, strict=True))
    assert not (first[0]["tokens"] == other[0]["tokens"]).all()
    assert (first[0]["tokens"][:, 1:] == first[0]["labels"][:, :-1]).all()

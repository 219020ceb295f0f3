"""Recipe loading: merging, overrides, and one clear message for all problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_itt.config import dump_config, load_config, parse_config
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe


def write(folder: Path, name: str, data: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def plain() -> dict[str, Any]:
    return dump_config(tiny_recipe())


def test_a_child_replaces_single_keys_of_its_base(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", plain())
    child = write(tmp_path, "child.yaml", {"base": "base.yaml", "schedule": {"steps": 77}})
    config = load_config(child)
    assert config.schedule.steps == 77
    assert config.schedule.warmup_steps == 1
    assert config.model.hidden_size == 32


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    config = load_config(path, ["optimizer.learning_rate=3e-4", "thinking.capacity=[0.5]", "batch.global=8"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.thinking.capacity == (0.5,)
    assert config.batch.global_size == 8


def test_the_printed_config_is_the_config(tmp_path: Path) -> None:
    config = tiny_recipe()
    path = tmp_path / "printed.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("thinking.capcity=[0.5]", ["thinking.capcity", "did you mean thinking.capacity?"]),
        ("thinkin.kind=itt", ["unknown key thinkin", "did you mean thinking?"]),
        (
            "optimizer.groups=[{match: x, learn_rate: 1}]",
            ["optimizer.groups.0.learn_rate", "optimizer.groups.0.learning_rate?"],
        ),
        ("data.blend.a={weigth: 1, weight: 1}", ["data.blend.a.weigth", "did you mean data.blend.a.weight?"]),
        ("thinking.capacity=[1.4]", ["thinking.capacity.0", "1.4", "less than or equal to 1"]),
        ("thinking.capacity=[0.0]", ["thinking.capacity.0", "greater than 0"]),
        ("thinking.capacity=[0.01]", ["rounds to zero", "0.01"]),
        ("thinking.alpha=.nan", ["thinking.alpha is NaN", "finite number"]),
        ("thinking.alpha=[1.0, .nan, 1.0]", ["thinking.alpha.1 is NaN", "finite number"]),
        ("thinking.step_init=.inf", ["thinking.step_init is Infinity", "finite number"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate is Infinity", "finite number"]),
        ("validation.budgets=[[0.5, .nan, 0.5]]", ["validation.budgets.0.1 is NaN", "finite number"]),
        ("thinking.layers=[1, 9]", ["contains 9", "num_layers is 4", "0 to 3"]),
        ("thinking.layers=[1, 1]", ["contains 1 twice"]),
        ("thinking.alpha=[1.0]", ["thinking.alpha has 1 values", "3 routed steps"]),
        ("thinking.kind=loop", ["thinking.kind is loop", "use 1.0"]),
        ("thinking.kind=none", ["thinking.capacity", "kind is none"]),
        ("model.hidden_size=big", ["model.hidden_size", "big", "valid integer"]),
        ("model.hidden_size=true", ["model.hidden_size", "true", "valid integer"]),
        ("model.num_query_groups=3", ["num_query_groups is 3", "num_attention_heads = 4"]),
        ("schedule.steps=1.5", ["schedule.steps", "1.5"]),
        ("parallel.tensor=3", ["parallel.tensor is 3", "does not divide"]),
        ("parallel.tensor=4", ["parallel.tensor is 4", "num_query_groups = 2"]),
        ("parallel.sequence=true", ["parallel.sequence is true", "parallel.tensor is 1"]),
        ("parallel.pipeline=5", ["num_layers is 4", "= 5"]),
        ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline is 2", "parallel.pipeline is 1"]),
        ("validation.budgets=[[0.5]]", ["validation.budgets[0] has 1 entries", "3 routed steps"]),
        ("precision.parts=best", ["precision.parts", "best", "'auto', 'native', 'transformer_engine' or 'apex'"]),
        ("nonsense", ["section.key=value"]),
        ("schedule=5", ["section.key=value"]),
    ],
)
def test_bad_settings_are_named_with_the_rule(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["parallel.tensor=2", "parallel.sequence=true", "model.seq_length=25"],
            ["model.seq_length is 25", "parallel.tensor = 2 does not divide", "splits the sequence evenly"],
        ),
        (["parallel.tensor=3"], ["does not divide model.num_attention_heads = 4"]),
        (["parallel.tensor=4"], ["does not divide model.num_query_groups = 2"]),
        (["parallel.pipeline=4", "parallel.virtual_pipeline=2"], ["num_layers is 4, fewer than", "= 8"]),
        (["thinking.capacity={sample: [0.01, 0.5]}"], ["thinking.capacity contains 0.01", "rounds to zero"]),
        (["thinking.capacity={sample: [0.9, 0.5]}"], ["[0.9, 0.5]", "the lower capacity comes first"]),
        (["validation.budgets=[[0.5, 0.01, 0.5]]"], ["validation.budgets[0] contains 0.01", "rounds to zero"]),
        (
            ["thinking.residual=replace", "thinking.update=delta"],
            ["thinking.update is delta", "thinking.residual is replace", "set it to full"],
        ),
        (
            ["thinking.routing=none", "thinking.attend=selected"],
            ["thinking.attend is selected", "thinking.routing is none", "set it to all"],
        ),
        (["thinking.skip=literal", "thinking.reweight=symmetric"], ["skip is literal", "reweight is symmetric"]),
        (["thinking.layers=[]"], ["thinking.layers is []", "name at least one layer"]),
        (
            ["thinking.residual=replace", "validation.budgets=[[0.5, 0.0, 0.5]]"],
            ["validation.budgets[0] contains 0", "thinking.residual is replace", "use budgets above 0"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_the_rule(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    for part in parts:
        assert part in str(caught.value)


def test_a_wrong_value_does_not_hide_broken_rules_of_other_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["thinking.capacity=[0, 0.5, 0.5]", "parallel.tensor=3", "validation.budgets=[[0.01]]"])
    message = str(caught.value)
    for part in ("thinking.capacity.0 is 0", "does not divide model.num_attention_heads", "budgets[0] contains 0.01"):
        assert part in message
    assert "routed steps" not in message  # the capacity is not known


@pytest.mark.parametrize("override", ["model.num_layers=many", "schedule.steps=0", "logging.run_dir=7", "data.blend=7"])
def test_rules_leave_out_sections_that_could_not_be_read(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override, "batch.micro=3"])
    key = override.partition("=")[0]
    assert str(caught.value).startswith(f"{path}: {key} is ")
    assert str(caught.value).count("; ") == 1
    assert str(caught.value).endswith("batch.global is 4, not a multiple of batch.micro = 3")


def test_problems_of_the_layout_are_reported_with_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    overrides = ["parallel.tensor=2", "schedule.warmup_steps=999", "thinking.gate=relu"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=3)
    for part in ("thinking.gate is", "warmup_steps is 999", "the world size is 3", "multiple of 2 processes"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"batch\.micro is") as caught:
        load_config(path, ["batch.micro=0"], world_size=3)
    assert "batch.global" not in str(caught.value)
    assert load_config(path, ["parallel.tensor=2"], world_size="fewest").parallel.tensor == 2
    with pytest.raises(ConfigError, match="the interleaved schedule"):
        interleaved = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global=6"]
        load_config(path, interleaved, world_size="fewest")


def test_everything_wrong_with_a_layout_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    overrides = ["parallel.tensor=3", "parallel.sequence=true", "parallel.virtual_pipeline=5", "model.seq_length=25"]
    switches = ["thinking.layers=[1, 1]", "thinking.capacity=[0.001]", "thinking.skip=literal"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*overrides, *switches, "thinking.reweight=symmetric"])
    expected = [
        "model.num_attention_heads = 4",
        "model.num_query_groups = 2",
        "interleaving needs at least 2 stages",
        "fewer than parallel.pipeline * parallel.virtual_pipeline = 5",
        "splits the sequence evenly",
        "contains 1 twice",
        "rounds to zero",
        "choose one",
    ]
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "parallel.context=2",
            ["parallel.context is 2", "selected over the whole sequence", "parallel.sequence: true"],
        ),
        ("parallel.context_parallel_size=4", ["parallel.context_parallel_size is 4", "context parallelism"]),
        ("parallel.expert=2", ["parallel.expert is 2", "mixture-of-experts", "remove it"]),
        ("model.num_experts=8", ["model.num_experts is 8", "mixture-of-experts", "remove it"]),
        ("model.moe_router_topk=2", ["model.moe_router_topk is 2", "mixture-of-experts"]),
        ("precision.fp8=true", ["precision.fp8 is true", "fp8 is not supported", "use precision.dtype: bf16"]),
        ("precision.dtype=fp8", ['precision.dtype is "fp8"', "fp8 is not supported", "use precision.dtype: bf16"]),
        ("precision.dtype=fp16", ['precision.dtype is "fp16"', "loss scaling", "use bf16"]),
        ("precision.dtype=fp64", ['precision.dtype is "fp64"', "'bf16' or 'fp32'"]),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message and "unknown key" not in message
    for part in parts:
        assert part in message


def test_refused_and_unknown_keys_are_listed_with_the_broken_rules(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    overrides = ["parallel.context=2", "model.num_experts=8", "thinking.capcity=[0.5]", "parallel.tensor=3"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*overrides, "thinking.layers=[9]"])
    for part in (
        "context parallelism",
        "mixture-of-experts",
        "thinking.capacity?",
        "parallel.tensor is 3",
        "contains 9",
    ):
        assert part in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe.yaml", plain())
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["thinking.layers=[9, 9]", "parallel.sequence=true", "schedule.warmup_steps=99"])
    for part in ("contains 9", "twice", "parallel.sequence", "warmup_steps"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [("- a list", "mapping of sections"), ("model: 5", "section must be a mapping"), ("a: [", "not valid YAML")],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=part):
        load_config(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    child = write(tmp_path, "child.yaml", {"base": "absent.yaml"})
    with pytest.raises(ConfigError, match=r"child.yaml: base is 'absent.yaml', but .*/absent.yaml does not exist"):
        load_config(child)


def test_a_chain_of_bases_is_as_long_as_one_likes(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, "0.yaml", plain())
    for number in range(1, 12):
        folder, above = ("deep/", "../") if number % 2 else ("", "deep/")
        base = f"{above}{number - 1}.yaml"
        write(tmp_path, f"{folder}{number}.yaml", {"base": base, "schedule": {"steps": number}})
    child = write(tmp_path, "child.yaml", {"base": "deep/11.yaml", "batch": {"micro": 2}})
    config = load_config(child)
    assert config.schedule.steps == 11
    assert config.batch.micro == 2
    assert config.model == parse_config(plain()).model


def test_recipes_of_the_project_can_be_based_on_any_other(tmp_path: Path) -> None:
    parent = Path(__file__).parents[3] / "recipes" / "466m" / "itt_x4.yaml"
    child = write(tmp_path, "child.yaml", {"base": str(parent), "schedule": {"steps": 3000}})
    assert load_config(child) == load_config(parent, ["schedule.steps=3000"])


@pytest.mark.parametrize(("base", "part"), [("child.yaml", "is its own base"), (7, "base is 7"), (["a"], "base is ")])
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, base: object, part: str) -> None:
    child = write(tmp_path, "child.yaml", {"base": "middle.yaml"})
    write(tmp_path, "middle.yaml", {"base": base})
    with pytest.raises(ConfigError, match=part):
        load_config(child)


def test_a_layout_that_does_not_fit_says_where_the_world_size_was_read(tmp_path: Path) -> None:
    recipe = write(tmp_path, "recipe.yaml", plain())
    for overrides in (["parallel.tensor=2"], ["batch.global=4"]):
        with pytest.raises(ConfigError, match=r"world size is 3.*SLURM_NTASKS"):
            load_config(recipe, overrides, world_size=3, world_size_from="SLURM_NTASKS")

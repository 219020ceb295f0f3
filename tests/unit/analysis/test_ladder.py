"""The fit of the law to runs made up from a known law, the crossovers that follow, and what is said of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_itt.accounting.law import (
    FittedLaw,
    Law,
    Shape,
    crossovers,
    format_predictions,
    loss_differences,
    pay_off_line,
    predict,
    read_law,
    shape_of,
    shipped_law,
)
from megatron_itt.analysis.figures import draw_measurement
from megatron_itt.analysis.ladder import (
    Point,
    collect_ladder,
    difference_rows,
    fit_ladder,
    ladder_markdown,
    measure_ladder,
)
from megatron_itt.cli import run
from megatron_itt.config import load_config
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError, DataError

LAW = Law(E=1.2, A=12.0, a=0.33, B=60.0, b=0.35, phi=0.45)


def shape(variant: str, hidden: int) -> Shape:
    wider = round(1.3 * hidden / 4) * 4 if variant == "llama_wide" else hidden
    settings = [f"model.hidden_size={wider}", f"model.ffn_hidden_size={3 * wider}"]
    return shape_of(load_config(f"recipes/ladder/{variant.removesuffix('_wide')}.yaml", settings))


def made_up_runs(law: Law, noise: float, *, seeds: int = 3) -> list[Point]:
    random, points = np.random.default_rng(0), []
    for size, hidden in {"small": 20, "large": 40}.items():
        for variant in ("llama", "itt_x2", "itt_x4", "llama_wide"):
            own = shape(variant, hidden)
            for horizon in (20, 80, 320):
                for equal_to in (None, "itt_x2", "itt_x4") if variant == "llama" else (None,):
                    ratio = shape(equal_to, hidden).total / own.total if equal_to else 1.0
                    tokens = horizon * ratio * shape("llama", hidden).parameters
                    losses = law.loss(own.effective(law.phi), tokens) + noise * random.normal(size=seeds)
                    points += [
                        Point(
                            size=size,
                            variant=variant,
                            seed=seed,
                            horizon=horizon,
                            equal_to=equal_to,
                            shape=own,
                            tokens=int(tokens),
                            loss=float(loss),
                        )
                        for seed, loss in enumerate(losses, start=1)
                    ]
    return points


@pytest.fixture(scope="module")
def fitted() -> FittedLaw:
    return fit_ladder(made_up_runs(LAW, 0.004))


def test_the_fit_finds_the_exponent_of_routed_steps_and_the_crossovers_of_the_law(fitted: FittedLaw) -> None:
    assert fitted.law.phi == pytest.approx(LAW.phi, abs=0.05)
    for variant in ("itt_x2", "itt_x4"):
        own = shape(variant, 40)
        found = predict(fitted, own, 320 * own.parameters)
        true = crossovers(LAW, own)
        assert found[0].crossover == pytest.approx(true[0], rel=0.15)
        assert found[0].crossover_interval[0] <= found[0].crossover <= found[0].crossover_interval[1]
        differences = loss_differences(LAW, own, 320 * own.parameters)
        assert [each.difference for each in found[:2]] == pytest.approx(differences[:2], abs=0.003)


def test_at_the_crossover_both_losses_are_equal() -> None:
    own = shape("itt_x4", 40)
    tokens = crossovers(LAW, own)[0]
    assert loss_differences(LAW, own, tokens)[0] == pytest.approx(0, abs=1e-9)
    assert loss_differences(LAW, own, 2 * tokens)[0] < 0 < loss_differences(LAW, own, tokens / 2)[0]


def test_thinking_that_adds_nothing_never_pays_and_free_thinking_always_does() -> None:
    own = shape("itt_x2", 40)
    assert crossovers(replace(LAW, phi=-0.1), own) == (math.inf, math.inf, math.inf)
    assert crossovers(LAW, replace(own, total=own.llama_flops(1)))[:2] == (0.0, 0.0)


def test_no_llama_of_equal_flops_is_better_than_the_flops_optimal_one() -> None:
    own = shape("itt_x4", 40)
    for ratio in (5, 50, 500):
        more_tokens, larger, optimal = loss_differences(LAW, own, ratio * own.parameters)
        assert optimal >= max(more_tokens, larger) - 1e-4


def test_differences_are_paired_by_seed_with_standard_errors() -> None:
    points = made_up_runs(LAW, 0.0)
    shifted = [replace(point, loss=point.loss + 0.1 * point.seed) for point in points]
    [row] = [
        row
        for row in difference_rows(shifted)
        if (row["size"], row["variant"], row["horizon"]) == ("small", "itt_x4", 80)
    ]
    own = shape("itt_x4", 20)
    expected = loss_differences(LAW, own, 80 * own.parameters)[0]
    assert row["equal_flops"] == pytest.approx(expected, abs=0.003)
    assert row["equal_flops_error"] == pytest.approx(0, abs=1e-9)
    assert row["loss_error"] == pytest.approx(0.1 / math.sqrt(3))


def test_a_switch_has_the_baselines_of_its_flops_and_no_part_in_the_law() -> None:
    points = made_up_runs(LAW, 0.0)
    switched = [
        replace(each, variant="itt_x4_zloss", loss=each.loss - 0.5) for each in points if each.variant == "itt_x4"
    ]
    rows = {(row["size"], row["variant"], row["horizon"]): row for row in difference_rows(points + switched)}
    own, plain = rows["large", "itt_x4_zloss", 80], rows["large", "itt_x4", 80]
    for name in ("equal_tokens", "equal_flops", "wide"):
        assert own[name] == pytest.approx(plain[name] - 0.5)
    assert rows["large", "itt_x2", 80]["wide"] is None, "the larger LLaMA has the FLOPs of x4"
    assert fit_ladder(points + switched).law == fit_ladder(points).law
    assert fit_ladder(points + switched, ["itt_x4_zloss"]).law.phi > fit_ladder(points).law.phi


def test_a_cheaper_switch_is_compared_with_what_lies_between_two_llamas_if_they_are_near() -> None:
    points = made_up_runs(LAW, 0.0)
    x4 = [each for each in points if each.variant == "itt_x4"]
    llama = shape("llama", 40).total
    for price, is_known in (
        (0.5 * (shape("itt_x2", 40).total + shape("itt_x4", 40).total) / llama, True),
        (2.2, False),
    ):
        priced = [replace(each, variant="cheap", shape=replace(each.shape, total=price * llama)) for each in x4]
        rows = {(row["size"], row["variant"], row["horizon"]): row for row in difference_rows(points + priced)}
        found = rows["large", "cheap", 80]["equal_flops"]
        if is_known:
            own = priced[-1].shape
            assert found == pytest.approx(loss_differences(LAW, own, 80 * own.parameters)[0], abs=0.003)
        else:
            assert found is None


def test_runs_that_cannot_determine_the_law_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 sizes and 3 horizons"):
        fit_ladder(
            [
                point
                for point in made_up_runs(LAW, 0.0, seeds=1)
                if point.size == "small" and "wide" not in point.variant
            ]
        )
    with pytest.raises(DataError, match="no finished run"):
        collect_ladder(tmp_path)


def test_finished_run_folders_are_collected(tmp_path: Path) -> None:
    folder = tmp_path / "0.02M" / "itt_x2" / "seed_2" / "80"
    folder.mkdir(parents=True)
    config = load_config("recipes/ladder/itt_x2.yaml", ["schedule.steps=500"])
    (folder / "recipe.yaml").write_text(config_to_yaml(config))
    entries = [
        {"budget": [0.9], "domain": name, "loss": loss, "perplexity": 1.0} for name, loss in (("a", 3.0), ("b", 4.0))
    ]
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 500, "validation": entries}) + "\n")
    with pytest.raises(DataError, match="no finished run"):
        collect_ladder(tmp_path)
    (folder / "finished").write_text("500\n")
    [point] = collect_ladder(tmp_path)
    assert (point.size, point.variant, point.seed, point.horizon, point.equal_to) == ("0.02M", "itt_x2", 2, 80, None)
    assert (point.loss, point.tokens) == (3.5, 500 * config.tokens_per_step)


def test_tables_name_every_baseline_and_the_figure_is_drawn(fitted: FittedLaw, tmp_path: Path) -> None:
    points = made_up_runs(LAW, 0.004)
    page = ladder_markdown(points, fitted)
    for words in ("more tokens (equal FLOPs)", "a larger LLaMA (equal FLOPs and tokens)", "the FLOPs-optimal LLaMA"):
        assert page.count(words) >= 2
    assert "pays from" in page
    switched = [replace(each, variant="itt_x4_zloss") for each in points if each.variant == "itt_x4"]
    draw_measurement(measure_ladder(points + switched, fitted), tmp_path / "ladder.svg")
    figure = (tmp_path / "ladder.svg").read_text()
    assert "itt_x4, large" in figure and ">1,000<" in figure
    assert "itt_x4_zloss" not in figure, "the law is not fitted to it"
    assert "no fit" not in ladder_markdown(points, None)


def test_predictions_say_how_far_they_are_extrapolated(fitted: FittedLaw, tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(fitted.as_json()))
    assert read_law(path) == fitted
    large = format_predictions(fitted, load_config("162m/itt_x4"))
    assert "Extrapolated" in large
    assert "times above in parameters" in large
    inside = format_predictions(fitted, load_config("recipes/ladder/itt_x4.yaml", ["schedule.steps=3000"]))
    assert "Inside the range" in inside
    path.write_text("{}")
    with pytest.raises(DataError, match="make it again with itt study fit"):
        read_law(path)
    with pytest.raises(ConfigError, match="has thinking"):
        run(["study", "predict", "162m/llama"])


def test_each_kind_of_routed_step_has_the_law_that_was_fitted_to_it() -> None:
    for reuse, variant in (("layer", "itt_x4"), ("attention", "itt_x4_attention")):
        config = load_config("162m/itt_x4", [f"thinking.reuse={reuse}"])
        law = read_law(shipped_law(config.thinking))
        assert law is not None and variant in law.variants
        line = pay_off_line(config)
        first = predict(law, shape_of(config), float(config.tokens_after(config.schedule.steps)))[0]
        assert line is not None and f"{first.difference:+.3f} nats" in line


def test_a_recipe_without_thinking_has_no_verdict() -> None:
    assert pay_off_line(load_config("162m/llama")) is None

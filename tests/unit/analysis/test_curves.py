"""Runs side by side: what they have cost at a point, when one reaches another's loss, and which do not compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.accounting.flops import forward_flops, paper_flops
from megatron_itt.analysis.curves import measure_curves, measure_scaling, tokens_to_reach
from megatron_itt.analysis.routing import measure_router_history
from megatron_itt.analysis.runs import read_run
from megatron_itt.config.load import parse_config
from megatron_itt.errors import DataError
from tests.unit.analysis.runs import real_recipe, routing_line, run_lines, training_line, validation_line, write_run


def curve(name: str, losses: list[float]) -> dict[str, Any]:
    points = [
        {"step": 10 * n, "tokens": 1000.0 * n, "flops": 5e6 * n, "paper_flops": 6e6 * n, "loss": loss}
        for n, loss in enumerate(losses)
    ]
    return {"name": name, "validation": points}


def test_the_way_to_the_baselines_loss_is_a_straight_line_between_validations() -> None:
    baseline = curve("llama", [6.0, 5.0, 4.5, 4.2, 4.0])
    reached = tokens_to_reach(curve("itt", [6.0, 4.4, 3.6, 3.5, 3.4]), baseline)
    assert reached["tokens"] == pytest.approx(1500.0)  # half way from 4.4 to 3.6
    assert reached["tokens_share"] == pytest.approx(0.375)
    assert reached["flops_share"] == pytest.approx(0.375)
    assert tokens_to_reach(curve("loop", [6.0, 5.5, 5.0]), baseline)["tokens"] is None


def test_costs_are_those_of_the_recipes_accounting(tmp_path: Path) -> None:
    recipe = real_recipe("itt")
    run = write_run(tmp_path / "itt", recipe=recipe)
    (measured,) = measure_curves([run]).values["runs"]
    config = parse_config(recipe)
    last = measured["validation"][-1]
    assert last["step"] == 20
    assert last["tokens"] == 20 * 8 * 125
    assert last["flops"] == pytest.approx(20 * 8 * 3 * forward_flops(config.model, config.thinking).total)
    assert last["paper_flops"] == pytest.approx(20 * 8 * 3 * paper_flops(config.model, config.thinking))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data": {"tokenizer": "other", "blend": {"code": {"path": "data/code", "weight": 1.0}}}}, "data.tokenizer"),
        ({"data": {"tokenizer": "tok", "blend": {"code": {"path": "else", "weight": 1.0}}}}, "data.blend"),
        ({"validation": {"tokens": 7}}, "validation.tokens"),
    ],
)
def test_runs_on_other_text_or_another_tokenizer_are_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    one = write_run(tmp_path / "one", recipe=real_recipe("none"))
    two = write_run(tmp_path / "two", recipe={**real_recipe("itt"), **change})
    for measure in (measure_curves, measure_scaling):
        with pytest.raises(DataError, match=key) as caught:
            measure([one, two])
        assert "one" in str(caught.value) and "two" in str(caught.value)


def test_weights_of_a_blend_compare_by_their_proportions(tmp_path: Path) -> None:
    blends = [{name: {"path": name, "weight": scale * weight} for name, weight in (("a", 1.0), ("b", 3.0))}
              for scale in (1.0, 0.25)]  # fmt: skip
    runs = [write_run(tmp_path / str(n), recipe=real_recipe("none", blend=blend)) for n, blend in enumerate(blends)]
    assert len(measure_curves(runs).values["runs"]) == 2


def test_a_run_with_nan_or_without_metrics_is_told_and_the_others_are_still_there(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", recipe=real_recipe("none"))
    broken_lines = [training_line(1), training_line(2, loss=math.nan), validation_line(2)]
    broken_lines[2]["validation"][0]["loss"] = math.inf
    broken = write_run(tmp_path / "broken", broken_lines, recipe=real_recipe("itt"))
    empty = write_run(tmp_path / "empty", [], recipe=real_recipe("loop"))
    (empty / "metrics.jsonl").unlink()
    measured = measure_curves([good, broken, empty])
    assert [run["name"] for run in measured.values["runs"]] == ["good", "broken"]
    told = " ".join(measured.notes)
    assert "broken: Training loss is not a finite number at 1 logged step(s), first at step 2" in told
    assert "empty: metrics.jsonl is missing" in told
    assert "empty is left out" in told
    assert all(math.isfinite(point["loss"]) for run in measured.values["runs"] for point in run["training"])


def test_a_baseline_without_validation_is_told(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", [training_line(1), training_line(2)], recipe=real_recipe("none"))
    other = write_run(tmp_path / "other", recipe=real_recipe("itt"))
    measured = measure_curves([other, base], baseline=base)
    assert measured.values["reach"] == []
    assert any("baseline base has no validation loss" in note for note in measured.notes)


def test_what_cannot_be_compared_at_all_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", recipe=real_recipe("none"))
    bare = write_run(tmp_path / "bare", [], recipe=real_recipe("none"))
    with pytest.raises(DataError, match="twice"):
        measure_curves([run, run])
    with pytest.raises(DataError, match="not among the runs"):
        measure_curves([run], baseline=bare)
    with pytest.raises(DataError, match="none of the runs has a loss"):
        measure_curves([bare])
    with pytest.raises(DataError, match="does not exist"):
        measure_curves([tmp_path / "absent"])
    with pytest.raises(DataError, match="one per run"):
        measure_scaling([run], evaluations=[tmp_path, tmp_path])
    with pytest.raises(DataError, match="none of the runs"):
        measure_scaling([bare])


def test_router_history_has_a_series_per_place_and_says_what_is_not_logged(tmp_path: Path) -> None:
    lines = [training_line(1), routing_line(2), routing_line(4)]
    for line in lines[1:]:
        for entry in line["routing"]:
            entry["threshold"] = None  # a share of 1 has none
    measured = measure_router_history(read_run(write_run(tmp_path / "itt", lines, recipe=real_recipe("itt"))))
    shares = {(s["layer"], s["step"]): s["points"] for s in measured.values["series"] if s["quantity"] == "share"}
    assert shares == {(layer, step): [[2.0, 0.5 / step], [4.0, 0.5 / step]] for layer in (1, 3) for step in (1, 2)}
    assert any("no threshold" in note for note in measured.notes)
    with pytest.raises(DataError, match="no routing"):
        measure_router_history(read_run(write_run(tmp_path / "llama", recipe=real_recipe("none"))))


def test_scaling_takes_kind_steps_and_size_from_the_recipe(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / kind, run_lines(), recipe=real_recipe(kind)) for kind in ("none", "loop", "itt")]
    points = measure_scaling(runs).values["points"]
    assert [(point["kind"], point["steps"]) for point in points] == [("none", 1), ("loop", 3), ("itt", 3)]
    assert points[0]["flops"] < points[2]["flops"] < points[1]["flops"]

"""Layout search: legal, within memory, ranked, pasteable; and errors that say what would do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import GPUS
from megatron_itt.accounting.layout import Machine, find_layouts, format_layouts, layout_report, note_order
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.accounting.report import memory_report
from megatron_itt.accounting.step_time import count_kernels, estimate_step, layer_products, product_seconds
from megatron_itt.config import load_config
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

EIGHT_NODES = Machine(num_nodes=8, gpus_per_node=8, gpu=GPUS["a100-80gb"])
ONE_NODE = replace(EIGHT_NODES, num_nodes=1)


def test_the_best_layouts_of_7b_load_as_overrides_and_have_the_memory_that_the_check_counts() -> None:
    report = layout_report(load_config("scale/7b_itt_x4"), EIGHT_NODES)
    assert len(report["layouts"]) == 5
    for row in report["layouts"]:
        config = load_config("scale/7b_itt_x4", row["overrides"].split(), world_size=64)
        counted = memory_report(config, 64)["worst_total"] / 2**30
        assert row["memory_gib"] == pytest.approx(counted, rel=1e-9) and counted < 0.9 * 80
        assert sum(share for _, share in row["limits"]) == pytest.approx(1.0, abs=0.02)
    seconds = [row["step_s"] for row in report["layouts"]]
    assert seconds == sorted(seconds) and report["own"]["number"] > 5
    assert report["layouts"][0]["overrides"] in format_layouts(report)


@pytest.mark.parametrize("recipe", ["162m/itt_x4", "230m/itt_x4", "466m/itt_x4", "162m/llama", "466m/llama"])
def test_the_paper_sizes_are_trained_with_one_of_the_best_layouts(recipe: str) -> None:
    assert layout_report(load_config(recipe), ONE_NODE)["own"]["number"] <= 5


def test_recomputation_saves_memory_and_takes_time() -> None:
    layouts = find_layouts(load_config("162m/itt_x4"), ONE_NODE)
    plain = {
        case.config.thinking.recompute: case
        for case in layouts
        if case.config.batch.micro == 4 and case.config.parallel.tensor * case.config.parallel.pipeline == 1
    }
    modes = [plain[name] for name in ("none", "routed", "layer")]
    assert [case.time.seconds for case in modes] == sorted(case.time.seconds for case in modes)
    assert modes[0].memory_bytes > modes[1].memory_bytes > modes[2].memory_bytes


def test_overlap_hides_gradients_and_weights() -> None:
    overlapping = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
    apart = ["optimizer.overlap_grad_reduce=false", "optimizer.overlap_param_gather=false"]
    first, second = (layout_report(load_config("scale/1b3_itt_x4", o), EIGHT_NODES) for o in (overlapping, apart))
    rows = {row["overrides"]: row for row in second["layouts"]}
    shared = [(row, rows[row["overrides"]]) for row in first["layouts"] if row["overrides"] in rows]
    assert shared
    for hidden, exposed in shared:
        assert exposed["step_s"] - hidden["step_s"] == pytest.approx(hidden["without_overlap_s"])
        assert hidden["without_overlap_s"] > 0 and exposed["without_overlap_s"] == 0


@pytest.mark.parametrize(
    "thinking",
    [
        {"kind": "none", "capacity": []},
        {"kind": "loop", "capacity": [1.0, 1.0]},
        {"attend": "selected"},
        {"reweight": "symmetric"},
        {},
    ],
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_products_have_the_flops_that_are_counted(thinking: dict[str, object], tensor: int) -> None:
    config = tiny_recipe(thinking=thinking, parallel={"tensor": tensor})
    num_thinking = len(config.thinking.layer_indices(config.model.num_layers))
    numbers = {True: num_thinking, False: config.model.num_layers - num_thinking}
    found = sum(
        number * 2 * rows * inner * columns
        for thinks, number in numbers.items()
        for rows, inner, columns in layer_products(config, thinks=thinks)
    )
    counted = forward_flops(config.model, config.thinking).matrices * config.batch.micro
    assert found * tensor == pytest.approx(counted)


def test_a_last_wave_of_tiles_costs_a_whole_one() -> None:
    gpu = GPUS["a100-80gb"]
    full, one_more = (product_seconds((128 * tiles, 4096, 128), gpu) for tiles in (108, 109))
    assert full == pytest.approx(2 * 108 * 128 * 4096 * 128 / gpu.matrix_flops_per_s)
    assert one_more == pytest.approx(2 * full)


def test_calls_add_to_the_work_of_a_processor_and_run_beside_that_of_a_gpu() -> None:
    config, a100 = load_config("162m/itt_x4", ["batch.global=8"]), GPUS["a100-80gb"]

    def seconds(num_multiprocessors: int, launch_s: float) -> float:
        gpu = replace(a100, num_multiprocessors=num_multiprocessors, launch_s=launch_s)
        return estimate_step(config, rank_memory(config, 1), gpu, world_size=1, gpus_per_node=1).seconds

    calls = count_kernels(config) * config.num_microbatches(1)
    assert seconds(0, 1e-5) - seconds(0, 0.0) == pytest.approx(1e-5 * calls)
    assert seconds(108, 1e-9) == seconds(108, 0.0)
    assert seconds(108, 1.0) > 0.99 * calls


def test_layouts_are_spread_from_the_best_to_the_worst() -> None:
    config = load_config("162m/llama")
    layouts = find_layouts(config, ONE_NODE)
    found = [row["step_s"] for row in layout_report(config, ONE_NODE, num_best=3, spread=True)["layouts"]]
    assert found == [layouts[number].time.seconds for number in (0, (len(layouts) - 1) // 2, len(layouts) - 1)]


def test_pairs_in_the_order_of_their_estimates_are_counted_unless_those_are_equal() -> None:
    measured = [(1.0, 1.0, 5.0), (1.01, 0.9, 4.0), (2.0, 1.5, 7.0), (3.0, 1.4, 6.0)]
    rows = [
        {"step_s": step_s, "busy_s": step_s, "measured_s": seconds, "measured_processor_s": work}
        for step_s, seconds, work in measured
    ]
    report = {"layouts": rows}
    note_order(report)
    assert report["order"] == {"time": [4, 5], "work": [4, 5]}
    del rows[0]["measured_processor_s"]  # on GPUs
    note_order(report)
    assert report["order"] == {"time": [4, 5]}


def test_a_model_that_fits_nowhere_names_the_least_that_would_do() -> None:
    config = load_config("scale/7b_itt_x4", ["model.num_layers=96"])
    with pytest.raises(ConfigError, match=r"no layout fits 1 node\(s\) of 8 GPUs with 40.0 GiB") as caught:
        find_layouts(config, replace(ONE_NODE, gpu=GPUS["a100-40gb"]))
    least = re.search(r"the least is ([\d.]+) GiB, with (.*); use more nodes", str(caught.value))
    assert least is not None
    case = load_config("scale/7b_itt_x4", ["model.num_layers=96", *least[2].split()])
    assert memory_report(case, 8)["worst_total"] / 2**30 == pytest.approx(float(least[1]), abs=0.05)


def test_a_batch_that_no_layout_divides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 104 ranks is legal: batch.global is 256"):
        find_layouts(load_config("162m/itt_x4"), Machine(num_nodes=13, gpus_per_node=8, gpu=GPUS["h100"]))

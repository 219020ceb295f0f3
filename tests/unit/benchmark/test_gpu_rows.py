"""Comparisons of the GPU check, on the CPU: replays that are out of date, precisions that disagree, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_itt.benchmark import gpu_kernels, gpu_rows
from megatron_itt.benchmark.gpu_kernels import AttentionCase, attention_rows
from megatron_itt.benchmark.gpu_rows import (
    Pass,
    PassResults,
    capture_graph,
    compare_replays,
    random_tokens,
    training_pass,
)
from megatron_itt.benchmark.isolated import Row
from megatron_itt.benchmark.shapes import on_one_rank
from megatron_itt.config import RunConfig
from megatron_itt.model import attention
from megatron_itt.parallel.groups import start_parallel, stop_parallel
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.waiting import WatchOperations

CPU = torch.device("cpu")
CONFIGS = {
    attend: on_one_rank(tiny_recipe(), replace(tiny_recipe().thinking, attend=attend)) for attend in ("all", "selected")
}


def overwriting(function: Pass) -> Pass:
    """Like a graph: every replay overwrites the results of the one before."""
    results = function()

    def replay() -> PassResults:
        new = function()
        results.logits.copy_(new.logits)
        for own, other in zip(results.gradients + results.selected, new.gradients + new.selected, strict=True):
            own.copy_(other)
        return results

    return replay


def frozen(function: Pass) -> Pass:
    """A graph that ignores the tokens that it is given."""
    results = function()
    return lambda: results


def with_frozen_selection(function: Pass) -> Pass:
    selected = function().selected
    return lambda: replace(function(), selected=selected)


def with_a_frozen_gradient(function: Pass) -> Pass:
    """Freeze a small parameter's gradient, which is negligible in the norm of all."""
    first = function().gradients
    smallest = min(range(len(first)), key=lambda index: float(first[index].norm()))

    def replay() -> PassResults:
        results = function()
        results.gradients[smallest] = first[smallest]
        return results

    return replay


def with_nan(function: Pass) -> Pass:
    def replay() -> PassResults:
        results = function()
        results.gradients[-1] = results.gradients[-1] * float("nan")
        return results

    return replay


def compare(config: RunConfig, capture: Callable[[Pass], Pass]) -> Row:
    start_parallel(config, process=ONE_PROCESS)
    try:
        return compare_replays(config, random_tokens(config, seed=0), torch.float32, capture)
    finally:
        stop_parallel()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_replay_that_computes_anew_agrees_exactly(config: RunConfig) -> None:
    row = compare(config, overwriting)
    assert (row["difference"], row["selected"], row["agrees"]) == (0.0, 0.0, True)
    assert row["time_ratio"] > 0


@pytest.mark.parametrize("capture", [frozen, with_frozen_selection, with_a_frozen_gradient, with_nan])
def test_a_replay_that_is_out_of_date_disagrees(capture: Callable[[Pass], Pass]) -> None:
    assert compare(CONFIGS["all"], capture)["agrees"] is False


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_captured_pass_does_not_synchronize_and_has_fixed_shapes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the embedding to the last gradient: host synchronization or a data-dependent shape ends a capture."""
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: None)  # the CPU form reads data
    start_parallel(config, process=ONE_PROCESS)
    try:
        tokens = torch.zeros(2, config.model.seq_length + 1, dtype=torch.long)
        run = training_pass(config, tokens, dtype=torch.float32)
        seen = []
        for seed in (0, 1, 2):
            tokens.random_(config.model.vocab_size, generator=torch.Generator().manual_seed(seed))
            with WatchOperations() as watch:
                run()
            seen.append(watch)
    finally:
        stop_parallel()
    assert [watch.waiting for watch in seen[1:]] == [[], []]
    assert seen[1].shapes == seen[2].shapes
    assert len(seen[1].shapes) > 500  # the whole model, backward included


def test_precisions_agree_within_the_tolerances_and_a_wrong_one_is_a_marked_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = list(gpu_rows.precision_rows(tiny_recipe(), CPU))
    assert [row["attend"] for row in rows] == ["all", "selected"] and all(row["agrees"] for row in rows)
    monkeypatch.setattr(gpu_rows, "MAX_PRECISION_DIFFERENCE", {"logits": 1e-6})
    assert next(gpu_rows.precision_rows(tiny_recipe(), CPU))["agrees"] is False


def test_a_kernel_that_is_wrong_is_a_marked_row_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = gpu_kernels.attention_kernels(CPU)
    wrong = {"wrong": lambda q, k, v, positions: 1.5 * kernels["blocked"](q, k, v, positions), **kernels}
    monkeypatch.setattr(gpu_kernels, "attention_kernels", lambda device: wrong)
    case = AttentionCase("tiny", tiny_recipe().model, 0.5, 2)
    rows = list(attention_rows([case], torch.bfloat16, CPU))
    assert {row["kernel"]: row.get("agrees") for row in rows} == {
        "wrong": False,
        "blocked": True,
        "SDPA, dense mask": None,
        "SDPA, causal over all tokens": None,
    }
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_graph_computes_what_the_eager_pass_does(config: RunConfig) -> None:
    on_gpu = replace(config, runtime=replace(config.runtime, device="cuda"))
    start_parallel(on_gpu, process=ONE_PROCESS)
    try:
        tokens = random_tokens(on_gpu, seed=0).to("cuda")
        assert compare_replays(on_gpu, tokens, torch.float32, capture_graph)["agrees"]
    finally:
        stop_parallel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu_agree_with_plain_pytorch(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    model = replace(tiny_recipe().model, num_attention_heads=4, num_query_groups=2, seq_length=200)
    cases = [AttentionCase("a", replace(model, hidden_size=4 * size), 0.48, 2) for size in (32, 48, 64, 128)]
    rows = [*attention_rows(cases, dtype, device), *gpu_kernels.row_kernel_rows({"tiny": model}, dtype, device)]
    assert [row for row in rows if "error" in row or row.get("agrees") is False] == []

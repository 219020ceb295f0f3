"""Replayed graphs against eager passes: the comparison itself, with stand-ins for the capture where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_itt.benchmark import graphs
from megatron_itt.benchmark.graphs import (
    GraphReport,
    capture_graph,
    compare_replays,
    describe_difference,
    graph_cases,
    graphs_section,
)
from megatron_itt.benchmark.passes import Pass, PassResults, training_pass
from megatron_itt.config import RunConfig
from megatron_itt.errors import EvaluationError
from megatron_itt.model import attention
from megatron_itt.parallel.groups import start_parallel, stop_parallel
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.waiting import WatchOperations

CPU = torch.device("cpu")
CASES = graph_cases({"tiny": tiny_recipe(thinking={"recompute": "layer"})}, "native")


def overwriting(function: Pass) -> Pass:
    """As a graph does: every replay writes its results over the last one's."""
    results = function()

    def replay() -> PassResults:
        new = function()
        results.logits.copy_(new.logits)
        for own, other in zip(results.gradients + results.picks, new.gradients + new.picks, strict=True):
            own.copy_(other)
        return results

    return replay


def compare(config: RunConfig, capture: graphs.Capture) -> GraphReport:
    return compare_replays("tiny", config, CPU, dtype=torch.float32, capture=capture)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_capture_that_computes_anew_agrees_exactly(config: RunConfig) -> None:
    report = compare(config, overwriting)
    assert report.agrees and report.time_ratio > 0
    assert (report.logit_difference, report.gradient_difference, report.same_picks) == (0.0, 0.0, 1.0)


def test_both_kinds_of_attention_are_captured_without_recomputation() -> None:
    assert list(CASES) == ["tiny, attend all", "tiny, attend selected"]
    assert [config.thinking.attend for config in CASES.values()] == ["all", "selected"]
    assert {config.thinking.recompute for config in CASES.values()} == {"none"}


def frozen(function: Pass) -> Pass:
    """A graph that does not read the tokens it is given."""
    results = function()
    return lambda: results


def with_frozen_picks(function: Pass) -> Pass:
    picks = function().picks
    return lambda: replace(function(), picks=picks)


def with_a_frozen_gradient(function: Pass) -> Pass:
    """Of one small parameter, which is nothing beside the norm of all."""
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


@pytest.mark.parametrize("capture", [frozen, with_frozen_picks, with_a_frozen_gradient, with_nan])
def test_a_replay_that_is_out_of_date_disagrees(capture: graphs.Capture) -> None:
    report = compare(CASES["tiny, attend all"], capture)
    assert not report.agrees
    assert "tiny, float32: a replayed graph differs from the eager pass by" in describe_difference(report)


def test_without_a_gpu_the_section_says_so() -> None:
    section = graphs_section({"tiny": tiny_recipe()}, CPU, parts="native")
    assert section.rows == [] and section.notes == ("CUDA graphs need a GPU; nothing was captured.",)


def test_a_wrong_replay_is_the_sections_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = compare(CASES["tiny, attend all"], frozen)
    monkeypatch.setattr(graphs, "compare_replays", lambda *args, **keys: wrong)
    with pytest.raises(EvaluationError, match="are expected"):
        graphs_section({"tiny": tiny_recipe()}, torch.device("cuda", 0), parts="native")
    right = replace(wrong, logit_difference=0.0, gradient_difference=0.0, same_picks=1.0)
    monkeypatch.setattr(graphs, "compare_replays", lambda *args, **keys: right)
    section = graphs_section({"tiny": tiny_recipe()}, torch.device("cuda", 0), parts="native")
    assert len(section.rows) == 4 and "| 100.0% |" in section.table


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_captured_pass_waits_for_nothing_and_has_fixed_shapes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the embedding to the last gradient: a host that waits, or a shape that data decides, ends a capture."""
    monkeypatch.setattr(attention, "find_gathered_attention", lambda query: None)  # the form for CPUs reads data
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


@pytest.mark.gpu
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_graph_computes_what_the_eager_pass_does(config: RunConfig) -> None:
    device = torch.device("cuda", 0)
    on_gpu = replace(config, runtime=replace(config.runtime, device="cuda"))
    report = compare_replays("tiny", on_gpu, device, dtype=torch.float32, capture=capture_graph)
    assert report.agrees, describe_difference(report)

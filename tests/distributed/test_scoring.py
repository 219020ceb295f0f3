"""Continuations of evaluation tasks score alike under every layout, and as the logits of one rank say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.training.scoring import Continuation, Score
from tests.helpers.float64 import build_in_float64, float64_is_float32
from tests.helpers.launch import run_ranks
from tests.helpers.leaving import free_left_trainers
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import microbatches

LENGTHS = (25, 2, 9, 9, 24, 17, 3, 12, 20, 5, 25)  # of the texts; the context has 24 tokens
BUDGET = (0.5, 0.25, 1.0)
TWO_RANKS = [
    {},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
]
FOUR_RANKS = [{"tensor": 2, "sequence": True}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]


def _config(parallel: dict[str, Any]) -> Any:
    config = tiny_recipe(parallel=parallel, batch={"global": 8, "micro": 1}, thinking={"capacity": list(BUDGET)})
    return replace(config, optimizer=replace(config.optimizer, overlap_grad_reduce=True, overlap_param_gather=True))


def observe_scores(place: ProcessInfo, config: Any, requests: list[Continuation]) -> list[Any]:
    """Train one step, for thresholds; then score. On one rank alone, the logits of every text as well."""
    from megatron_itt.model.builder import forward_logits
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.scoring import score_continuations
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    place_in_job = start_parallel(config, process=place)
    try:
        with float64_is_float32():
            trainer = build_trainer(config, place_in_job, build=build_in_float64)
            train_step(trainer, iter(microbatches(trainer, 0)), 1)
            scores = score_continuations(trainer, requests, budget=BUDGET, routing="threshold")
            if place.world_size > 1:
                return [scores]
            trainer.gather_weights()
            tokens = [torch.tensor([request.tokens[:-1]]) for request in requests]
            return [
                scores,
                [forward_logits(trainer.built, each, thinking_budget=BUDGET, routing="threshold") for each in tokens],
            ]
    finally:
        stop_parallel()


@pytest.fixture(scope="module")
def scored() -> tuple[list[Continuation], list[Score]]:
    """Texts of which every second ends as greedy decoding would end it; and their scores on one rank."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    requests = [Continuation(text, min(len(text) - 1, 1 + index % 3)) for index, text in enumerate(texts)]
    _, logits = observe_scores(ONE_PROCESS, _config({}), requests)
    for request, of_text in list(zip(requests, logits, strict=True))[::2]:
        request.tokens[-1] = int(of_text[0, -1].argmax())
    requests = [
        replaced._replace(num_scored=1) if index % 2 == 0 else replaced for index, replaced in enumerate(requests)
    ]
    scores, logits = observe_scores(ONE_PROCESS, _config({}), requests)
    for request, score, of_text in zip(requests, scores, logits, strict=True):
        labels = torch.tensor(request.tokens[-request.num_scored :])
        scored = of_text[0, -request.num_scored :].log_softmax(dim=-1)
        assert score.log_likelihood == pytest.approx(float(scored.gather(1, labels[:, None]).sum()), rel=1e-9)
        assert score.is_greedy == bool((scored.argmax(dim=-1) == labels).all())
    assert [score.is_greedy for score in scores] == [index % 2 == 0 for index in range(len(LENGTHS))]
    free_left_trainers()
    return requests, scores


@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_every_layout_scores_as_one_rank(
    world_size: int, layouts: list[dict[str, Any]], scored: tuple[list[Continuation], list[Score]]
) -> None:
    requests, expected = scored
    jobs = [(_config(layout), requests) for layout in layouts]
    for layout, observed in zip(layouts, run_ranks(world_size, observe_scores, jobs), strict=True):
        for (scores,) in observed:
            likelihoods = [score.log_likelihood for score in scores]
            assert likelihoods == pytest.approx([score.log_likelihood for score in expected], rel=1e-6), layout
            assert [score.is_greedy for score in scores] == [score.is_greedy for score in expected]

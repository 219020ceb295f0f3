"""Guards over several ranks: one bad rank is everybody's business, differing replicas and hung ranks are named."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessInfo
from tests.helpers.launch import free_port, run_ranks, start_rank
from tests.helpers.one_rank import tiny_recipe
from tests.helpers.steps import microbatches

HANG = """
import sys, time
import torch, torch.distributed as dist
from megatron_itt.config.environment import process_info
from megatron_itt.parallel.groups import start_parallel
from megatron_itt.training.watchdog import Heartbeat, start_watchdog
from tests.helpers.one_rank import tiny_recipe

place = start_parallel(tiny_recipe())
heartbeat = Heartbeat()
start_watchdog(heartbeat, limit_s=4.0, device=place.device)
for step in range(1, 4):
    heartbeat.beat("forward and backward", step)
    if step == 3 and place.rank == 1:
        time.sleep(90)
    dist.barrier()
"""


def recipe(*, tied: bool = False, **parallel: Any) -> RunConfig:
    return tiny_recipe(
        model={"num_query_groups": 4, "tie_embeddings": tied},
        parallel=parallel,
        batch={"global": 4, "micro": 1},
        runtime={"spike_policy": "skip"},
    )


def step_with_one_broken_rank(place: ProcessInfo, config: RunConfig) -> tuple[str, str, bool, bool]:
    """Rank 1's data is broken in the second step: verdict and reason there, and whether weights and tables stayed."""
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.guards import StepGuard
    from megatron_itt.training.signals import StopRequest
    from megatron_itt.training.step import Watch, train_step
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    stop = StopRequest()
    try:
        trainer = build_trainer(config, parallel_place)
        watch = Watch(guard=StepGuard(config.runtime), stop=stop)
        for step in (1, 2):
            train_step(trainer, iter(microbatches(trainer, step)), step, watch=watch)
        state = [value.clone() for value in _state(trainer)]
        broken = microbatches(trainer, 3)
        if place.rank == 1:
            broken[0] = {**broken[0], "loss_mask": torch.full_like(broken[0]["loss_mask"], torch.nan)}
        if place.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # in the same step, to be agreed on as well
        result = train_step(trainer, iter(broken), 3, watch=watch)
        unchanged = all(torch.equal(first, second) for first, second in zip(state, _state(trainer), strict=True))
        return result.verdict.action, result.verdict.reason, unchanged, result.statistics.stop_requested
    finally:
        stop.restore()
        stop_parallel()


def _state(trainer: Any) -> list[torch.Tensor]:
    states = [chunk.state_dict() for chunk in trainer.built.chunks]
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def differing_replica(place: ProcessInfo, config: RunConfig, name: str) -> tuple[str, str]:
    """The complaint before and after rank 1's copy of a weight changes by one bit."""
    from megatron_itt.model.initialisation import global_name
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.guards import ReplicaMismatchError, check_replicas
    from megatron_itt.training.trainer import build_trainer

    parallel_place = start_parallel(config, process=place)
    try:
        trainer = build_trainer(config, parallel_place)
        found = []
        for corrupting in (False, True):
            if corrupting and place.rank == 1:
                chunk = trainer.built.chunks[0]
                weight = next(value for local, value in chunk.named_parameters() if global_name(local, chunk) == name)
                weight.data.view(torch.int32).flatten()[3] ^= 1
            try:
                check_replicas(trainer.built)
                found.append("")
            except ReplicaMismatchError as error:
                found.append(str(error))
        return found[0], found[1]
    finally:
        stop_parallel()


def test_one_broken_rank_keeps_every_rank_from_updating() -> None:
    results = run_ranks(2, step_with_one_broken_rank, [(recipe(),), (recipe(pipeline=2),)])
    for layout in results:
        for action, reason, unchanged, stopping in layout:
            assert (action, unchanged, stopping) == ("skip", True, True)
            assert "the loss of rank 1 is not finite" in reason


def test_a_replica_that_differs_by_one_bit_is_named() -> None:
    fc1, router = "decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.1.thinking.router"
    embedding = "embedding.word_embeddings.weight"
    jobs = [
        *((recipe(), fc1), (recipe(tensor=2), router), (recipe(pipeline=2, tied=True), embedding)),
        (recipe(tensor=2), fc1),
    ]
    replicated, shared, tied, split = run_ranks(2, differing_replica, jobs)
    for result, name in ((replicated, fc1), (shared, router), (tied, embedding)):
        for before, after in result:
            assert before == ""
            assert f"ranks 0 and 1 in {name}" in after
    assert split == [("", ""), ("", "")]  # tensor-parallel ranks hold different parts of this one


def test_a_rank_that_sleeps_is_named_by_the_one_that_waits(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start_rank(rank, ["-c", HANG], port) for rank in range(2)]
    try:
        output, _ = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 1
        assert f"not arrived: rank 1 (process {ranks[1].pid} on" in output
        assert "step 3, forward and backward" in output
    finally:
        for process in ranks:
            process.kill()

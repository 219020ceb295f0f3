"""Bytes that `accounting.collectives` counts, against those that an optimizer step sends."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.accounting.collectives import sent_bytes
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessInfo
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import tiny_recipe
from tests.helpers.traffic import CountTraffic

TENSOR, SEQUENCE = {"tensor": 2}, {"tensor": 2, "sequence": True}
SMALL_BYTES = 2048  # flags, statistics, quantiles and the gradients of norms, which are not counted


def count_step(process: ProcessInfo, config: RunConfig) -> float:
    """Bytes that this rank sends in its second step, without short messages."""
    from megatron_itt.benchmark.shapes import random_batches
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    trainer = build_trainer(config, start_parallel(config, process=process))
    try:
        for step in (1, 2):
            with CountTraffic() as counted:
                train_step(trainer, iter(random_batches(config, trainer.num_microbatches, seed=step)), step)
    finally:
        stop_parallel()
    return sum(message.sent_bytes for message in counted.messages if message.num_bytes > SMALL_BYTES)


def recipe(parallel: dict[str, Any], optimizer: dict[str, Any] | None = None, **thinking: Any) -> RunConfig:
    return tiny_recipe(
        model={"hidden_size": 64, "ffn_hidden_size": 96, "num_query_groups": 4, "seq_length": 256},
        thinking={"capacity": [0.5, 0.25], **thinking},
        parallel=parallel,
        optimizer=optimizer or {},
    )


CASES = {
    "tensor": recipe(TENSOR),
    "tensor, selected": recipe(TENSOR, attend="selected"),
    "tensor, layer again": recipe(TENSOR, recompute="layer"),
    "tensor, attention again": recipe(TENSOR, reuse="attention"),
    "sequence": recipe(SEQUENCE),
    "sequence, selected": recipe(SEQUENCE, attend="selected"),
    "sequence, symmetric": recipe(SEQUENCE, reweight="symmetric"),
    "sequence, top-p": recipe(SEQUENCE, routing="topp"),
    "sequence, attention again": recipe(SEQUENCE, reuse="attention"),
    "sequence, top-p, attention again": recipe(SEQUENCE, routing="topp", reuse="attention"),
    "sequence, routed again": recipe(SEQUENCE, recompute="routed"),
    "sequence, layer again": recipe(SEQUENCE, recompute="layer"),
    "sequence, loop": recipe(SEQUENCE, kind="loop", capacity=[1.0, 1.0]),
    "sequence, none": recipe(SEQUENCE, kind="none", capacity=[]),
    "data": recipe({}),
    "data, whole optimizer": recipe({}, {"distributed": False}),
    "pipeline": recipe({"pipeline": 2}),
    "interleaved": recipe({"pipeline": 2, "virtual_pipeline": 2}),
}


def test_counted_bytes_are_those_that_a_step_sends() -> None:
    results = run_ranks(2, count_step, [(config,) for config in CASES.values()])
    for (name, config), ranks in zip(CASES.items(), results, strict=True):
        memory = rank_memory(config, 2)
        for rank, sent in enumerate(ranks):
            counted = sent_bytes(config, memory[rank % len(memory)], 2)
            assert sum(counted.values()) == pytest.approx(sent, rel=0.02), f"{name}, rank {rank}: {counted}"

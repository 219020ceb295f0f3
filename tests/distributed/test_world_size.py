"""The number of collectives of a step does not grow with the number of ranks."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_itt.config.environment import ProcessInfo
from megatron_itt.parallel.groups import start_parallel, stop_parallel
from megatron_itt.training.step import train_step
from megatron_itt.training.trainer import build_trainer
from tests.helpers.one_rank import tiny_recipe
from tests.helpers.traffic import CountTraffic


def collectives(world_size: int) -> Counter[str]:
    """The collectives of a training step of rank 0 of a pretended job, by kind."""
    config = tiny_recipe(
        model={"num_query_groups": 4},
        parallel={"tensor": 2, "sequence": True},
        batch={"global": world_size, "micro": 2},
    )
    place = ProcessInfo(rank=0, world_size=world_size, local_rank=0, master_address="", master_port=0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        trainer = build_trainer(config, start_parallel(config, process=place))
        tokens = torch.zeros(2, config.model.seq_length, dtype=torch.int64)
        batch = {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": torch.ones(tokens.shape)}
        with CountTraffic() as traffic:
            train_step(trainer, iter([batch]), 1)
        return Counter(message.kind for message in traffic.messages)
    finally:
        stop_parallel()


def test_a_rank_of_a_thousand_calls_what_a_rank_of_eight_calls() -> None:
    few = collectives(8)
    assert collectives(1024) == few
    assert few["all-gather"] > 10 and few["reduce-scatter"] > 10

"""Losses of a few steps under one parallel layout: torchrun -m megatron_itt.benchmark.layout_losses LAYOUT DEVICE.

Rank 0 prints them as one JSON line. `gpu_rows.layout_rows` compares the layouts with one rank.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from megatron_itt.benchmark.shapes import load_shape, random_batches, with_batch
from megatron_itt.config.environment import process_info
from megatron_itt.config.run import ParallelConfig, PrecisionConfig
from megatron_itt.log import silence_known_warnings

NUM_STEPS = 3
TINY = (
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=4", "model.vocab_size=256", "model.seq_length=64"),
)


def layouts(num_ranks: int) -> dict[str, ParallelConfig]:
    """Return the layouts that `num_ranks` (at least 2) form with a model of two layers and four heads."""
    found = {
        "DP": ParallelConfig(),
        "TP": ParallelConfig(tensor=2),
        "TP+SP": ParallelConfig(tensor=2, sequence=True),
        "PP": ParallelConfig(pipeline=2),
    }
    return {name: layout for name, layout in found.items() if num_ranks % (layout.tensor * layout.pipeline) == 0}


def main(layout: str, device: str) -> None:
    """Train in float32 and print the losses."""
    silence_known_warnings()
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    process = process_info()
    config = with_batch(
        load_shape("tiny", [f"runtime.device={device}", *TINY], device=device).config, global_size=16, micro=1
    )
    parallel = ParallelConfig() if layout == "one rank" else layouts(process.world_size)[layout]
    config = replace(config, parallel=parallel, precision=PrecisionConfig(dtype="fp32", parts="native"))
    place = start_parallel(config)
    try:
        trainer = build_trainer(config, place)
        replicas, losses = place.data_parallel_size, []
        for step in range(NUM_STEPS):
            batches = random_batches(config, trainer.num_microbatches * replicas, seed=step)
            losses.append(train_step(trainer, iter(batches[place.data_parallel_rank :: replicas]), step + 1).loss)
    finally:
        stop_parallel()
    if process.rank == 0:
        print(json.dumps(losses), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

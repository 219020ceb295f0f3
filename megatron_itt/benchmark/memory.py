"""Activation memory by recompute mode: kept by autograd, at the peak of a step, and as estimated by the accounting."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_itt.accounting.memory import FLOAT32, activation_bytes, layer_activations, rank_memory
from megatron_itt.benchmark.results import Section
from megatron_itt.benchmark.shapes import BASE, Shape, compared_models, random_batches, with_batch
from megatron_itt.benchmark.steps import release, train_on_random_tokens
from megatron_itt.config.run import RunConfig
from megatron_itt.parallel.groups import start_parallel, stop_parallel
from megatron_itt.tables import Columns

_MEBI = 2**20
# Of gradients, with a distributed optimizer and with a whole one.
_REDUCTIONS = ("c10d::reduce_scatter", "c10d::allreduce_coalesced")
COLUMNS: Columns = {
    "model": "{name}",
    "kept MiB": lambda row: f"{row['kept'] / _MEBI:.1f}",
    "kept estimate": lambda row: f"{row['kept_estimate'] / _MEBI:.1f}",
    "kept/estimate": lambda row: f"{row['kept'] / row['kept_estimate']:.2f}",
    "peak MiB": lambda row: f"{row['peak'] / _MEBI:.1f}",
    "peak estimate": lambda row: f"{row['peak_estimate'] / _MEBI:.1f}",
    "peak/estimate": lambda row: f"{row['peak'] / row['peak_estimate']:.2f}",
}


def memory_section(shape: Shape) -> Section:
    """Measure LLaMA, Loop x4, and ITT x4 in each recompute mode."""
    base, micro = shape.config, shape.config.batch.micro
    models = compared_models(with_batch(base, global_size=micro, micro=micro))
    itt = models["ITT x4"]
    cases = {
        **{name: models[name] for name in (BASE, "Loop x4")},
        **{
            f"ITT x4, recompute {mode}": replace(itt, thinking=replace(itt.thinking, recompute=mode))
            for mode in ("none", "routed", "layer")
        },
        "ITT x4, selected": models["ITT x4, selected"],
    }
    rows = [{"name": name, **measure_activations(config)} for name, config in cases.items()]
    return Section(title=f"Activations of one micro-batch: {shape.describe()}", rows=rows, columns=COLUMNS)


def measure_activations(config: RunConfig) -> dict[str, float]:
    """Return the bytes of activations for one micro-batch, measured and estimated.

    `kept` is what autograd holds between forward and backward, without logits and loss; `peak` the maximum of a step of
    one micro-batch, without weights, gradients and optimizer state.
    """
    from megatron_itt.training.trainer import build_trainer

    place = start_parallel(config)
    try:
        trainer = build_trainer(config, place)
        batch = {key: value.to(place.device) for key, value in random_batches(config, 1, seed=0)[0].items()}
        kept = measure_kept_bytes(trainer.built.chunks[0], batch["tokens"], batch["position_ids"])
        step = partial(train_on_random_tokens, trainer)
        step(0)  # the optimizer's state appears with the first step
        gc.collect()
        if place.device.type == "cuda":
            before = torch.cuda.memory_allocated(place.device)
            torch.cuda.reset_peak_memory_stats(place.device)
            step(1)
            peak = torch.cuda.max_memory_allocated(place.device) - before
        else:
            peak = _peak_on_cpu(step)
        release(trainer)
    finally:
        stop_parallel()
    layers = config.thinking.layer_indices(config.model.num_layers)
    rows = config.batch.micro * config.model.seq_length
    final_norm = rows * config.model.hidden_size * (FLOAT32 + 2 * activation_bytes(config))
    kept_in = [layer_activations(config, thinks=layer in layers) for layer in range(config.model.num_layers)]
    return {
        "kept": kept,
        "kept_estimate": final_norm + sum(kept_in),
        "peak": peak,
        "peak_estimate": rank_memory(config, 1, on_cpu=place.device.type == "cpu")[0].activations,
    }


def measure_kept_bytes(chunk: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> int:
    """Return the bytes of all storages that backward needs, without weights. tokens, positions [b, s]."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # with its history it would keep the graph and the model alive
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chunk(tokens, positions, None)
    assert output.requires_grad, "the model is not trainable"
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _peak_on_cpu(step: Any) -> int:
    """Read the allocator's events, which the profiler records, up to the reduction of gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(1)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    # From here on gloo's threads, which are not recorded, free their copy of the gradients when it suits them.
    end = max(event.start_ns() for event in events if event.name().startswith(_REDUCTIONS))
    held = highest = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() < end:
            held += event.nbytes()
            highest = max(highest, held)
    return highest

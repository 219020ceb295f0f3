"""The counters against the native model on CPU: its parameters, the FLOPs torch counts, the tensors autograd keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_itt.accounting.flops import count_parameters, forward_flops
from megatron_itt.accounting.memory import layer_activations, rank_memory
from megatron_itt.benchmark.memory import measure_activations, measure_kept_bytes
from megatron_itt.config import RunConfig, parse_config
from megatron_itt.model.builder import build_model
from megatron_itt.parallel.groups import ParallelContext, start_parallel, stop_parallel

SHAPES: dict[str, dict[str, Any]] = {
    "heads": {"hidden_size": 128, "ffn_hidden_size": 320, "num_attention_heads": 4, "seq_length": 256},
    "grouped": {
        "hidden_size": 128,
        "ffn_hidden_size": 320,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 256,
    },
    "wide": {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "seq_length": 192},
}
SHAPES["qwen"] = {**SHAPES["grouped"], "qkv_bias": True, "qk_norm": True, "head_dim": 48}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "none"},
    "loop": {"kind": "loop", "capacity": [1.0, 1.0]},
    "all": {"kind": "itt", "capacity": [0.5, 0.7, 0.5]},
    "selected": {"kind": "itt", "capacity": [0.5, 0.7, 0.5], "attend": "selected"},
    "recompute-routed": {"kind": "itt", "capacity": [0.5, 0.7, 0.5], "recompute": "routed"},
    "recompute-layer": {"kind": "itt", "capacity": [0.5, 0.7, 0.5], "recompute": "layer"},
    "sampled": {"kind": "itt", "capacity": {"sample": [0.5, 0.5], "steps": 2}},
    "symmetric": {"kind": "itt", "capacity": [0.5, 0.7, 0.5], "reweight": "symmetric"},
    "attention": {"kind": "itt", "capacity": [0.5, 0.7, 0.5], "reuse": "attention"},
    "attention-threshold": {"kind": "itt", "capacity": [1.0], "reuse": "attention", "routing": "threshold"},
    "routing-none": {"kind": "itt", "capacity": [1.0, 1.0], "routing": "none"},
}
CASES = [(shape, kind) for shape in SHAPES for kind in KINDS if shape != "qwen" or kind in ("llama", "all", "selected")]


def make_config(shape: str, kind: str, *, dtype: str = "fp32") -> RunConfig:
    return parse_config(
        {
            "model": {**SHAPES[shape], "num_layers": 2, "vocab_size": 64},
            "thinking": KINDS[kind],
            "schedule": {"steps": 10},
            "batch": {"global": 1, "micro": 1},
            "precision": {"dtype": dtype},
            "logging": {"run_dir": "unused"},
            "runtime": {"device": "cpu"},
        }
    )


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[ParallelContext]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield start_parallel(make_config("heads", "llama"))
        stop_parallel()


def build(config: RunConfig) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    (chunk,) = build_model(config, dtype=dtype, device=torch.device("cpu")).chunks
    positions = torch.arange(config.model.seq_length)[None]
    return chunk, positions % config.model.vocab_size, positions


def kept_bytes(config: RunConfig) -> float:
    """The estimate: all layers, and the final norm."""
    thinking_layers = config.thinking.layer_indices(config.model.num_layers)
    layers = range(config.model.num_layers)
    element = 2 if config.precision.dtype == "bf16" else 4
    final_norm = config.model.seq_length * (2 * element * config.model.hidden_size + 4)
    return final_norm + sum(layer_activations(config, thinks=layer_idx in thinking_layers) for layer_idx in layers)


def count_block(query: Sequence[int], key: Sequence[int], *_others: object, **_options: object) -> int:
    """FLOPs of attention of query [b, a, q, d] over key [b, a, n, d]: scores and weighted sums."""
    return 4 * math.prod(query) * key[2]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_parameters_flops_and_activations_are_those_of_the_model(shape: str, kind: str) -> None:
    config = make_config(shape, kind)
    chunk, tokens, positions = build(config)
    total = count_parameters(config.model, config.thinking).total
    assert sum(parameter.numel() for parameter in chunk.parameters()) == total
    assert measure_kept_bytes(chunk, tokens, positions) == pytest.approx(kept_bytes(config), rel=0.1)
    # torch counts matrix products of the plain kernel, which computes every score; the router is none to it. The
    # kernel in which the few selected tokens attend has no formula in torch.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_block}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        chunk(tokens, positions, None)
    assert counter.get_total_flops() == pytest.approx(
        forward_flops(config.model, config.thinking, causal=False).total, rel=0.01
    )


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_activations_in_bf16_are_those_that_autograd_keeps(shape: str, kind: str) -> None:
    config = make_config(shape, kind, dtype="bf16")
    assert measure_kept_bytes(*build(config)) == pytest.approx(kept_bytes(config), rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_gradients_and_optimizer_state_are_those_of_a_trainer(
    shape: str, dtype: str, one_rank: ParallelContext
) -> None:
    from megatron_itt.training.trainer import build_trainer

    config = make_config(shape, "all", dtype=dtype)
    trainer = build_trainer(config, one_rank)
    trainer.optimizer.step()  # its state appears with the first step
    (chunk,) = trainer.wrapped
    (part,) = trainer.optimizer.chained_optimizers
    weights = sum(parameter.nbytes for parameter in chunk.parameters())
    gradients = sum(buffer.grad_data.nbytes for buffer in chunk.buffers)
    states = [value for state in part.optimizer.state.values() for value in state.values()]
    masters = [shard for group in part.shard_fp32_from_float16_groups for shard in group]
    optimizer = sum(tensor.nbytes for tensor in states + masters)
    (expected,) = rank_memory(config, 1)
    assert weights == expected.weights
    assert gradients == pytest.approx(expected.gradients, rel=0.1)  # buffers are padded
    assert optimizer == pytest.approx(expected.optimizer, rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_takes_what_is_estimated_for_its_loss(tied: bool, dtype: str) -> None:
    model = {**SHAPES["heads"], "num_layers": 1, "vocab_size": 16384, "tie_embeddings": tied}
    config = make_config("heads", "llama", dtype=dtype)
    config = replace(config, model=replace(config.model, **model))
    stop_parallel()
    measured = measure_activations(config)
    assert measured["peak"] == pytest.approx(measured["peak_estimate"], rel=0.1)


def test_a_whole_optimizer_takes_the_same_activations() -> None:
    config = make_config("heads", "llama")
    stop_parallel()
    sharded, whole = (
        measure_activations(replace(config, optimizer=replace(config.optimizer, distributed=distributed)))["peak"]
        for distributed in (True, False)
    )
    assert whole == pytest.approx(sharded, rel=0.01)


# A process of its own: resident memory is counted from its start.
RESIDENT = """
import warnings; warnings.simplefilter("ignore")
import json, sys
from megatron_itt.accounting.memory import rank_memory
from megatron_itt.benchmark.shapes import random_batches
from megatron_itt.config import parse_config
from megatron_itt.parallel.groups import peak_resident_bytes, start_parallel
from megatron_itt.training.trainer import build_trainer
from megatron_itt.training.step import train_step
config = parse_config({"schedule": {"steps": 10}, "batch": {"global": 2, "micro": 2}, "logging": {"run_dir": "unused"},
                       "runtime": {"device": "cpu"}, **json.loads(sys.argv[1])})
place = start_parallel(config)
trainer = build_trainer(config, place)
for step in range(2):
    train_step(trainer, iter(random_batches(config, 1, seed=step)), step + 1)
(estimate,) = rank_memory(config, 1, on_cpu=True)
print(json.dumps([peak_resident_bytes(), estimate.resident(place.program_bytes), place.program_bytes]))
"""


# Large tied vocabularies: many narrow layers, and a few of medium width that keep much of long sequences in float32.
NARROW = {"hidden_size": 192, "ffn_hidden_size": 512, "num_layers": 30, "num_attention_heads": 3, "vocab_size": 49152}
MEDIUM = {"hidden_size": 384, "ffn_hidden_size": 1024, "num_layers": 8, "num_attention_heads": 6, "vocab_size": 65536}


@pytest.mark.parametrize(
    ("model", "dtype"),
    [({**NARROW, "seq_length": 256}, "bf16"), ({**MEDIUM, "seq_length": 512}, "fp32")],
    ids=["narrow", "medium"],
)
def test_resident_memory_of_a_run_is_within_a_tenth_of_the_estimate(model: dict[str, Any], dtype: str) -> None:
    recipe = {"model": {**model, "tie_embeddings": True}, "precision": {"dtype": dtype}}
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT, json.dumps(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, estimated, program = json.loads(done.stdout.splitlines()[-1])
    assert taken > 1.5 * program
    assert taken == pytest.approx(estimated, rel=0.1)

"""A whole megatron-core model on one process, for tests: recipes as data, weights from the reference's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_itt.config import RunConfig, parse_config
from megatron_itt.config.environment import ProcessInfo
from tests.helpers.reference import rotary_frequencies

TINY_MODEL = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "seq_length": 24,
}
TINY_THINKING = {"kind": "itt", "capacity": [0.5, 0.75, 0.25]}
ONE_PROCESS = ProcessInfo(rank=0, world_size=1, local_rank=0, master_address="127.0.0.1", master_port=0)


def tiny_recipe(**sections: Mapping[str, Any]) -> RunConfig:
    """A tiny ITT recipe; keyword sections replace single keys of it."""
    data: dict[str, dict[str, Any]] = {
        "model": dict(TINY_MODEL),
        "thinking": dict(TINY_THINKING),
        "schedule": {"steps": 5, "warmup_steps": 1},
        "batch": {"global": 4, "micro": 2},
        "optimizer": {"learning_rate": 1e-2},
        "precision": {"dtype": "fp32"},
        "logging": {"run_dir": "unused"},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return parse_config(data)


@contextmanager
def built_model(
    config: RunConfig, *, weights: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float64
) -> Iterator[Any]:
    """Build the model on this process (float64, exact rotary angles), fill in `weights`, and tear the groups down."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.parallel.groups import start_parallel, stop_parallel

    place = start_parallel(config, process=ONE_PROCESS)
    try:
        built = build_model(config, dtype=dtype, device=place.device)
        chunk = built.chunks[0]
        if dtype == torch.float64:
            use_exact_angles(chunk, config)
        if weights is not None:
            state = {name: torch.as_tensor(value) for name, value in weights.items()}
            missing = chunk.load_state_dict(state, strict=False).missing_keys
            assert not [name for name in missing if not name.endswith("_extra_state")], missing
        yield built
    finally:
        stop_parallel()


def use_exact_angles(chunk: Any, config: RunConfig) -> None:
    """megatron-core keeps rotary frequencies in float32; the float64 reference does not."""
    model = config.model
    frequencies, _factor = rotary_frequencies(model.head_size, model.rope_base, model.rope_scaling)
    chunk.rotary_pos_emb.inv_freq = torch.tensor(frequencies, dtype=torch.float64)


def random_tokens(config: RunConfig, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, seq_length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.model.vocab_size, (batch, config.model.seq_length), generator=generator)


@contextmanager
def opened(config: RunConfig) -> Iterator[Any]:
    """A trainer of this process alone, for a block."""
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.trainer import build_trainer

    place = start_parallel(config, process=ONE_PROCESS)
    try:
        yield build_trainer(config, place)
    finally:
        stop_parallel()

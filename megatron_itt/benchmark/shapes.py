"""Benchmark shapes, the models that are compared at a shape, and random batches."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_itt.config import load_config
from megatron_itt.config.model import ThinkingConfig
from megatron_itt.config.run import BatchConfig, ParallelConfig, RunConfig
from megatron_itt.errors import ConfigError

BASE = "LLaMA"
AS_GIVEN = "recipe"
STOCK = "stock GPTModel"
STOCK_SAME_PARTS = "stock GPTModel, same parts"
_RECIPES = Path(__file__).parents[2] / "recipes"
SHAPES = {name: f"{name}/itt_x4.yaml" for name in ("162m", "230m", "466m")} | {"tiny": "debug/itt_tiny.yaml"}
# A quarter of the layers and of the vocabulary, so that the head keeps its share of the work.
_CPU_CUT = ("model.num_layers=2", "model.vocab_size=8000", "batch.global=1", "batch.micro=1")
_GPU_CUT = ("batch.global=4", "batch.micro=2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A measured recipe. `cut` describes how its shape is smaller than the recipe's own; empty if it is not."""

    config: RunConfig
    cut: str

    def describe(self) -> str:
        """Format one line for the title of a section."""
        config, model = self.config, self.config.model
        text = (
            f"hidden {model.hidden_size}, {model.num_layers} layers, sequence {model.seq_length}, micro-batch "
            f"{config.batch.micro}, batch {config.batch.global_size}, {config.precision.dtype}"
        )
        return f"{text} ({self.cut})" if self.cut else text


def load_shape(name: str, overrides: Iterable[str], *, device: str) -> Shape:
    """Load a shape of the paper, `tiny`, or a recipe's path; the paper's are cut to what the device can take.

    Overrides have the last word. ConfigError for names that are neither, and for recipes that are no ITT.
    """
    path = _RECIPES / SHAPES[name] if name in SHAPES else Path(name)
    if name not in SHAPES and not path.is_file():
        raise ConfigError(f"{name} is neither a shape ({', '.join(SHAPES)}) nor a recipe's path")
    cuts: Sequence[str] = ()
    if name in SHAPES and name != "tiny":
        cuts = _CPU_CUT if device == "cpu" else _GPU_CUT
    config = load_config(path, [*cuts, *overrides])
    if config.thinking.kind != "itt" or config.thinking.num_routed_steps == 0:
        raise ConfigError(
            f"{path}: thinking.kind is {config.thinking.kind}; give the recipe of an ITT, such as "
            "recipes/162m/itt_x4.yaml: the other models are derived from it"
        )
    whole = load_config(path).model
    parts = [
        f"{getattr(config.model, key)} of {getattr(whole, key)} {label}"
        for key, label in (("num_layers", "layers"), ("vocab_size", "tokens of the vocabulary"))
        if getattr(config.model, key) != getattr(whole, key)
    ]
    return Shape(config=config, cut="cut: " + ", ".join(parts) if parts else "")


def load_variants(name: str, overrides: Sequence[str], variants: Iterable[str], *, device: str) -> dict[str, RunConfig]:
    """Return a recipe on one rank as it is, and as each variant (overrides, as on a command line) changes it."""
    words = {AS_GIVEN: [], **{variant: shlex.split(variant) for variant in variants}}
    configs = {key: load_shape(name, [*overrides, *more], device=device).config for key, more in words.items()}
    return {key: on_one_rank(config, config.thinking) for key, config in configs.items()}


def compared_models(base: RunConfig) -> dict[str, RunConfig]:
    """Return LLaMA, the stock models, Loop x4 and ITT x2, x3, x4 at a recipe's shape, with the paper's capacities.

    All run on one rank, without recomputation.
    """
    itt = replace(base.thinking, kind="itt", recompute="none")
    thinking = {name: ThinkingConfig() for name in (BASE, STOCK, STOCK_SAME_PARTS)}
    thinking["Loop x4"] = replace(itt, kind="loop", capacity=(1.0,) * 3)
    capacities = {"ITT x2": (0.9,), "ITT x3": (0.7,) * 2, "ITT x4": (0.5,) * 3}
    thinking |= {name: replace(itt, capacity=own, attend="all") for name, own in capacities.items()}
    thinking |= {f"{name}, selected": replace(itt, capacity=own, attend="selected") for name, own in capacities.items()}
    return {name: on_one_rank(base, switches) for name, switches in thinking.items()}


def choose_models(base: RunConfig, names: Sequence[str]) -> dict[str, RunConfig]:
    """Return the named models and LLaMA, or all if none is named. ConfigError for unknown names."""
    models = compared_models(base)
    unknown = [name for name in names if name not in models]
    if unknown:
        raise ConfigError(f"there is no model {unknown[0]!r} to compare; choose from: {'; '.join(models)}")
    wanted = {BASE, *names} if names else set(models)
    return {name: config for name, config in models.items() if name in wanted}


def on_one_rank(base: RunConfig, thinking: ThinkingConfig) -> RunConfig:
    """Replace the thinking section; remove parallelism, validation budgets and a ramp of the batch."""
    validation = replace(base.validation, budgets=())
    config = replace(base, thinking=thinking, validation=validation, parallel=ParallelConfig())
    return with_batch(config, global_size=base.batch.global_size, micro=base.batch.micro)


def with_batch(config: RunConfig, *, global_size: int, micro: int) -> RunConfig:
    """Replace the batch section."""
    batch: dict[str, Any] = {"global": global_size, "micro": micro}  # one key is a keyword of Python
    return replace(config, batch=BatchConfig(**batch))


def random_batches(config: RunConfig, num_microbatches: int, *, seed: int) -> list[dict[str, Any]]:
    """Return the micro-batches of one step on this rank, with random tokens."""
    micro, length = config.batch.micro, config.model.seq_length
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, config.model.vocab_size, (micro, length + 1), generator=generator)
        for _ in range(num_microbatches)
    ]
    positions = torch.arange(length).expand(micro, length)
    mask = torch.ones(micro, length)
    return [
        {"tokens": part[:, :-1], "labels": part[:, 1:], "loss_mask": mask, "position_ids": positions} for part in rows
    ]

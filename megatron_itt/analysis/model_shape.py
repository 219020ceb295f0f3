"""The sections `model` and `thinking` of an export, from its config.json, so that accounting can cost it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_itt.accounting.flops import forward_flops, paper_flops
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel

_SWITCHES = ("residual", "routing", "step_encoding", "gate", "reweight", "attend", "update", "skip")


def shape_of(export: ExportedModel) -> tuple[ModelConfig, ThinkingConfig]:
    """Shape and switches of an ITT, Loop or LLaMA export. DataError for another architecture."""
    config: Any = export.model.config
    if getattr(config, "model_type", "") not in ("itt", "llama"):
        raise DataError(
            f"{export.folder} is a {getattr(config, 'model_type', 'model')}; FLOPs are known for ITT, Loop and LLaMA "
            "exports only"
        )
    model = ModelConfig(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        seq_length=config.max_position_embeddings,
        tie_embeddings=bool(config.tie_word_embeddings),
    )
    thinking = getattr(config, "thinking", None)
    if not thinking or thinking["kind"] == "none":
        return model, ThinkingConfig()
    switches = {name: thinking[name] for name in _SWITCHES}
    layers, capacity = tuple(thinking["layers"]), tuple(thinking["capacity"])
    return model, ThinkingConfig(kind=thinking["kind"], layers=layers, capacity=capacity, **switches)


def name_of(export: ExportedModel) -> str:
    """ "LLaMA", "Loop x4" or "ITT x4"."""
    _, thinking = shape_of(export)
    return {"none": "LLaMA", "loop": "Loop", "itt": "ITT"}[thinking.kind] + (
        f" x{thinking.num_steps}" if thinking.kind != "none" else ""
    )


def flops_of(export: ExportedModel, budget: Sequence[float] | None) -> dict[str, float]:
    """FLOPs of one forward pass over a sequence of the model's length: `flops` (true) and `paper_flops`."""
    model, thinking = shape_of(export)
    return {
        "flops": forward_flops(model, thinking, budget=budget).total,
        "paper_flops": paper_flops(model, thinking, budget=budget),
    }

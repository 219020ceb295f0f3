"""Loading of an exported Hugging Face folder, and setting of its thinking budget."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_itt.data.text.tokenizer import load_tokenizer
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.options import Budget
from megatron_itt.hf.load import open_export


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """An export in memory: model in eval mode, tokenizer, and budget of training (None: no routing)."""

    folder: Path
    model: Any
    tokenizer: Any
    trained_budget: Budget | None

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def prefix_token_id(self) -> int:
        """The token before every document: the begin token, or the end-of-document token without one."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise EvaluationError(
            f"tokenizer in {self.folder} has neither a begin nor an end token; set bos_token or eos_token in "
            "tokenizer_config.json"
        )


def load_export(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> ExportedModel:
    """Load an export folder for inference.

    `device`: "auto" is the GPU if there is one. `dtype`: "auto" is the saved one on a GPU and float32 on the CPU.
    EvaluationError for an unusable device or tokenizer, ExportError for an incomplete or damaged folder.
    """
    folder = Path(folder).resolve()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"device is {device} but this machine has no usable GPU; use --device cpu")
    model, tokenizer = open_export(folder, dtype="float32" if dtype == "auto" and device == "cpu" else dtype)
    config = model.config
    recorded = getattr(config, "tokenizer_sha256", None)
    if recorded is not None and load_tokenizer(folder).sha256 != recorded:
        raise EvaluationError(
            f"the tokenizer in {folder} is not the one that the model was exported with ({str(recorded)[:12]}); export "
            "the model again with itt export"
        )
    if len(tokenizer) > config.vocab_size:
        raise EvaluationError(
            f"tokenizer in {folder} has {len(tokenizer)} entries but the model {config.vocab_size}; use the tokenizer "
            "that the model was trained with"
        )
    thinking = getattr(config, "thinking", {"kind": "none"})
    is_routed = thinking["kind"] == "itt" and thinking["routing"] != "none" and thinking["capacity"]
    budget = tuple(thinking["capacity"]) if is_routed else None
    return ExportedModel(folder=folder, model=model.to(device), tokenizer=tokenizer, trained_budget=budget)


@contextmanager
def thinking_at(model: Any, budget: Sequence[float] | None) -> Iterator[Any]:
    """Set `budget` for every forward pass of `model` within the block; None changes nothing."""
    if budget is None:
        yield model
        return
    model.forward = functools.partial(type(model).forward.__get__(model), thinking_budget=list(budget))
    try:
        yield model
    finally:
        del model.forward

"""Loading of an exported Hugging Face folder, and setting of its thinking budget."""

from __future__ import annotations

import functools
import json
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


def read_export_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of an export folder. EvaluationError where it or the tokenizer is missing."""
    if not folder.is_dir():
        raise EvaluationError(f"model folder {folder} does not exist; export a checkpoint with itt export first")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise EvaluationError(f"{folder} has no config.json, so it is not a Hugging Face export; use itt export")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise EvaluationError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy the one of the training data there"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{config_file} is not valid JSON ({error}); export the model again") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"{config_file} must hold a JSON object; export the model again")
    return config


def load_export(folder: Path | str, *, device: str = "auto", dtype: str = "auto") -> ExportedModel:
    """Load an export folder for inference.

    `device`: "auto" is the GPU if there is one. `dtype`: "auto" is the saved one on a GPU and float32 on the CPU.
    EvaluationError for an incomplete folder, ExportError for a damaged one.
    """
    folder = Path(folder).resolve()
    config = read_export_config(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"device is {device} but this machine has no usable GPU; use --device cpu")
    recorded = config.get("tokenizer_sha256")
    if recorded is not None and load_tokenizer(folder).sha256 != recorded:
        raise EvaluationError(
            f"the tokenizer in {folder} is not the one that the model was exported with ({str(recorded)[:12]}); export "
            "the model again with itt export"
        )
    model, tokenizer = open_export(folder, dtype="float32" if dtype == "auto" and device == "cpu" else dtype)
    model = model.to(device)
    if len(tokenizer) > model.config.vocab_size:
        raise EvaluationError(
            f"tokenizer in {folder} has {len(tokenizer)} entries but the model {model.config.vocab_size}; use the "
            "tokenizer that the model was trained with"
        )
    return ExportedModel(folder=folder, model=model, tokenizer=tokenizer, trained_budget=trained_budget(config))


def trained_budget(config: dict[str, Any]) -> Budget | None:
    """The thinking budget that an export was trained with; None for a model without routing (LLaMA, Loop)."""
    thinking = config.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("kind", "itt") != "itt" or thinking.get("routing") == "none":
        return None
    capacity = thinking.get("capacity") or []
    return tuple(map(float, [capacity] if isinstance(capacity, int | float) else capacity)) or None


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

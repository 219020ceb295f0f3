"""Nuclear norm of the loss gradient of each layer's attention matrices, for easy and for hard samples.

Works on any causal language model in a Hugging Face folder with safetensors. Source: paper, section 2 and Figure 2; the
measure is that of Li et al. 2024, "What happened in LLMs layers when trained for fast vs. slow thinking".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_itt.analysis.measurement import GRADIENTS, Measurement, mean_and_error
from megatron_itt.analysis.samples import (
    Question,
    Sample,
    cut_text,
    encode_question,
    sample_loss,
    sort_by_loss,
    sort_questions,
)
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.log import get_logger

MATRICES = ("query", "key", "value", "output")
_LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
_NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "out_proj": "output",
    "dense": "output",
}
_FUSED = "c_attn"  # GPT-2: query, key and value side by side, stored [in, out]
_EPOCHS = 3

Parts = dict[int, dict[str, Tensor]]


def measure_question_gradients(
    export: ExportedModel, questions: Sequence[Question], *, num_train: int = 0, learning_rate: float = 5e-5
) -> Measurement:
    """Gradients of the loss of the right answer's letter; easy: the model would have chosen it.

    The first `num_train` questions train the model (in memory only) and are not measured, as the paper trains GPT-2 on
    100 samples first.
    """
    if num_train >= len(questions):
        raise DataError(f"{num_train} questions to train on leave none of {len(questions)} to measure; train on fewer")
    if num_train:
        train_on(export, questions[:num_train], learning_rate=learning_rate)
    samples = sort_questions(export, questions[num_train:])
    easy = "answered rightly"
    return _measure(export, samples, easy=easy, hard="answered wrongly", source={"num_train": num_train})


def measure_text_gradients(
    export: ExportedModel, texts: Sequence[str], *, num_samples: int, num_tokens: int
) -> Measurement:
    """Gradients of the loss of pieces of text; easy and hard are the quarters with the lowest and the highest loss."""
    samples = sort_by_loss(export, cut_text(export, texts, num_tokens=num_tokens, limit=num_samples))
    source = {"tokens_per_sample": len(samples[0].tokens) - 1}
    return _measure(export, samples, easy="lowest quarter of loss", hard="highest quarter of loss", source=source)


def train_on(export: ExportedModel, questions: Sequence[Question], *, learning_rate: float) -> None:
    """Fine-tune the model in memory on the right answers, one question at a time, in order, three times over."""
    optimizer = torch.optim.AdamW(export.model.parameters(), lr=learning_rate, weight_decay=0.0)
    for epoch in range(_EPOCHS):
        total = 0.0
        for question in questions:
            optimizer.zero_grad()
            sample = encode_question(export, question, answer=question.correct)
            loss = sample_loss(export, sample, gradient=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        get_logger().info(
            "trained on %d questions, pass %d: loss %.3f", len(questions), epoch + 1, total / len(questions)
        )
    optimizer.zero_grad()


def nuclear_norms(model: torch.nn.Module) -> dict[int, dict[str, float]]:
    """Sum of the singular values of the present gradient of each attention matrix, by layer and matrix."""
    return {
        layer: {name: float(torch.linalg.svdvals(gradient.float()).sum()) for name, gradient in parts.items()}
        for layer, parts in _attention_gradients(model).items()
    }


def _measure(
    export: ExportedModel, samples: Sequence[Sample], *, easy: str, hard: str, source: dict[str, Any]
) -> Measurement:
    """Values: `groups` (easy, hard) with label, num_samples, mean_loss and `layers`; each layer has `mean` and `stderr`
    (between samples) over its matrices together and per matrix; `oscillation` is the mean absolute change of the
    norm from layer to layer; `thinking_layers`."""
    export.model.eval()
    groups, notes = [], []
    for label, is_easy in ((easy, True), (hard, False)):
        own = [sample for sample in samples if sample.is_easy is is_easy]
        if own:
            groups.append({"name": "easy" if is_easy else "hard", "label": label, **_measure_group(export, own)})
        else:
            notes.append(f"No sample was {label}, so there is no such curve.")
    thinking = getattr(export.model.config, "thinking", None) or {}
    values = {"groups": groups, "thinking_layers": list(thinking.get("layers", []))}
    return Measurement(kind=GRADIENTS, values=values, source={"model": str(export.folder), **source}, notes=notes)


def _measure_group(export: ExportedModel, samples: Sequence[Sample]) -> dict[str, Any]:
    norms, losses = [], []
    for sample in samples:
        export.model.zero_grad()
        loss = sample_loss(export, sample, gradient=True)
        loss.backward()
        norms.append(nuclear_norms(export.model))
        losses.append(float(loss.detach()))
    export.model.zero_grad()
    layers: list[dict[str, Any]] = []
    for layer in sorted(norms[0]):
        sums = [sum(norm[layer].values()) / len(norm[layer]) for norm in norms]
        mean, error = mean_and_error(sums)
        by_matrix = {name: mean_and_error([norm[layer][name] for norm in norms])[0] for name in norms[0][layer]}
        layers.append({"layer": layer, "mean": mean, "stderr": error, "matrices": by_matrix})
    means = [layer["mean"] for layer in layers]
    changes = [abs(b - a) for a, b in pairwise(means)]
    return {
        "num_samples": len(samples),
        "mean_loss": sum(losses) / len(losses),
        "layers": layers,
        "oscillation": sum(changes) / len(changes) if changes else None,
    }


def _attention_gradients(model: torch.nn.Module) -> Parts:
    """The gradients of query, key, value and output matrices by layer, whatever the architecture calls them."""
    found: Parts = {}
    for name, parameter in model.named_parameters():
        match = _LAYER.search("." + name)
        if match is None or ("attn" not in match[2] and "attention" not in match[2]) or parameter.ndim != 2:
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for part, matrix in _split(match[2], gradient):
            found.setdefault(int(match[1]), {})[part] = matrix
    if not found:
        raise DataError(
            "no attention matrix was found among the model's parameters; models whose layers hold q_proj, k_proj, "
            "v_proj, o_proj or GPT-2's c_attn, c_proj can be measured"
        )
    return found


def _split(name: str, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices that a parameter of an attention module holds; an unknown one counts under its own name."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module == _FUSED:
        yield from zip(MATRICES, gradient.chunk(3, dim=1), strict=False)
    elif module == "c_proj":
        yield "output", gradient
    else:
        yield _NAMES.get(module, module), gradient

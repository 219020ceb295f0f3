"""Nuclear norms of the loss gradients of attention matrices by layer, for easy and for hard samples.

Samples are questions with options (AQuA's format), easy where the model answers rightly, or pieces of text, easy where
the loss is low. Any causal language model in a Hugging Face folder can be measured. Source: paper, section 2 and Figure
2; the measure is that of Li et al. 2024, "What happened in LLMs layers when trained for fast vs. slow thinking".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.analysis.measurement import Measurement, mean_and_error
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.log import get_logger

TEXT_SHARE = 0.25  # of the pieces of a text that count as easy (lowest loss), and as hard (highest loss)
_NUM_EPOCHS = 3
_LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
_NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj"), "output"),
}
_FUSED = "c_attn"  # GPT-2: query, key and value side by side, stored [in, out]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with its options, and the index of the right one."""

    prompt: str
    options: list[str]
    correct: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Token ids of which the last `num_scored` are predicted. `is_easy` None: in neither group."""

    tokens: list[int]
    num_scored: int
    is_easy: bool | None = None


def measure_question_gradients(
    export: ExportedModel, questions: Sequence[Question], *, num_train: int = 0, learning_rate: float = 5e-5
) -> Measurement:
    """Measure gradients of the loss of the right answer's letter; easy: the model's most likely letter.

    The first `num_train` questions train the model in memory and are not measured (the paper trains GPT-2 on 100).
    """
    if num_train >= len(questions):
        raise DataError(f"{num_train} questions to train on leave none of {len(questions)} to measure; train on fewer")
    if num_train:
        _train(export, questions[:num_train], learning_rate=learning_rate)
    samples = sort_questions(export, questions[num_train:])
    return _measure(export, samples, ("answered rightly", "answered wrongly"), {"num_train": num_train})


def measure_text_gradients(
    export: ExportedModel, texts: Sequence[str], *, num_samples: int, num_tokens: int
) -> Measurement:
    """Measure gradients of the loss of pieces of text; easy and hard: the quarters of lowest and of highest loss."""
    samples = sort_by_loss(export, cut_text(export, texts, num_tokens=num_tokens, limit=num_samples))
    labels = "lowest quarter of loss", "highest quarter of loss"
    return _measure(export, samples, labels, {"tokens_per_sample": len(samples[0].tokens) - 1})


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file with `question`, `options` (a list) and `correct` (a letter, or an index from 0)."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not any(map(str.strip, lines)):
        fault = "are empty" if path.is_file() else "do not exist"
        raise DataError(f"questions {path} {fault}; give a JSONL file with question, options and correct")
    return [_parse_question(line, f"{path} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _parse_question(line: str, where: str) -> Question:
    try:
        record: Any = json.loads(line)
    except ValueError:
        raise DataError(f"{where} is not valid JSON; mend or remove the line") from None
    needed = {"question", "options", "correct"}
    if not isinstance(record, dict) or not needed <= set(record) or not isinstance(record["options"], list):
        raise DataError(f"{where} lacks question, options (a list) or correct; use AQuA's format")
    options = [str(option) for option in record["options"]]
    correct = record["correct"]
    idx = ord(correct.upper()) - ord("A") if isinstance(correct, str) and len(correct) == 1 else correct
    if isinstance(idx, bool) or not isinstance(idx, int) or not 0 <= idx < len(options):
        raise DataError(f"{where}: correct is {correct!r}; name one of the {len(options)} options by its letter")
    prompt = f"Question: {record['question']}\nOptions: {' '.join(options)}\nAnswer:"
    return Question(prompt=prompt, options=options, correct=idx)


def sort_questions(export: ExportedModel, questions: Sequence[Question]) -> list[Sample]:
    """Return the right answer of every question as a sample, easy where the model gives it the highest probability."""
    samples = []
    for question in questions:
        answers = [_encode_answer(export, question, idx) for idx in range(len(question.options))]
        losses = [float(sample_loss(export, answer)) for answer in answers]
        is_easy = min(range(len(losses)), key=losses.__getitem__) == question.correct
        samples.append(replace(answers[question.correct], is_easy=is_easy))
    return samples


def _encode_answer(export: ExportedModel, question: Question, answer: int) -> Sample:
    """The prompt and the letter of an option; a prompt beyond the context loses its beginning."""
    prompt = export.tokenizer.encode(question.prompt, add_special_tokens=False)
    letter = export.tokenizer.encode(f" {chr(ord('A') + answer)}", add_special_tokens=False)
    room = export.max_length - len(letter) - 1
    return Sample(tokens=[export.prefix_token_id, *prompt[-room:], *letter], num_scored=len(letter))


def cut_text(export: ExportedModel, texts: Sequence[str], *, num_tokens: int, limit: int) -> list[Sample]:
    """Return at most `limit` pieces of `num_tokens` tokens, all of them scored but the prefix token."""
    length = min(num_tokens, export.max_length - 1)
    pieces: list[Sample] = []
    for text in texts:
        ids = export.tokenizer.encode(text, add_special_tokens=False)
        pieces += [
            Sample(tokens=[export.prefix_token_id, *ids[start : start + length]], num_scored=length)
            for start in range(0, len(ids) - length + 1, length)
        ]
        if len(pieces) >= limit:
            break
    return pieces[:limit]


def sort_by_loss(export: ExportedModel, samples: Sequence[Sample]) -> list[Sample]:
    """Return the quarter of lowest loss, marked easy, and the quarter of highest loss, marked hard."""
    if len(samples) < 4:
        raise DataError(f"the text gives {len(samples)} pieces, which is too few to sort by loss; give more text")
    losses = [float(sample_loss(export, sample)) for sample in samples]
    order = sorted(range(len(samples)), key=losses.__getitem__)
    count = max(1, int(TEXT_SHARE * len(samples)))
    groups = [(idx, True) for idx in order[:count]] + [(idx, False) for idx in order[-count:]]
    return [replace(samples[idx], is_easy=is_easy) for idx, is_easy in groups]


def sample_loss(export: ExportedModel, sample: Sample, *, gradient: bool = False) -> Tensor:
    """Return the mean loss in nats of the scored tokens."""
    tokens = torch.tensor([sample.tokens], device=export.device)
    with torch.set_grad_enabled(gradient):
        logits = export.model(input_ids=tokens, use_cache=False).logits[0, -sample.num_scored - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, -sample.num_scored :])


def nuclear_norms(model: torch.nn.Module) -> dict[int, dict[str, float]]:
    """Return the sum of the singular values of the gradient of each attention matrix, by layer and matrix.

    An unknown matrix of an attention module counts under its own name.
    """
    norms: dict[int, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        match = _LAYER.search("." + name)
        if match is None or ("attn" not in match[2] and "attention" not in match[2]) or parameter.ndim != 2:
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        module = match[2].removesuffix(".weight").rpartition(".")[2]
        parts = {_NAMES.get(module, module): gradient}
        if module == _FUSED:
            parts = dict(zip(("query", "key", "value"), gradient.chunk(3, dim=1), strict=True))
        own = norms.setdefault(int(match[1]), {})
        own |= {matrix: float(torch.linalg.svdvals(part.float()).sum()) for matrix, part in parts.items()}
    if not norms:
        raise DataError(
            "no attention matrix was found among the model's parameters; models whose layers hold q_proj, k_proj, "
            "v_proj, o_proj or GPT-2's c_attn, c_proj can be measured"
        )
    return norms


def _train(export: ExportedModel, questions: Sequence[Question], *, learning_rate: float) -> None:
    """Fine-tune the model in memory on the right answers, one question at a time, in order."""
    optimizer = torch.optim.AdamW(export.model.parameters(), lr=learning_rate, weight_decay=0.0)
    for epoch in range(_NUM_EPOCHS):
        total = 0.0
        for question in questions:
            optimizer.zero_grad()
            loss = sample_loss(export, _encode_answer(export, question, question.correct), gradient=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        get_logger().info(
            "trained on %d questions, epoch %d: loss %.3f", len(questions), epoch + 1, total / len(questions)
        )
    optimizer.zero_grad()


def _measure(
    export: ExportedModel, samples: Sequence[Sample], labels: tuple[str, str], source: dict[str, Any]
) -> Measurement:
    """Values: `groups` (easy, hard) with label, num_samples, mean_loss and `layers`; each layer has `mean` and `stderr`
    (between samples) over its matrices together and per matrix; `oscillation` is the mean absolute change of the
    norm from layer to layer; `thinking_layers`."""
    export.model.eval()
    groups, notes = [], []
    for name, label in zip(("easy", "hard"), labels, strict=True):
        own = [sample for sample in samples if sample.is_easy is (name == "easy")]
        if own:
            groups.append({"name": name, "label": label, **_measure_group(export, own)})
        else:
            notes.append(f"No sample was {label}, so there is no such curve.")
    thinking = getattr(export.model.config, "thinking", None) or {}
    values = {"groups": groups, "thinking_layers": list(thinking.get("layers", []))}
    return Measurement(kind="gradients", values=values, source={"model": str(export.folder), **source}, notes=notes)


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
        mean, error = mean_and_error([sum(norm[layer].values()) / len(norm[layer]) for norm in norms])
        by_matrix = {name: mean_and_error([norm[layer][name] for norm in norms])[0] for name in norms[0][layer]}
        layers.append({"layer": layer, "mean": mean, "stderr": error, "matrices": by_matrix})
    changes = [abs(b["mean"] - a["mean"]) for a, b in pairwise(layers)]
    return {
        "num_samples": len(samples),
        "mean_loss": sum(losses) / len(losses),
        "layers": layers,
        "oscillation": sum(changes) / len(changes) if changes else None,
    }

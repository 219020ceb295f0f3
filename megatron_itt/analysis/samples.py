"""Samples for gradient measurements: questions with options (AQuA's format), or pieces of any text.

Which samples are easy and which are hard is decided by a model: by right and wrong answers for questions, by loss for
text. Source: paper, section 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel

TEXT_SHARE = 0.25  # of the pieces of a text that count as easy (lowest loss), and as hard (highest loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with its options as they stand, and the place of the right one."""

    prompt: str
    options: list[str]
    correct: int

    def letter(self, place: int) -> str:
        """The letter that answers with option `place`."""
        return " " + chr(ord("A") + place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Token ids of which the last `num_scored` are predicted; `is_easy` None: belongs to neither group."""

    tokens: list[int]
    num_scored: int
    is_easy: bool | None = None


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file with `question`, `options` (a list) and `correct` (a letter, or a place from 0)."""
    if not path.is_file():
        raise DataError(f"questions {path} do not exist; give a JSONL file with question, options and correct")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            questions.append(_read_question(line, f"{path} line {number}"))
    if not questions:
        raise DataError(f"questions {path} are empty; give a JSONL file with question, options and correct")
    return questions


def encode_question(export: ExportedModel, question: Question, *, answer: int) -> Sample:
    """The prompt and the letter of an option as the answer; a prompt beyond the context loses its beginning."""
    prompt = export.tokenizer.encode(question.prompt, add_special_tokens=False)
    letter = export.tokenizer.encode(question.letter(answer), add_special_tokens=False)
    room = export.max_length - len(letter) - 1
    return Sample(tokens=[export.prefix_token_id, *prompt[-room:], *letter], num_scored=len(letter))


def sort_questions(export: ExportedModel, questions: Sequence[Question]) -> list[Sample]:
    """The right answer of every question as a sample, easy where the model gives it the highest probability."""
    samples = []
    for question in questions:
        losses = _answer_losses(export, question)
        right = encode_question(export, question, answer=question.correct)
        is_easy = min(range(len(losses)), key=losses.__getitem__) == question.correct
        samples.append(Sample(tokens=right.tokens, num_scored=right.num_scored, is_easy=is_easy))
    return samples


def cut_text(export: ExportedModel, texts: Sequence[str], *, num_tokens: int, limit: int) -> list[Sample]:
    """At most `limit` pieces of `num_tokens` tokens, all of them scored but the prefix."""
    length = min(num_tokens, export.max_length - 1)
    pieces: list[Sample] = []
    for text in texts:
        ids = export.tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids) - length + 1, length):
            if len(pieces) == limit:
                return pieces
            pieces.append(Sample(tokens=[export.prefix_token_id, *ids[start : start + length]], num_scored=length))
    return pieces


def sort_by_loss(export: ExportedModel, samples: Sequence[Sample]) -> list[Sample]:
    """Mark the quarter with the lowest loss easy and the quarter with the highest hard; the rest are left out."""
    if len(samples) < 4:
        raise DataError(f"the text gives {len(samples)} pieces, which is too few to sort by loss; give more text")
    losses = [float(sample_loss(export, sample)) for sample in samples]
    order = sorted(range(len(samples)), key=losses.__getitem__)
    count = max(1, int(TEXT_SHARE * len(samples)))
    groups = [(place, True) for place in order[:count]] + [(place, False) for place in order[-count:]]
    return [
        Sample(tokens=samples[place].tokens, num_scored=samples[place].num_scored, is_easy=is_easy)
        for place, is_easy in groups
    ]


def sample_loss(export: ExportedModel, sample: Sample, *, gradient: bool = False) -> Tensor:
    """Mean loss in nats of the scored tokens."""
    tokens = torch.tensor([sample.tokens], device=next(export.model.parameters()).device)
    with torch.set_grad_enabled(gradient):
        logits = export.model(input_ids=tokens, use_cache=False).logits[0, -sample.num_scored - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, -sample.num_scored :])


def _answer_losses(export: ExportedModel, question: Question) -> list[float]:
    """Loss of each option's letter; a single forward pass where letters are single tokens, as they mostly are."""
    answers = [encode_question(export, question, answer=place) for place in range(len(question.options))]
    if any(answer.num_scored > 1 for answer in answers):
        return [float(sample_loss(export, answer)) for answer in answers]
    prompt = torch.tensor([answers[0].tokens[:-1]], device=next(export.model.parameters()).device)
    with torch.no_grad():
        logits = export.model(input_ids=prompt, use_cache=False).logits[0, -1].float()
    return (logits.logsumexp(0) - logits[[answer.tokens[-1] for answer in answers]]).tolist()


def _read_question(line: str, where: str) -> Question:
    try:
        record: Any = json.loads(line)
    except ValueError:
        raise DataError(f"{where} is not valid JSON; mend or remove the line") from None
    needed = {"question", "options", "correct"}
    if not isinstance(record, dict) or not needed <= set(record) or not isinstance(record["options"], list):
        raise DataError(f"{where} lacks question, options (a list) or correct; use AQuA's format")
    options = [str(option) for option in record["options"]]
    correct = record["correct"]
    place = ord(correct.upper()) - ord("A") if isinstance(correct, str) and len(correct) == 1 else correct
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
        raise DataError(f"{where}: correct is {correct!r}; name one of the {len(options)} options by its letter")
    prompt = f"Question: {record['question']}\nOptions: {' '.join(options)}\nAnswer:"
    return Question(prompt=prompt, options=options, correct=place)

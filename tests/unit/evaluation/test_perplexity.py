"""Sliding-window perplexity: every token once, equal to the model's own loss where that is defined."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.evaluation.perplexity import measure_perplexity, sliding_windows

# float32 sums over some hundred tokens, in another order
TOLERANCE = 1e-5


@pytest.mark.parametrize("length", [2, 3, 8, 33])
def test_windows_score_every_token_but_the_prefix_once(length: int) -> None:
    documents = [list(range(size)) for size in (2, 3, 7, 8, 9, 16, 17, 40)]
    scored: dict[int, list[int]] = {idx: [] for idx in range(len(documents))}
    for window in sliding_windows(documents, length):
        assert len(window.tokens) <= length
        assert window.num_scored < len(window.tokens)
        scored[window.document_idx] += window.tokens[len(window.tokens) - window.num_scored :]
    assert [scored[idx] for idx in range(len(documents))] == [document[1:] for document in documents]


def test_a_short_text_has_the_loss_of_one_forward_pass(llama: ExportedModel) -> None:
    text = "for line in lines:\n    print(line)\n"
    ids = [llama.prefix_token_id, *llama.tokenizer.encode(text)]
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        expected = float(llama.model(tokens, labels=tokens).loss)
    result = measure_perplexity(llama, [text])
    assert result.loss == pytest.approx(expected, rel=TOLERANCE)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.num_tokens == len(ids) - 1
    assert result.bits_per_byte == pytest.approx(expected * (len(ids) - 1) / math.log(2) / len(text), rel=TOLERANCE)


def test_the_batch_size_and_padding_change_nothing(itt: ExportedModel, documents: dict[str, list[str]]) -> None:
    texts = [documents["code"][0][:900], "import os\n", documents["code"][1][:300]]
    alone = measure_perplexity(itt, texts, batch_size=1)
    together = measure_perplexity(itt, texts, batch_size=5)
    assert together.loss == pytest.approx(alone.loss, rel=TOLERANCE)
    assert together.num_tokens == alone.num_tokens


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(llama: ExportedModel) -> None:
    weight = llama.model.lm_head.weight
    before = weight.detach().clone()
    try:
        torch.nn.init.zeros_(weight)
        result = measure_perplexity(llama, ["def f(x):\n    return x\n", "class A:\n    pass\n"])
    finally:
        weight.data.copy_(before)
    assert result.perplexity == pytest.approx(llama.model.config.vocab_size, rel=TOLERANCE)
    assert result.loss_stderr == pytest.approx(0.0, abs=1e-5)  # all documents have the same loss


def test_budgets_give_different_losses_and_are_reported(itt: ExportedModel, documents: dict[str, list[str]]) -> None:
    texts = [documents["docs"][0][:600]]
    results = [measure_perplexity(itt, texts, budget=budget) for budget in ((0.1, 0.1), (0.5, 0.25), (1.0, 1.0))]
    assert len({result.loss for result in results}) == 3
    assert results[0].as_dict()["budget"] == [0.1, 0.1]


def test_max_tokens_ends_the_measurement(llama: ExportedModel, documents: dict[str, list[str]]) -> None:
    result = measure_perplexity(llama, documents["code"], max_tokens=150)
    assert result.num_tokens == 150


def test_empty_text_is_refused(llama: ExportedModel) -> None:
    with pytest.raises(EvaluationError, match="'novels' is empty"):
        measure_perplexity(llama, ["", ""], domain="novels")


def test_a_tokenizer_without_special_tokens_is_refused(llama: ExportedModel) -> None:
    class Bare:
        bos_token_id = None
        eos_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1, 2, 3]

    with pytest.raises(EvaluationError, match="neither a begin nor an end token"):
        measure_perplexity(replace(llama, tokenizer=Bare(), folder=Path("here")), ["x"])

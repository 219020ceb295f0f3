"""Nuclear norms of attention gradients, and which samples are easy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_itt.analysis.gradients import (
    Sample,
    cut_text,
    measure_question_gradients,
    measure_text_gradients,
    nuclear_norms,
    read_questions,
    sample_loss,
    sort_by_loss,
    sort_questions,
)
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from tests.unit.evaluation.exports import MAX_LENGTH, VOCAB_SIZE, make_tokenizer, standard_library_texts

QUESTION = {"question": "What is 2 + 2?", "options": ["A)4", "B)5", "C)6"], "rationale": "...", "correct": "A"}


def write_questions(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=3, n_head=2, n_positions=MAX_LENGTH)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return load_export(folder, device="cpu")


def test_fused_matrices_are_measured_part_by_part(gpt2: ExportedModel) -> None:
    sample = Sample(tokens=list(range(1, 20)), num_scored=5)
    gpt2.model.zero_grad()
    sample_loss(gpt2, sample, gradient=True).backward()
    norms = nuclear_norms(gpt2.model)
    assert sorted(norms) == [0, 1, 2]
    assert set(norms[0]) == {"query", "key", "value", "output"}
    fused = gpt2.model.transformer.h[1].attn.c_attn.weight.grad
    values = fused[:, 32:48].double()
    assert norms[1]["value"] == pytest.approx(float(torch.linalg.svdvals(values).sum()), rel=1e-4)
    gpt2.model.zero_grad()


def test_ours_and_llama_are_measured_by_the_same_names(itt: ExportedModel, llama_dir: Path) -> None:
    texts = [text[:1500] for text in standard_library_texts(2)]
    for export, num_layers in ((itt, 4), (load_export(llama_dir, device="cpu"), 2)):
        values = measure_text_gradients(export, texts, num_samples=12, num_tokens=16).values
        easy, hard = values["groups"]
        assert (easy["name"], hard["name"], easy["num_samples"], hard["num_samples"]) == ("easy", "hard", 3, 3)
        assert easy["mean_loss"] < hard["mean_loss"]
        assert len(easy["layers"]) == num_layers
        assert all(row["mean"] > 0 and set(row["matrices"]) == {"query", "key", "value", "output"}
                   for row in hard["layers"])  # fmt: skip
        assert all(weight.grad is None or not weight.grad.any() for weight in export.model.parameters())
    assert measure_text_gradients(itt, texts, num_samples=8, num_tokens=8).values["thinking_layers"] == [1, 3]


def test_questions_are_easy_where_the_right_letter_is_the_likeliest(gpt2: ExportedModel, tmp_path: Path) -> None:
    rows = [{**QUESTION, "correct": letter} for letter in "ABC"]
    samples = sort_questions(gpt2, read_questions(write_questions(tmp_path / "q.jsonl", *rows)))
    assert [sample.is_easy for sample in samples].count(True) == 1  # one prompt: one letter is the likeliest
    losses = [float(sample_loss(gpt2, sample)) for sample in samples]
    assert min(range(3), key=losses.__getitem__) == [sample.is_easy for sample in samples].index(True)


def test_training_on_questions_makes_their_answers_likelier_and_changes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=MAX_LENGTH)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    before = (folder / "model.safetensors").read_bytes()
    export = load_export(folder, device="cpu")
    rows = [{**QUESTION, "question": f"What is {n}?", "correct": "C"} for n in range(12)]
    questions = read_questions(write_questions(tmp_path / "q.jsonl", *rows))
    loss = [float(sample_loss(export, sample)) for sample in sort_questions(export, questions[8:])]
    values = measure_question_gradients(export, questions, num_train=8, learning_rate=1e-2).values
    assert sum(group["num_samples"] for group in values["groups"]) == 4
    assert values["groups"][0]["mean_loss"] < min(loss)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_group_without_samples_is_told(gpt2: ExportedModel, tmp_path: Path) -> None:
    single = [{**QUESTION, "options": ["A)4"]}] * 2
    measured = measure_question_gradients(gpt2, read_questions(write_questions(tmp_path / "q.jsonl", *single)))
    assert [group["name"] for group in measured.values["groups"]] == ["easy"]
    assert any("No sample was answered wrongly" in note for note in measured.notes)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "q"}, "line 1 lacks"),
        ({**QUESTION, "correct": "Z"}, "correct is 'Z'"),
        ({**QUESTION, "options": "A)1"}, "line 1 lacks"),
        (None, "are empty"),
    ],
)
def test_questions_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, object] | None, told: str) -> None:
    path = write_questions(tmp_path / "q.jsonl", *([] if row is None else [row]))
    with pytest.raises(DataError, match=told):
        read_questions(path)


def test_text_that_is_too_short_or_all_trained_on_is_refused(gpt2: ExportedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few"):
        sort_by_loss(gpt2, cut_text(gpt2, ["few words"], num_tokens=16, limit=10))
    questions = read_questions(write_questions(tmp_path / "q.jsonl", QUESTION))
    with pytest.raises(DataError, match="leave none"):
        measure_question_gradients(gpt2, questions, num_train=1)
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        read_questions(tmp_path / "bad.jsonl")

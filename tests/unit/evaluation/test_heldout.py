"""The two held-out tasks: what their records are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.heldout import (
    HELDOUT_TASKS,
    HeldoutSettings,
    make_continuation_records,
    make_last_word_records,
    write_heldout_tasks,
)

Documents = dict[str, list[str]]
SETTINGS = HeldoutSettings(num_last_word=40, num_continuation=40)


def test_the_same_seed_gives_the_same_records_and_another_seed_others(documents: Documents) -> None:
    other = HeldoutSettings(num_last_word=40, num_continuation=40, seed=7)
    for make in (make_last_word_records, make_continuation_records):
        assert make(documents, SETTINGS) == make(documents, SETTINGS)
        assert make(documents, SETTINGS) != make(documents, other)


def test_the_last_word_follows_its_context_in_the_text_and_occurs_in_it(documents: Documents) -> None:
    records = make_last_word_records(documents, SETTINGS)
    assert len(records) == 40
    for record in records:
        passage = f"{record['context']} {record['word']}"
        assert any(passage in text for text in documents[record["domain"]])
        assert record["word"] in record["context"]
        assert len(record["word"]) >= 4


def test_the_answer_is_the_true_continuation_and_the_others_come_from_other_documents(documents: Documents) -> None:
    records = make_continuation_records(documents, SETTINGS)
    assert len(records) == 40
    assert {record["answer"] for record in records} == {0, 1, 2, 3}
    for record in records:
        texts = documents[record["domain"]]
        right = record["choices"][record["answer"]]
        (home,) = [text for text in texts if record["context"] + right in text]
        assert len(set(record["choices"])) == 4
        for choice in set(record["choices"]) - {right}:
            assert choice.startswith(" ")
            assert any(choice in text for text in texts if text != home)


def test_written_tasks_are_equal_bytes_and_replace_their_former_set(documents: Documents, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    assert write_heldout_tasks(documents, folder, SETTINGS) == list(HELDOUT_TASKS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_heldout_tasks(documents, folder, SETTINGS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(before) == 4
    data_file = yaml.safe_load(before["heldout_last_word.yaml"])["dataset_kwargs"]["data_files"]["test"]
    assert (folder / data_file).is_file() and "/" not in data_file


def test_a_task_folder_with_other_files_is_left_alone(documents: Documents, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EvaluationError, match=r"thesis\.tex"):
        write_heldout_tasks(documents, tmp_path, SETTINGS)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="520 characters"):
        write_heldout_tasks({"code": ["short"] * 9}, tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_a_domain_of_fewer_documents_than_choices_is_refused(documents: Documents, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="4 documents"):
        write_heldout_tasks({"code": documents["code"][:3]}, tmp_path / "tasks")

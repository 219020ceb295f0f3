"""itt evaluate as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.cli import main, run
from megatron_itt.errors import EvaluationError, IttError
from megatron_itt.evaluation.heldout import read_texts
from megatron_itt.evaluation.results import read_results
from tests.unit.evaluation.exports import TRAINED_BUDGET, standard_library_texts, write_jsonl


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path / "nowhere"), "--tasks", "sciq", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and "nowhere has no config.json" in error and len(error.strip().splitlines()) == 1
    )
    assert not (tmp_path / "out").exists()


def test_heldout_text_becomes_tasks_and_perplexity_at_every_budget(
    itt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = standard_library_texts()
    code, docs = write_jsonl(tmp_path / "code.jsonl", texts[:5]), write_jsonl(tmp_path / "docs.jsonl", texts[5:10])
    arguments = ["--model", str(itt_dir), "--output", str(tmp_path / "out"), "--task-dir", str(tmp_path / "tasks")]
    arguments += ["--heldout", f"code={code}", "--heldout", f"docs={docs}", "--heldout-records", "6"]
    arguments += ["--budget", "0.1,0.1", "--budget", "50%,25%", "--perplexity-max-tokens", "200", "--device", "cpu"]
    assert run(["evaluate", *arguments]) == 0
    results = read_results(tmp_path / "out")
    assert [run["thinking_budget"] for run in results["runs"]] == [[0.1, 0.1], list(TRAINED_BUDGET)]
    assert [(row["budget"], row["domain"]) for row in results["perplexity"]] == [
        ([0.1, 0.1], "code"),
        ([0.1, 0.1], "docs"),
        (list(TRAINED_BUDGET), "code"),
        (list(TRAINED_BUDGET), "docs"),
    ]
    assert "heldout_continuation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"txt": 1}\n', "line 2: no key 'text'"),
        ("a.jsonl", b"{oops\n", "line 1"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_held_out_text_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IttError, match=message):
        read_texts(tmp_path / name)


def test_a_missing_held_out_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gone\.jsonl does not exist"):
        read_texts(tmp_path / "gone.jsonl")

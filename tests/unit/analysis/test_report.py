"""The page: what it says, that it is safe and self-contained, and that damaged runs still give one."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_itt.analysis.report import (
    budget_table,
    measure,
    passage_budgets,
    render_report,
    short_number,
    summary,
    tasks_tables,
    versions,
    write_report,
)
from megatron_itt.analysis.runs import read_run
from megatron_itt.cli import run
from megatron_itt.errors import DataError
from megatron_itt.evaluation.options import percent
from tests.unit.analysis.runs import run_lines, training_line, validation_line, write_run

NASTY = '<script>alert(1)</script> & </span> "quoted" {{ 7 * 7 }} x = a < b\n'


class _Links(HTMLParser):
    """Collects everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def _evaluation(path: Path) -> Path:
    run = {
        "thinking_budget": [0.5, 0.25],
        "results": {"heldout_continuation": {"acc,none": 0.5, "acc_stderr,none": 0.05}},
        "n-shot": {"heldout_continuation": 0},
    }
    perplexity = {"budget": [1.0, 1.0], "domain": "code", "loss": 2.0, "loss_stderr": 0.1}
    perplexity |= {"perplexity": 7.39, "bits_per_byte": 1.0, "num_documents": 3, "num_tokens": 9}
    results = {"model": "m", "trained_budget": [0.5, 0.25], "versions": {"lm_eval": "0.4.13"}, "runs": [run]}
    path.write_text(json.dumps({**results, "perplexity": [perplexity]}), encoding="utf-8")
    return path


def test_the_page_tells_what_happened_in_real_figures(run_dir: Path, itt_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    evaluation = _evaluation(tmp_path / "results.json")
    write_report(run_dir, output_html=output, export_dir=itt_dir, evaluations=[evaluation], text=NASTY)
    page = output.read_text(encoding="utf-8")
    assert "Validation loss fell from 6.393 to 2.543 nats per token when 50/25% of the tokens are selected" in page
    assert "Inner Thinking Transformer trained on code, docs." in page
    assert "<dt>training tokens</dt><dd>20 k</dd>" in page and "<dt>steps</dt><dd>20</dd>" in page
    assert "50.0 \u00b1 5.0" in page
    assert "0.4.13" in page and "kind: itt" in page
    assert page.count("<svg") == 8  # loss against tokens and steps, three metrics, three domains by budget
    assert list(tmp_path.glob("*.partial")) == []


@pytest.fixture(scope="module")
def page(run_dir: Path, itt_dir: Path) -> str:
    return render_report(measure(run_dir, export_dir=itt_dir, text=NASTY))


def test_the_page_fetches_nothing(page: str) -> None:
    links = _Links()
    links.feed(page)
    assert links.found == ["data:,"]  # the empty icon
    assert not re.search(r"url\((?!#)|@import|https?://", page)


def test_text_is_escaped_everywhere(page: str) -> None:
    assert "<script>alert" not in page
    assert "49" not in re.findall(r'class="prompt">(.*?)</span>', page, re.DOTALL)[0]
    assert page.count("<script") == 4  # the data and the code of the loss charts and of the passage


def test_script_data_cannot_end_its_element(page: str) -> None:
    data = re.findall(r'<script type="application/json" id="routing">(.*?)</script>', page, re.DOTALL)[0]
    parsed = json.loads(data)
    assert parsed["layers"] == [1, 3] and parsed["steps"] == 2
    assert "<" not in data
    num_tokens = page.count('<span class="t"')
    assert all(len(step) == num_tokens for trace in parsed["traces"] for layer in trace["selected"] for step in layer)


def test_equal_data_gives_equal_bytes(page: str, run_dir: Path, itt_dir: Path) -> None:
    assert render_report(measure(run_dir, export_dir=itt_dir, text=NASTY)) == page


def test_a_run_with_nan_is_drawn_and_the_defect_told(tmp_path: Path) -> None:
    lines = [*run_lines(), training_line(21, loss=math.nan)]
    page = render_report(measure(write_run(tmp_path / "run", lines)))
    assert "first at step 21" in page
    assert "<svg" in page
    assert "nan" not in page.lower().replace("nanmean", "")


def test_an_empty_run_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = render_report(measure(tmp_path))
    assert "metrics.jsonl is missing" in page
    assert "No loss was logged" in page
    assert "no validation results" in page
    assert "No evaluation results were given" in page


def test_a_model_without_router_has_a_page_without_passage(tmp_path: Path, llama_dir: Path) -> None:
    run = write_run(tmp_path / "run", [training_line(1), validation_line(1, (None,))], kind="none")
    data = measure(run, export_dir=llama_dir, text="import os")
    page = render_report(data)
    assert "This model has no router" in page
    assert data.sample is not None and data.sample.prompt == "import os"
    assert "LLaMA transformer trained on" in page and "no routing" in page


def test_a_run_with_one_validation_claims_no_fall(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [validation_line(0), training_line(1)]))
    assert "Validation loss at step 0, the only one validated, was 6.393 nats" in summary(run)


def test_evaluation_tasks_of_the_run_are_charted_and_tabled(tmp_path: Path) -> None:
    def line(step: int, accuracy: float) -> dict[str, Any]:
        entry = {"task": "arc_easy", "budget": [0.5, 0.25], "num_samples": 500, "acc": accuracy, "bits_per_byte": 1.25}
        other = {**entry, "budget": [1.0, 1.0], "acc": accuracy + 0.01}
        return {"step": step, "tasks": [entry, other]}

    run = read_run(write_run(tmp_path / "run", [training_line(1), line(1, 0.2), line(2, 0.3)]))
    (table,) = tasks_tables(run)
    assert table.header == ["task", "metric", "50/25% (as trained)", "100%"]
    assert table.rows == [["arc_easy", "acc", "30.0", "31.0"], ["arc_easy", "bits_per_byte", "1.25", "1.25"]]
    page = render_report(measure(tmp_path / "run"))
    assert "Tasks during training, after step 2" in page and "Accuracy of evaluation tasks" in page
    assert "No evaluation results were given" not in page


def test_a_run_without_validation_tells_its_training_loss(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [training_line(1), training_line(2)]))
    assert "Training loss went from 5.700 to 5.415" in summary(run)
    assert budget_table(run) is None


def test_the_passage_is_traced_at_the_trained_and_the_validated_budgets(run_dir: Path) -> None:
    budgets = passage_budgets((0.5, 0.25), read_run(run_dir))
    assert budgets == [(0.25, 0.25), (0.5, 0.25), (1.0, 1.0)]
    assert passage_budgets((0.5,), read_run(run_dir)) == [(0.5,)]  # those of other lengths do not fit


def test_budgets_and_numbers_are_written_for_readers(run_dir: Path) -> None:
    assert [percent(budget) for budget in ((0.5, 0.5), (0.9, 0.7, 0.5), None)] == ["50%", "90/70/50%", "-"]
    assert [short_number(value) for value in (12.0, 4_915_200, 52.4e9)] == ["12", "4.92 M", "52.4 B"]
    assert read_run(run_dir).trained_budget == (0.5, 0.25)


def test_versions_of_the_evaluation_are_listed_where_they_differ() -> None:
    pairs = versions({"packages": {"torch": "2.13.0"}}, {"versions": {"torch": "2.13.0", "lm_eval": "0.4.13"}})
    assert pairs == {"torch": "2.13.0", "lm_eval (evaluation)": "0.4.13"}


def test_empty_text_is_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        measure(run_dir, text=" ")


def test_the_command_writes_the_page_and_keeps_an_existing_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "report.html"
    arguments = ["--run", str(tmp_path), "--output", str(output)]
    assert run(["report", *arguments]) == 0
    assert str(output) in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        run(["report", *arguments])
    assert run(["report", *arguments, "--overwrite"]) == 0


def test_a_run_of_drawn_shares_is_shown_at_the_budget_nearest_to_their_middle(tmp_path: Path) -> None:
    budgets = [[0.05, 0.05, 0.05], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]
    rows = [{"budget": budget, "domain": "code", "loss": 4.0, "perplexity": 1.0} for budget in budgets]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 20, "validation": rows}) + "\n", encoding="utf-8")
    for sample, nearest in (([0.1, 1.0], 0.5), ([0.7, 1.0], 0.9), ([0.01, 0.1], 0.05)):
        recipe = {"thinking": {"kind": "itt", "capacity": {"sample": sample, "steps": 3}}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        assert read_run(tmp_path).main_budget == (nearest,) * 3

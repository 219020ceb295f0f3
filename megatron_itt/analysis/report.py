"""One self-contained HTML page about a run and its export: no network, no fonts, all text escaped.

`measure` runs the model (`passage.py`), `render_report` only writes; `write_report` does both. The template, the style
sheet and the script lie in `templates/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_itt import __version__
from megatron_itt.analysis.collect import RunRecord, read_run
from megatron_itt.analysis.passage import PassageTrace, Sample, continue_text, first_words, trace_passage
from megatron_itt.analysis.run_charts import (
    Budget,
    Table,
    budget_figures,
    budget_table,
    loss_figure,
    main_budget,
    show_budget,
    small_figures,
    trained_budget_of,
)
from megatron_itt.analysis.summary import list_versions, make_tiles, tell_summary
from megatron_itt.errors import DataError, IttError
from megatron_itt.evaluation.exported_model import ExportedModel, format_budget, load_export
from megatron_itt.evaluation.results import PAPER_TASKS, format_score, paper_comparison, read_results, scores_of
from megatron_itt.files import atomic_write

TEMPLATE_DIR = Path(__file__).parent / "templates"
_MAX_BUDGETS = 5
_CHANCE = {"heldout_continuation": "heldout_continuation has four choices: guessing scores 25%."}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything that the page shows, measured. What could not be measured is None, and a line of `problems`."""

    run: RunRecord
    num_parameters: int | None = None
    passage: PassageTrace | None = None
    passage_message: str = ""
    sample: Sample | None = None
    sample_message: str = ""
    evaluation: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


def write_report(
    run_dir: Path,
    *,
    output_html: Path,
    export_dir: Path | None = None,
    evaluation_json: Path | None = None,
    text: str | None = None,
    overwrite: bool = False,
) -> ReportData:
    """Measure what is there and write the page in one step. An empty `text` is refused."""
    if output_html.exists() and not overwrite:
        raise DataError(f"report {output_html} exists; choose another file or give --overwrite")
    data = measure(run_dir, export_dir=export_dir, evaluation_json=evaluation_json, text=text)
    output_html.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output_html, render_report(data))
    return data


def measure(
    run_dir: Path, *, export_dir: Path | None = None, evaluation_json: Path | None = None, text: str | None = None
) -> ReportData:
    """Read the run and the results, and run the export on `text`."""
    if text is not None and not text.strip():
        raise DataError("the text is empty; give a file with at least one word")
    run = read_run(run_dir)
    evaluation = read_results(evaluation_json) if evaluation_json is not None else None
    problems = list(run.problems)
    if export_dir is None:
        told = "No export was given, so no model was run."
        return ReportData(run=run, evaluation=evaluation, problems=problems, passage_message=told, sample_message=told)
    export = load_export(export_dir)
    facts: dict[str, Any] = {"num_parameters": sum(weight.numel() for weight in export.model.parameters())}
    if text is None:
        facts["passage_message"] = facts["sample_message"] = "No text was given."
    else:
        facts.update(_measure_text(export, text, run, problems))
    return ReportData(run=run, evaluation=evaluation, problems=problems, **facts)


def _measure_text(export: ExportedModel, text: str, run: RunRecord, problems: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if export.trained_budget is None:
        facts["passage_message"] = "This model has no router: every token takes the same number of steps."
    else:
        try:
            facts["passage"] = trace_passage(export, text, passage_budgets(export.trained_budget, run))
        except IttError as error:
            facts["passage_message"] = f"The passage could not be traced: {error}"
            problems.append(facts["passage_message"])
    try:
        facts["sample"] = continue_text(export, first_words(text, min(220, export.max_length)), export.trained_budget)
    except IttError as error:
        facts["sample_message"] = f"No sample could be written: {error}"
        problems.append(facts["sample_message"])
    return facts


def passage_budgets(trained: Budget, run: RunRecord) -> list[Budget]:
    """The budgets to trace: the trained one and those that the run validated, from the least to the most thinking."""
    validated = {point.budget for point in run.validation if point.budget is not None}
    others = sorted((b for b in validated if len(b) == len(trained) and b != trained), key=sum)
    return sorted([trained, *others[: _MAX_BUDGETS - 1]], key=lambda budget: (sum(budget), budget))


def render_report(data: ReportData) -> str:
    """The page as text; equal data gives equal bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        page=_page(data),
        style=Markup((TEMPLATE_DIR / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATE_DIR / "report.js").read_text(encoding="utf-8")),
    )


def _page(data: ReportData) -> dict[str, Any]:
    run = data.run
    trained, main = trained_budget_of(run), main_budget(run)
    final = run.final_validation()
    return {
        "title": run.name,
        "summary": tell_summary(run, data.num_parameters),
        "tiles": make_tiles(run, data.num_parameters),
        "problems": data.problems,
        "loss_chart": loss_figure(run),
        "loss_note": "" if main is None else f"Validation at thinking budget {show_budget(main)}.",
        "small_charts": small_figures(run),
        "budget_charts": budget_figures(run),
        "budget_table": budget_table(run),
        "budget_message": "The run has no validation results.",
        "trained_budget": None if trained is None else show_budget(trained),
        "validation_step": f"{final[0].step:,}" if final else "",
        "passage": _passage(data.passage, trained) if data.passage is not None else None,
        "passage_message": data.passage_message,
        "evaluation": evaluation_tables(data.evaluation) if data.evaluation is not None else [],
        "sample": _sample(data.sample) if data.sample is not None else None,
        "sample_message": data.sample_message,
        "versions": list_versions(run.environment, data.evaluation),
        "recipe": run.recipe_text,
        "package_version": __version__,
    }


def _passage(passage: PassageTrace, trained: Budget | None) -> dict[str, Any]:
    """What the template needs of a passage; the script gets the same numbers as JSON."""
    traces = passage.traces
    chosen = next((place for place, trace in enumerate(traces) if trace.budget == trained), 0)
    steps = traces[chosen].steps_per_token()
    most = max(1, len(traces[chosen].layers) * len(traces[chosen].budget))
    tokens = [
        {"text": text, "steps": count, "level": f"{count / most:.3f}"}
        for text, count in zip(passage.tokens, steps, strict=True)
    ]
    budgets = [
        {
            "value": format_budget(trace.budget),
            "name": show_budget(trace.budget) + (" (as trained)" if trace.budget == trained else ""),
            "chosen": place == chosen,
        }
        for place, trace in enumerate(traces)
    ]
    return {
        "tokens": tokens,
        "layers": traces[chosen].layers,
        "steps": range(1, len(traces[chosen].budget) + 1),
        "budgets": budgets,
        "left_out": " ".join(passage.notes()),
        "data": _as_script_data(passage),
    }


def _as_script_data(passage: PassageTrace) -> Markup:
    """Picks as strings of 0 and 1, scores with three digits; safe inside a script element."""
    traces = [
        {
            "picked": [["".join("01"[bit] for bit in step) for step in layer] for layer in trace.picked],
            "scores": [[[round(score, 3) for score in step] for step in layer] for layer in trace.scores],
            "thresholds": [[round(threshold, 3) for threshold in layer] for layer in trace.thresholds],
            "shares": [[round(share, 4) for share in layer] for layer in trace.shares()],
        }
        for trace in passage.traces
    ]
    first = passage.traces[0]
    data = {"layers": first.layers, "steps": len(first.budget), "traces": traces}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _sample(sample: Sample) -> dict[str, str]:
    return {
        "budget": "" if sample.budget is None else show_budget(sample.budget),
        "prompt": sample.prompt,
        "continuation": sample.continuation,
    }


def evaluation_tables(results: dict[str, Any]) -> list[Table]:
    """The scores per task and budget, and the perplexities of the export, as tables with standard errors."""
    tables = []
    trained = results.get("trained_budget")
    if results["runs"]:
        columns = [{(row["task"], row["metric"]): row for row in scores_of(run)} for run in results["runs"]]
        keys = list(dict.fromkeys(key for column in columns for key in column))
        labels = [_budget_name(run["thinking_budget"], trained) for run in results["runs"]]
        rows = [[*key, *_score_cells(columns, key)] for key in keys]
        limit = f"First {results['limit']} records of each task. " if results.get("limit") else ""
        note = "Accuracies in percent, with standard errors. " + limit
        note += " ".join(text for task, text in _CHANCE.items() if any(key[0] == task for key in keys))
        tables.append(Table(header=["task", "metric", *labels], rows=rows, note=note, num_text_columns=2))
    if results.get("perplexity"):
        tables.append(_perplexity_table(results["perplexity"], trained))
    tables += _paper_table(results)
    return tables


def _paper_table(results: dict[str, Any]) -> list[Table]:
    """Our rows under the paper's columns, above the paper's rows; nothing if none of its tasks was run."""
    rows = [[cell.replace("+/-", "\u00b1") for cell in row] for row in paper_comparison(results)]
    header = ["model", *(task.column for task in PAPER_TASKS), "average"]
    note = "Accuracy in percent. The paper trained on 50 B tokens."
    return [Table(heading="Beside the paper (Table 1)", header=header, rows=rows, note=note)] if rows else []


def _budget_name(budget: Sequence[float] | None, trained: Sequence[float] | None) -> str:
    if budget is None:
        return "no routing"
    return show_budget(budget) + (" (as trained)" if trained is not None and list(budget) == list(trained) else "")


def _score_cells(columns: Sequence[dict[tuple[str, str], dict[str, Any]]], key: tuple[str, str]) -> list[str]:
    found = [column.get(key) for column in columns]
    cells = [format_score(row["value"], row["stderr"], key[1]) if row else "-" for row in found]
    return [cell.replace("+/-", "\u00b1") for cell in cells]


def _perplexity_table(measured: Sequence[dict[str, Any]], trained: Sequence[float] | None) -> Table:
    rows = [
        [
            row["domain"],
            _budget_name(row["budget"], trained),
            f"{row['loss']:.4f} \u00b1 {row['loss_stderr']:.4f}",
            f"{row['perplexity']:,.2f}",
            f"{row['bits_per_byte']:.4f}",
        ]
        for row in sorted(measured, key=lambda row: (row["domain"], sum(row["budget"] or ())))
    ]
    return Table(
        heading="Perplexity of the export on held-out text",
        header=["domain", "thinking budget", "loss (nats per token)", "perplexity", "bits per byte"],
        rows=rows,
        note="Sliding windows over whole documents, tokens routed by threshold as in generation.",
        num_text_columns=2,
    )

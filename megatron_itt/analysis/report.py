"""Report page of a run and its export: one self-contained HTML file without network access, all text escaped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_itt import __version__
from megatron_itt.analysis import report_content as content
from megatron_itt.analysis.measurement import check_new, write_new
from megatron_itt.analysis.passage import Continuation, PassageTrace, continue_text, first_words, trace_passage
from megatron_itt.analysis.runs import Budget, RunRecord, percent, read_run
from megatron_itt.errors import DataError, IttError
from megatron_itt.evaluation.exported_model import ExportedModel, format_budget, load_export
from megatron_itt.evaluation.results import read_results

TEMPLATE_DIR = Path(__file__).parent / "templates"
_MAX_BUDGETS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """All measured content of the page. Content that could not be measured is None, and a line of `problems`."""

    run: RunRecord
    num_parameters: int | None = None
    passage: PassageTrace | None = None
    passage_message: str = ""
    sample: Continuation | None = None
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
    """Measure what is given and write the page atomically. An empty `text` is an error."""
    check_new(output_html, "report", overwrite=overwrite)
    data = measure(run_dir, export_dir=export_dir, evaluation_json=evaluation_json, text=text)
    write_new(output_html, render_report(data))
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
    found: dict[str, Any] = {}
    message = "No export was given, so no model was run."
    if export_dir is not None:
        export = load_export(export_dir)
        found["num_parameters"] = sum(weight.numel() for weight in export.model.parameters())
        message = "No text was given."
        if text is not None:
            found |= _run_export(export, text, run, problems)
    messages = {"passage_message": message, "sample_message": message}
    return ReportData(run=run, evaluation=evaluation, problems=problems, **{**messages, **found})


def _run_export(export: ExportedModel, text: str, run: RunRecord, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if export.trained_budget is None:
        found["passage_message"] = "This model has no router: every token takes the same number of steps."
    else:
        try:
            found["passage"] = trace_passage(export, text, passage_budgets(export.trained_budget, run))
        except IttError as error:
            found["passage_message"] = f"The passage could not be traced: {error}"
            problems.append(found["passage_message"])
    try:
        found["sample"] = continue_text(export, first_words(text, min(220, export.max_length)), export.trained_budget)
    except IttError as error:
        found["sample_message"] = f"No sample could be generated: {error}"
        problems.append(found["sample_message"])
    return found


def passage_budgets(trained: Budget, run: RunRecord) -> list[Budget]:
    """Return the budgets to trace, from the smallest to the largest: the trained one and validated ones."""
    validated = {point.budget for point in run.validation if point.budget is not None}
    others = sorted((b for b in validated if len(b) == len(trained) and b != trained), key=sum)
    return sorted([trained, *others[: _MAX_BUDGETS - 1]], key=lambda budget: (sum(budget), budget))


def render_report(data: ReportData) -> str:
    """Return the page as text; equal data gives equal bytes."""
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
    run, sample = data.run, data.sample
    final = run.final_validation()
    return {
        "title": run.name,
        "summary": content.summary(run, data.num_parameters),
        "tiles": content.tiles(run, data.num_parameters),
        "problems": data.problems,
        "loss_chart": content.loss_chart(run),
        "loss_note": "" if run.main_budget is None else f"Validation at thinking budget {percent(run.main_budget)}.",
        "small_charts": content.small_charts(run),
        "budget_charts": content.budget_charts(run),
        "budget_table": content.budget_table(run),
        "trained_budget": None if run.trained_budget is None else percent(run.trained_budget),
        "validation_step": f"{final[0].step:,}" if final else "",
        "passage": _passage(data.passage, run.trained_budget) if data.passage is not None else None,
        "passage_message": data.passage_message,
        "evaluation": content.evaluation_tables(data.evaluation) if data.evaluation is not None else [],
        "sample": sample,
        "sample_budget": "" if sample is None or sample.budget is None else percent(sample.budget),
        "sample_message": data.sample_message,
        "versions": content.versions(run.environment, data.evaluation),
        "recipe": run.recipe_text,
        "package_version": __version__,
    }


def _passage(passage: PassageTrace, trained: Budget | None) -> dict[str, Any]:
    """The values for the template; the script gets the same numbers as JSON."""
    shown = next((trace for trace in passage.traces if trace.budget == trained), passage.traces[0])
    most = max(1, len(shown.layers) * len(shown.budget))
    return {
        "tokens": [
            {"text": text, "steps": count, "level": f"{count / most:.3f}"}
            for text, count in zip(passage.tokens, shown.steps_per_token(), strict=True)
        ],
        "layers": shown.layers,
        "steps": range(1, len(shown.budget) + 1),
        "budgets": [
            {
                "value": format_budget(trace.budget),
                "name": content.budget_name(trace.budget, trained),
                "chosen": trace is shown,
            }
            for trace in passage.traces
        ],
        "left_out": " ".join(passage.notes()),
        "data": _script_data(passage),
    }


def _script_data(passage: PassageTrace) -> Markup:
    """Selected tokens as strings of 0 and 1, router weights with three digits; safe inside a script element."""
    traces = [
        {
            "selected": [["".join("01"[bit] for bit in step) for step in layer] for layer in trace.selected],
            "weights": [[[round(weight, 3) for weight in step] for step in layer] for layer in trace.weights],
            "thresholds": [[round(threshold, 3) for threshold in layer] for layer in trace.thresholds],
            "capacity": [[round(share, 4) for share in layer] for layer in trace.capacity()],
        }
        for trace in passage.traces
    ]
    data = {"layers": passage.traces[0].layers, "steps": len(passage.traces[0].budget), "traces": traces}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))

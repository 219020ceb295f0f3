"""Report page of runs on the same text: one self-contained HTML file without network access, all text escaped.

The first run is described in full, with its export; the others are compared with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_itt import __version__
from megatron_itt.analysis.curves import read_runs, training_costs
from megatron_itt.analysis.figures import AXES
from megatron_itt.analysis.measurement import check_new
from megatron_itt.analysis.passage import Continuation, PassageTrace, continue_text, first_words, trace_passage
from megatron_itt.analysis.report_charts import (
    budget_charts,
    domains_of,
    loss_charts,
    metric_charts,
    selected_shares,
    tasks_chart,
)
from megatron_itt.analysis.runs import ALL_DOMAINS, RunRecord, ValidationPoint, is_finite, overall_loss
from megatron_itt.errors import DataError, IttError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from megatron_itt.evaluation.options import Budget, format_budget, percent
from megatron_itt.evaluation.results import budget_label, format_score, read_results, result_tables, scores_of
from megatron_itt.tables import Table, write_text

Scores = dict[tuple[str, str], dict[Any, dict[str, Any]]]  # task and metric -> row of scores by run or by budget
TEMPLATE_DIR = Path(__file__).parent / "templates"
_MAX_BUDGETS = 5
_SOURCES = {"style": "report.css", "script": "report.js", "chart_script": "charts.js"}
_KINDS = {"itt": "Inner Thinking Transformer", "loop": "Looped transformer", "none": "LLaMA transformer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """All measured content of the page. Content that could not be measured is None, and a line of `problems`."""

    runs: dict[str, RunRecord]  # by name
    num_parameters: int | None = None
    passage: PassageTrace | None = None
    passage_message: str = ""
    sample: Continuation | None = None
    sample_message: str = ""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by run
    problems: list[str] = field(default_factory=list)

    @property
    def run(self) -> RunRecord:
        """The first run."""
        return next(iter(self.runs.values()))


def write_report(
    *run_dirs: Path,
    output_html: Path,
    export_dir: Path | None = None,
    evaluations: Sequence[Path] = (),
    text: str | None = None,
    overwrite: bool = False,
    refresh_s: float | None = None,
) -> ReportData:
    """Measure what is given and write the page atomically. An empty `text` is an error.

    With `refresh_s`, a browser loads the page again after that many seconds.
    """
    check_new(output_html, "report", overwrite=overwrite)
    data = measure(*run_dirs, export_dir=export_dir, evaluations=evaluations, text=text)
    write_text(output_html, render_report(data, refresh_s=refresh_s))
    return data


def measure(
    *run_dirs: Path, export_dir: Path | None = None, evaluations: Sequence[Path] = (), text: str | None = None
) -> ReportData:
    """Read the runs and their results, and run the export of the first on `text`. DataError if runs do not compare."""
    if text is not None and not text.strip():
        raise DataError("the text is empty; give a file with at least one word")
    if evaluations and len(evaluations) != len(run_dirs):
        raise DataError(f"{len(evaluations)} evaluations for {len(run_dirs)} runs; give one per run, in the same order")
    runs = read_runs(run_dirs)
    problems = [f"{name}: " * (len(runs) > 1) + problem for name, run in runs.items() for problem in run.problems]
    found: dict[str, Any] = {}
    message = "No export was given, so no model was run."
    if export_dir is not None:
        export = load_export(export_dir)
        found["num_parameters"] = sum(weight.numel() for weight in export.model.parameters())
        message = "No text was given."
        if text is not None:
            found |= _run_export(export, text, next(iter(runs.values())), problems)
    messages = {"passage_message": message, "sample_message": message}
    results = dict(zip(runs, map(read_results, evaluations), strict=False))
    return ReportData(runs=runs, evaluations=results, problems=problems, **{**messages, **found})


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


def render_report(data: ReportData, *, refresh_s: float | None = None) -> str:
    """Return the page as text; equal data gives equal bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"percent": percent, "budget": format_budget, "label": budget_label}
    run, evaluations = data.run, data.evaluations
    first = next(iter(evaluations.values()), None)
    losses, lines = loss_charts(data.runs)
    return environment.get_template("report.html.jinja").render(
        data=data,
        run=run,
        title=run.name if len(data.runs) == 1 else f"{len(data.runs)} runs",
        refresh_s=refresh_s,
        summary=summary(run) if len(data.runs) == 1 else comparison(data.runs),
        tiles=_tiles(run, data.num_parameters) if len(data.runs) == 1 else {},
        runs_table=runs_table(data.runs) if len(data.runs) > 1 else None,
        axes={axis: AXES[axis][0] for axis in losses},
        loss_charts=losses,
        lines=lines,
        small_charts=metric_charts(data.runs),
        budget_charts=budget_charts(_by_budget(run)),
        budget_table=budget_table(run),
        passage=None if data.passage is None else _passage(data.passage, run.trained_budget),
        tasks_chart=tasks_chart(run.tasks),
        evaluation=[
            *tasks_tables(run),
            *(result_tables(first) if first and len(data.runs) == 1 else evaluation_tables(evaluations)),
        ],
        versions=versions(run.environment, first),
        package_version=__version__,
        **{name: Markup((TEMPLATE_DIR / file).read_text(encoding="utf-8")) for name, file in _SOURCES.items()},
    )


def comparison(runs: Mapping[str, RunRecord]) -> str:
    """Return a sentence on the runs and their last validation losses, from the lowest to the highest."""
    losses = {name: run.main_validation()[-1][1] for name, run in runs.items() if run.main_validation()}
    ranked = ", ".join(f"{name} {losses[name]:.4f}" for name in sorted(losses, key=lambda name: losses[name]))
    found = f" Last validation loss in nats per token: {ranked}." if ranked else " No run was validated."
    return f"{len(runs)} runs on the same text.{found}"


def runs_table(runs: Mapping[str, RunRecord]) -> Table:
    """Return a row for each run: kind, steps, tokens, FLOPs, hours, speed, selected tokens, last validation loss."""
    header = ["run", "kind", "steps", "tokens", "training FLOPs", "hours", "tokens/s", "selected", "validation loss"]
    rows = []
    for name, run in runs.items():
        last = int(run.training[-1]["step"]) if run.training else 0
        costs, validated = training_costs(run)(last), run.main_validation()
        speeds, shares = [value for _, value in run.series("tokens_per_second")], selected_shares(run)
        cells = {
            "steps": f"{last:,}",
            "tokens": costs["tokens"] is not None and short_number(costs["tokens"]),
            "training FLOPs": costs["flops"] is not None and short_number(costs["flops"]),
            "hours": costs["seconds"] is not None and f"{costs['seconds'] / 3600:.3g}",
            "tokens/s": speeds and short_number(statistics.median(speeds)),
            "selected": shares and f"{shares[-1][1]:.1%}",
            "validation loss": validated and f"{validated[-1][1]:.4f}",
        }
        kind = str(run.section("thinking").get("kind") or "-")
        rows.append([name, kind, *(str(cells[column] or "-") for column in header[2:])])
    return Table(header=header, rows=rows, num_text_columns=2)


def evaluation_tables(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return the scores of several runs side by side, each at its trained budget or the first that was evaluated."""
    scores: Scores = {}
    for name, results in evaluations.items():
        trained = results.get("trained_budget")
        own = sorted(results["runs"], key=lambda result: result["thinking_budget"] != trained)
        for row in scores_of(own[0]) if own else []:
            scores.setdefault((row["task"], row["metric"]), {})[name] = row
    heading = "Tasks (mean +/- standard error; accuracies in percent)"
    return _score_tables(heading, scores, {name: name for name in evaluations})


def tasks_tables(run: RunRecord) -> list[Table]:
    """Return the table of the last evaluation in the training loop, a row per task and metric; [] without any."""
    scores: Scores = {}
    step = run.tasks[-1]["step"] if run.tasks else 0
    for entry in (entry for entry in run.tasks if entry["step"] == step):
        budget = None if entry["budget"] is None else tuple(entry["budget"])
        for name, value in entry.items():
            if name not in ("step", "task", "budget", "num_samples") and is_finite(value):
                row = {"metric": name, "value": value, "stderr": None}
                scores.setdefault((entry["task"], name), {})[budget] = row
    budgets = {budget: budget_label(budget, run.trained_budget) for cells in scores.values() for budget in cells}
    return _score_tables(f"Tasks during training, after step {step:,} (accuracies in percent)", scores, budgets)


def _score_tables(heading: str, scores: Scores, columns: Mapping[Any, str]) -> list[Table]:
    """A table with a row per task and metric, and a heading for each column; [] without scores."""
    rows = [[*key, *(format_score(cells.get(column)) for column in columns)] for key, cells in scores.items()]
    header = ["task", "metric", *columns.values()]
    return [Table(heading=heading, header=header, rows=rows, num_text_columns=2)] if rows else []


def summary(run: RunRecord) -> str:
    """Return a paragraph on what was trained on what, the change of the loss, and the effect of the budget."""
    domains = sorted({point.domain for point in run.validation} - {ALL_DOMAINS})
    kind = _KINDS.get(str(run.section("thinking").get("kind")), "Model")
    sentences = [f"{kind}{' trained on ' * bool(domains)}{', '.join(domains)}."]
    validated = run.main_validation()
    if validated:
        (first_step, first), (last_step, last) = validated[0], validated[-1]
        change = f"{'fell' if last < first else 'went'} from {first:.3f} to {last:.3f}"
        if first_step == last_step:
            change = f"at step {first_step:,}, the only one validated, was {first:.3f}"
        condition = ""
        if run.main_budget is not None:
            condition = f" when {percent(run.main_budget)} of the tokens are selected at each routed step"
        sentences.append(f"Validation loss {change} nats per token{condition}.")
    elif run.training:
        first, last = run.training[0]["loss"], run.training[-1]["loss"]
        sentences.append(f"Training loss went from {first:.3f} to {last:.3f} nats per token; no step was validated.")
    losses = {budget: overall_loss(points) for budget, points in _by_budget(run).items() if budget is not None}
    if len(losses) > 1:
        least, *_, most = losses
        best = min(losses, key=lambda budget: losses[budget])
        sentences.append(
            f"With the same weights, budgets from {percent(least)} to {percent(most)} of the tokens move it from "
            f"{losses[least]:.3f} to {losses[most]:.3f}; the lowest of {len(losses)} is {losses[best]:.3f} at "
            f"{budget_label(best, run.trained_budget)}."
        )
    return " ".join(sentences)


def _tiles(run: RunRecord, num_parameters: int | None) -> dict[str, str]:
    """The known figures for the top of the page."""
    last = run.training[-1] if run.training else {}
    tokens, validated = last.get("consumed_tokens"), run.main_validation()
    speeds, mfu = ([value for _, value in run.series(key)] for key in ("tokens_per_second", "mfu"))
    found = {
        "parameters": num_parameters and short_number(num_parameters),
        "training tokens": short_number(tokens) if tokens is not None and is_finite(tokens) else None,
        "steps": f"{last['step']:,}" if last else None,
        "validation loss (nats)": f"{validated[0][1]:.2f} \u2192 {validated[-1][1]:.2f}" if validated else None,
        "tokens per second (median)": short_number(statistics.median(speeds)) if speeds else None,
        "model FLOPs utilisation": f"{statistics.median(mfu):.1%}" if mfu and max(mfu) > 0 else None,
    }
    return {name: value for name, value in found.items() if value}


def versions(environment: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """Return names and versions from the run's environment.json (nested keys joined), then from the evaluation."""
    pairs = _flatten(environment)
    for name, version in ((evaluation or {}).get("versions") or {}).items():
        if str(version) not in (pairs.get(name), pairs.get(name.replace("_", "-"))):
            pairs[f"{name} (evaluation)"] = str(version)
    return pairs


def _flatten(values: Mapping[str, Any]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs |= _flatten(value)
        elif value is not None and value != "":
            pairs[str(key)] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return pairs


def short_number(value: float) -> str:
    """Format 1234567 as "1.23 M"."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def budget_table(run: RunRecord) -> Table | None:
    """Return perplexity per budget and domain after the last validation, and the overall loss; None without any."""
    domains, rows = domains_of(run.final_validation()), []
    for budget, points in _by_budget(run).items():
        by_domain = {point.domain: f"{point.perplexity:,.3f}" for point in points}
        cells = [by_domain.get(domain, "-") for domain in domains]
        rows.append([budget_label(budget, run.trained_budget), *cells, f"{overall_loss(points):.4f}"])
    header = ["thinking budget", *(f"perplexity, {domain}" for domain in domains), "loss over all (nats)"]
    return Table(header=header, rows=rows) if rows else None


def _by_budget(run: RunRecord) -> dict[Budget | None, list[ValidationPoint]]:
    """The last validation by budget, from the smallest to the largest."""
    final = run.final_validation()
    budgets = sorted({point.budget for point in final}, key=lambda budget: (sum(budget or ()), budget or ()))
    return {budget: [point for point in final if point.budget == budget] for budget in budgets}


def _passage(passage: PassageTrace, trained: Budget | None) -> dict[str, Any]:
    """The values for the template; the script gets the same numbers as JSON.

    Selected tokens are strings of 0 and 1, router weights have three digits.
    """
    shown = next((trace for trace in passage.traces if trace.budget == trained), passage.traces[0])
    most = max(1, len(shown.layers) * len(shown.budget))
    traces = [
        {
            "selected": [["".join("01"[bit] for bit in step) for step in layer] for layer in trace.selected],
            "weights": [[[round(weight, 3) for weight in step] for step in layer] for layer in trace.weights],
            "thresholds": [[round(threshold, 3) for threshold in layer] for layer in trace.thresholds],
            "capacity": [[round(share, 4) for share in layer] for layer in trace.capacity()],
        }
        for trace in passage.traces
    ]
    data = {"layers": shown.layers, "steps": len(shown.budget), "traces": traces}
    return {
        "tokens": [
            (text, n, f"{n / most:.3f}") for text, n in zip(passage.tokens, shown.steps_per_token(), strict=True)
        ],
        "shown": shown,
        "notes": " ".join(passage.notes()),
        "data": data,
    }

"""Report page of a run and its export: one self-contained HTML file without network access, all text escaped."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_itt import __version__
from megatron_itt.analysis.measurement import check_new
from megatron_itt.analysis.passage import Continuation, PassageTrace, continue_text, first_words, trace_passage
from megatron_itt.analysis.runs import ALL_DOMAINS, RunRecord, ValidationPoint, is_finite, overall_loss, read_run
from megatron_itt.errors import DataError, IttError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export
from megatron_itt.evaluation.options import Budget, format_budget, percent
from megatron_itt.evaluation.results import budget_label, read_results, result_tables
from megatron_itt.tables import Table, write_text

TEMPLATE_DIR = Path(__file__).parent / "templates"
_MAX_BUDGETS = 5
_MAX_POINTS = 500
_KINDS = {"itt": "Inner Thinking Transformer", "loop": "Looped transformer", "none": "LLaMA transformer"}
_SMALL_CHARTS = {
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
}


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
    write_text(output_html, render_report(data))
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
    environment.filters |= {"percent": percent, "budget": format_budget, "label": budget_label}
    run, evaluation = data.run, data.evaluation
    return environment.get_template("report.html.jinja").render(
        data=data,
        run=run,
        summary=summary(run),
        tiles=_tiles(run, data.num_parameters),
        loss_chart=_loss_chart(run),
        small_charts=[
            _draw(heading, {heading: run.series(key)}, "step")
            for key, heading in _SMALL_CHARTS.items()
            if len(run.series(key)) > 1
        ],
        budget_charts=_budget_charts(run),
        budget_table=budget_table(run),
        passage=None if data.passage is None else _passage(data.passage, run.trained_budget),
        evaluation=[] if evaluation is None else result_tables(evaluation),
        versions=versions(run.environment, evaluation),
        package_version=__version__,
        style=Markup((TEMPLATE_DIR / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATE_DIR / "report.js").read_text(encoding="utf-8")),
    )


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
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _loss_chart(run: RunRecord) -> Markup | None:
    """The training loss, and the validation loss of every domain at the main budget."""
    lines = {"training": run.series("loss")} if run.series("loss") else {}
    for domain in _domains(run.validation):
        points = [point for point in run.validation if point.domain == domain and point.budget == run.main_budget]
        if points:
            lines[f"validation, {domain}"] = [(float(point.step), point.loss) for point in points]
    return _draw("Loss against steps", lines, "step", "loss (nats per token)", size=(520, 230)) if lines else None


def _budget_charts(run: RunRecord) -> list[Markup]:
    """Perplexity of the last validation against the budget for every domain; [] for a single budget."""
    final = _by_budget(run)
    charts = []
    for domain in _domains(run.final_validation()) if len(final) > 1 else []:
        line = [(percent(b), point.perplexity) for b, own in final.items() for point in own if point.domain == domain]
        lines = {f"validation, {domain}": line}
        charts.append(_draw(f"Perplexity, {domain}", lines, "selected tokens per step", "perplexity"))
    return charts


def _draw(
    title: str, lines: Mapping[str, Sequence[tuple[Any, float]]], *labels: str, size: tuple[int, int] = (270, 180)
) -> Markup:
    """One line per entry; width and height in points."""
    from megatron_itt.analysis.figures import GREY, line_style, new_figure, render_inline, styled

    with styled():
        figure, [[axes]] = new_figure(width=size[0] / 72, height=size[1] / 72)
        for idx, (name, points) in enumerate(lines.items()):
            xs, ys = zip(*_thin_out(points), strict=True)
            style = line_style(idx - ("training" in lines))
            if name == "training":
                style = {"color": GREY, "linewidth": 1.0}
            elif not name.startswith("validation"):
                style["marker"] = ""
            axes.plot(xs, ys, label=name, **style)
        axes.set(title=title, **dict(zip(("xlabel", "ylabel"), labels, strict=False)))
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
        if len(lines) > 1:
            axes.legend()
        return Markup(render_inline(figure, title))


def _thin_out(points: Sequence[tuple[Any, float]]) -> Sequence[tuple[Any, float]]:
    """At most `_MAX_POINTS` points: means over neighbours where there are more."""
    size = -(-len(points) // _MAX_POINTS)
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def budget_table(run: RunRecord) -> Table | None:
    """Return perplexity per budget and domain after the last validation, and the overall loss; None without any."""
    domains, rows = _domains(run.final_validation()), []
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


def _domains(points: Sequence[ValidationPoint]) -> list[str]:
    """Domains by name, the one over all of them last."""
    return sorted({point.domain for point in points}, key=lambda domain: (domain == ALL_DOMAINS, domain))


def _passage(passage: PassageTrace, trained: Budget | None) -> dict[str, Any]:
    """The values for the template; the script gets the same numbers as JSON, safe inside a script element.

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
    script = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return {
        "tokens": [
            (text, n, f"{n / most:.3f}") for text, n in zip(passage.tokens, shown.steps_per_token(), strict=True)
        ],
        "shown": shown,
        "notes": " ".join(passage.notes()),
        "data": Markup(script.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")),
    }

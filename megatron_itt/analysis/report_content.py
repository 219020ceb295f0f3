"""Text, tables and charts of the report page, from the metrics of a run and the results of an evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from megatron_itt.analysis.runs import ALL_DOMAINS, Budget, RunRecord, ValidationPoint, is_finite, overall_loss, percent
from megatron_itt.evaluation.results import PAPER_TASKS, paper_comparison, score_rows

_KINDS = {"itt": "an Inner Thinking Transformer", "loop": "a looped transformer", "none": "a LLaMA transformer"}
_SMALL_CHARTS = (
    ("grad_norm", "Gradient norm", "norm"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("tokens_per_second", "Speed", "tokens per second"),
)
_MAX_POINTS = 500
_CHANCE = {"heldout_continuation": "heldout_continuation has four choices: guessing scores 25%."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart of a page, drawn for wide and for narrow windows."""

    heading: str
    wide: Markup
    narrow: Markup


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text cells; the first `num_text_columns` are words, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    heading: str = ""
    note: str = ""
    num_text_columns: int = 1


def summary(run: RunRecord, num_parameters: int | None) -> str:
    """Return a paragraph on what was trained on how much, the change of the loss, and the effect of the budget."""
    sentences = [_what_was_trained(run, num_parameters)]
    ends = _validation_ends(run)
    if ends is not None:
        change = f"{'fell' if ends[1] < ends[0] else 'went'} from {ends[0]:.3f} to {ends[1]:.3f}"
        if len({point.step for point in run.validation}) == 1:
            change = f"at step {run.validation[0].step:,}, the only one validated, was {ends[0]:.3f}"
        budget, condition = run.main_budget, ""
        if budget is not None:
            where = "the routed step" if len(budget) == 1 else f"each of {len(budget)} routed steps"
            condition = f" when {percent(budget)} of the tokens are selected at {where}"
        sentences.append(f"Validation loss {change} nats per token{condition}.")
    elif run.training:
        first, last = run.training[0]["loss"], run.training[-1]["loss"]
        sentences.append(f"Training loss went from {first:.3f} to {last:.3f} nats per token; nothing was validated.")
    sentences += _effect_of_budgets(run)
    speeds = [value for _, value in run.series("tokens_per_second")]
    if speeds:
        mfu = [value for _, value in run.series("mfu")]
        utilisation = f", {100 * statistics.median(mfu):.1f}% model FLOPs utilisation" if mfu and max(mfu) > 0 else ""
        sentences.append(f"Median speed: {short_number(statistics.median(speeds))} tokens per second{utilisation}.")
    return " ".join(sentences)


def _what_was_trained(run: RunRecord, num_parameters: int | None) -> str:
    subject, amount, text = _KINDS.get(str(run.section("thinking").get("kind")), "a model"), "", ""
    if num_parameters is not None:
        subject += f" of {short_number(num_parameters)} parameters"
        num_layers = run.section("model").get("num_layers")
        subject += f" and {num_layers} layers" if is_finite(num_layers) else ""
    if run.training:
        last = run.training[-1]
        amount = f" for {last['step']:,} steps"
        if is_finite(last.get("consumed_tokens")):
            amount += f" on {short_number(last['consumed_tokens'])} tokens"
        domains = sorted({point.domain for point in run.validation} - {ALL_DOMAINS})
        if domains:
            text = " of " + " and ".join(filter(None, [", ".join(domains[:-1]), domains[-1]]))
    return f"The run {run.name} trained {subject}{amount}{text}."


def _validation_ends(run: RunRecord) -> tuple[float, float] | None:
    """Validation loss over all domains at the main budget, at the first and at the last validated step."""
    points = [point for point in run.validation if point.budget == run.main_budget]
    if not points:
        return None
    first, last = (
        overall_loss([point for point in points if point.step == step]) for step in (points[0].step, points[-1].step)
    )
    return first, last


def _effect_of_budgets(run: RunRecord) -> list[str]:
    final = run.final_validation()
    budgets = [budget for budget in _budgets(final) if budget is not None]
    if len(budgets) < 2:
        return []
    losses = {budget: overall_loss([p for p in final if p.budget == budget]) for budget in budgets}
    least, most = budgets[0], budgets[-1]
    best = min(budgets, key=lambda budget: losses[budget])
    return [
        f"With the same weights, budgets from {percent(least)} to {percent(most)} of the tokens move it from "
        f"{losses[least]:.3f} to {losses[most]:.3f}; the lowest of {len(budgets)} is {losses[best]:.3f} at "
        f"{percent(best)}{', as trained' if best == run.trained_budget else ''}."
    ]


def tiles(run: RunRecord, num_parameters: int | None) -> list[dict[str, str]]:
    """Return name and value of the known figures for the top of the page."""
    last = run.training[-1] if run.training else {}
    speeds = [value for _, value in run.series("tokens_per_second")]
    ends = _validation_ends(run)
    tokens = last.get("consumed_tokens")
    found = {
        "parameters": short_number(num_parameters) if num_parameters is not None else None,
        "training tokens": short_number(tokens) if tokens is not None and is_finite(tokens) else None,
        "steps": f"{last['step']:,}" if last else None,
        "validation loss (nats)": f"{ends[0]:.2f} \u2192 {ends[1]:.2f}" if ends else None,
        "tokens per second": short_number(statistics.median(speeds)) if speeds else None,
    }
    return [{"name": name, "value": value} for name, value in found.items() if value is not None]


def versions(environment: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return names and versions from the run's environment.json (nested keys joined), then from the evaluation."""
    pairs = dict(_flatten(environment))
    for name, version in ((evaluation or {}).get("versions") or {}).items():
        if str(version) not in (pairs.get(name), pairs.get(name.replace("_", "-"))):
            pairs[f"{name} (evaluation)"] = str(version)
    return list(pairs.items())


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value)
        elif value is not None and value != "":
            pairs.append((str(key), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return pairs


def short_number(value: float) -> str:
    """Format 1234567 as "1.23 M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def loss_chart(run: RunRecord) -> Chart | None:
    """Draw the training loss, and the validation loss of every domain at the main budget; None without any."""
    lines = {"training": run.series("loss")} if run.series("loss") else {}
    for domain in _domains(run.validation):
        points = [point for point in run.validation if point.domain == domain and point.budget == run.main_budget]
        if points:
            lines[f"validation, {domain}"] = [(float(point.step), point.loss) for point in points]
    if not lines:
        return None
    return _draw("Loss against steps", lines, ("step", "loss (nats per token)"), heading="", sizes=(700, 250, 310, 230))


def small_charts(run: RunRecord) -> list[Chart]:
    """Draw gradient norm, learning rate and speed, as far as they were logged."""
    found = [(run.series(key), heading, label) for key, heading, label in _SMALL_CHARTS if len(run.series(key)) > 1]
    return [_draw(heading, {heading: points}, ("step", label)) for points, heading, label in found]


def budget_charts(run: RunRecord) -> list[Chart]:
    """Draw the perplexity of the last validation against the budget for every domain; [] for a single budget."""
    final = run.final_validation()
    budgets = _budgets(final)
    if len(budgets) < 2:
        return []
    charts = []
    for domain in _domains(final):
        by_budget = {point.budget: point.perplexity for point in final if point.domain == domain}
        lines = {
            f"validation, {domain}": [(percent(budget), by_budget[budget]) for budget in budgets if budget in by_budget]
        }
        title = f"Perplexity by thinking budget, {domain}"
        charts.append(_draw(title, lines, ("selected tokens per step", "perplexity"), heading=f"Perplexity, {domain}"))
    return charts


def _draw(
    title: str,
    lines: Mapping[str, Sequence[tuple[Any, float]]],
    labels: tuple[str, str],
    *,
    heading: str | None = None,
    sizes: tuple[int, int, int, int] = (270, 180, 310, 200),
) -> Chart:
    """One line per entry; `sizes` are width and height in points for wide and for narrow windows."""
    from megatron_itt.analysis.figure_style import GREY, line_style, new_figure, render_inline, styled

    drawn = []
    for width, height in (sizes[:2], sizes[2:]):
        with styled():
            figure, [[axes]] = new_figure(width=width / 72, height=height / 72)
            for idx, (name, points) in enumerate(lines.items()):
                xs, ys = zip(*_thin_out(points), strict=True)
                style = line_style(idx - ("training" in lines))
                if name == "training":
                    style = {"color": GREY, "linewidth": 1.0}
                elif not name.startswith("validation"):
                    style["marker"] = ""
                axes.plot(xs, ys, label=name, **style)
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
            axes.ticklabel_format(axis="y", scilimits=(-3, 6))
            if len(lines) > 1:
                axes.legend()
            drawn.append(Markup(render_inline(figure, title)))
    return Chart(heading=title if heading is None else heading, wide=drawn[0], narrow=drawn[1])


def _thin_out(points: Sequence[tuple[Any, float]]) -> Sequence[tuple[Any, float]]:
    """At most `_MAX_POINTS` points: means over neighbours where there are more."""
    size = -(-len(points) // _MAX_POINTS)
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def budget_table(run: RunRecord) -> Table | None:
    """Return perplexity per budget and domain after the last validation, and the overall loss; None without any."""
    final = run.final_validation()
    if not final:
        return None
    domains = _domains(final)
    rows = []
    for budget in _budgets(final):
        points = [point for point in final if point.budget == budget]
        by_domain = {point.domain: f"{point.perplexity:,.3f}" for point in points}
        cells = [by_domain.get(domain, "-") for domain in domains]
        rows.append([budget_name(budget, run.trained_budget), *cells, f"{overall_loss(points):.4f}"])
    header = ["thinking budget", *(f"perplexity, {domain}" for domain in domains), "loss over all (nats)"]
    return Table(header=header, rows=rows)


def budget_name(budget: Sequence[float] | None, trained: Sequence[float] | None) -> str:
    """Format a budget for a table; the one of training is marked."""
    if budget is None:
        return "no routing"
    return percent(budget) + " (as trained)" * (trained is not None and list(budget) == list(trained))


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return scores per task and budget, perplexities of the export, and the paper's Table 1 beside ours."""
    results = dict(results)
    trained, tables = results.get("trained_budget"), []
    if results["runs"]:
        rows = [[row[0], row[1], *row[3:]] for row in score_rows(results)]
        limit = f"First {results['limit']} records of each task. " if results.get("limit") else ""
        note = "Accuracies in percent, with standard errors. " + limit
        note += " ".join(text for task, text in _CHANCE.items() if any(row[0] == task for row in rows))
        header = ["task", "metric", *(budget_name(run["thinking_budget"], trained) for run in results["runs"])]
        tables.append(Table(header=header, rows=rows, note=note, num_text_columns=2))
    if results.get("perplexity"):
        tables.append(_perplexity_table(results["perplexity"], trained))
    if comparison := paper_comparison(results):
        header = ["model", *(task.column for task in PAPER_TASKS), "average"]
        note = "Accuracy in percent. The paper trained on 50 B tokens."
        tables.append(Table(heading="Beside the paper (Table 1)", header=header, rows=comparison, note=note))
    for table in tables:
        table.rows[:] = [[cell.replace("+/-", "\u00b1") for cell in row] for row in table.rows]
    return tables


def _perplexity_table(measured: Sequence[dict[str, Any]], trained: Sequence[float] | None) -> Table:
    rows = [
        [
            row["domain"],
            budget_name(row["budget"], trained),
            f"{row['loss']:.4f} +/- {row['loss_stderr']:.4f}",
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


def _domains(points: Sequence[ValidationPoint]) -> list[str]:
    """Domains by name, the one over all of them last."""
    return sorted({point.domain for point in points}, key=lambda domain: (domain == ALL_DOMAINS, domain))


def _budgets(points: Sequence[ValidationPoint]) -> list[Budget | None]:
    """Budgets from the smallest to the largest."""
    return sorted({point.budget for point in points}, key=lambda budget: (sum(budget or ()), budget or ()))

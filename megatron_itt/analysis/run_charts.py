"""The charts and tables of a run's metrics, ready for the page. Numbers come from `collect.py`, ink from `svg.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from megatron_itt.analysis.collect import ALL_DOMAINS, RunRecord, ValidationPoint, overall_loss
from megatron_itt.analysis.svg import NUM_STYLES, Chart, Series, draw_chart, draw_key

Budget = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One chart drawn for wide and for narrow windows, with its legend as (line sample, name)."""

    heading: str
    wide: Markup
    narrow: Markup
    legend: list[dict[str, object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text cells; the first `num_text_columns` are words, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    heading: str = ""
    note: str = ""
    num_text_columns: int = 1


def show_budget(budget: Sequence[float] | None) -> str:
    """Write a budget for readers: "50%" where all steps are equal, else "90/70/50%"; "-" without routing."""
    if budget is None:
        return "-"
    shares = [f"{100 * share:g}" for share in budget]
    return (shares[0] if len(set(shares)) == 1 else "/".join(shares)) + "%"


def trained_budget_of(run: RunRecord) -> Budget | None:
    """The shares that the recipe trains with, or None for a model without routing or an unknown recipe."""
    thinking = run.recipe.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("kind") != "itt":
        return None
    capacity = thinking.get("capacity")
    return tuple(float(share) for share in capacity) if isinstance(capacity, list) and capacity else None


def main_budget(run: RunRecord) -> Budget | None:
    """The budget that stands for a run: the trained one, or the nearest to the middle of those drawn, or the first."""
    budgets = [point.budget for point in run.validation]
    trained = trained_budget_of(run)
    if trained in budgets or not budgets:
        return trained
    drawn, given = _drawn_shares(run), [budget for budget in budgets if budget]
    if drawn is None or not given:
        return budgets[0]
    return min(given, key=lambda budget: abs(sum(budget) / len(budget) - sum(drawn) / 2))


def _drawn_shares(run: RunRecord) -> list[float] | None:
    """Lowest and highest share that training draws, if it does."""
    thinking = run.recipe.get("thinking")
    capacity = thinking.get("capacity") if isinstance(thinking, dict) else None
    drawn = capacity.get("sample") if isinstance(capacity, dict) else None
    return drawn if isinstance(drawn, list) and len(drawn) == 2 else None


def draw_figure(chart: Chart, *, heading: str = "", num_columns: int = 1) -> Figure:
    """Draw a chart over the full width of the page, or as one of `num_columns` side by side."""
    wide = {1: (960, 340), 2: (470, 250)}.get(num_columns, (320, 210))
    narrow = (360, 270) if num_columns == 1 else (360, 230)
    named = len(chart.series) > 1
    legend: list[dict[str, object]] = [
        {"key": Markup(draw_key(series)), "name": series.name} for series in chart.series if named
    ]
    return Figure(
        heading=heading,
        wide=Markup(draw_chart(chart, width=wide[0], height=wide[1])),
        narrow=Markup(draw_chart(chart, width=narrow[0], height=narrow[1])),
        legend=legend,
    )


def loss_figure(run: RunRecord) -> Figure | None:
    """Training loss, and the validation loss of every domain at the main budget, against steps; None without any."""
    series = []
    training = run.series("loss")
    if training:
        series.append(Series(name="training", points=training, style=NUM_STYLES - 1, faint=True))
    budget = main_budget(run)
    for place, domain in enumerate(_domains(run.validation)):
        points = [(float(p.step), p.loss) for p in run.validation if p.domain == domain and p.budget == budget]
        if points:
            name = f"validation, {domain}"
            series.append(Series(name=name, points=points, style=place % (NUM_STYLES - 1), markers=True))
    if not series:
        return None
    return draw_figure(
        Chart(title="Loss against steps", x_label="step", y_label="loss (nats per token)", series=series)
    )


def small_figures(run: RunRecord) -> list[Figure]:
    """Gradient norm, learning rate and speed, as far as they were logged."""
    wanted = (
        ("grad_norm", "Gradient norm", "norm"),
        ("learning_rate", "Learning rate", "learning rate"),
        ("tokens_per_second", "Speed", "tokens per second"),
    )
    charts = [
        Chart(title=heading, x_label="step", y_label=label, series=[Series(name=heading, points=run.series(key))])
        for key, heading, label in wanted
        if len(run.series(key)) > 1
    ]
    return [draw_figure(chart, heading=chart.title, num_columns=max(2, len(charts))) for chart in charts]


def budget_figures(run: RunRecord) -> list[Figure]:
    """Perplexity of the last validation against the thinking budget, one panel per domain; none for a single budget."""
    final = run.final_validation()
    budgets = _budgets(final)
    if len(budgets) < 2:
        return []
    figures, domains = [], _domains(final)
    for place, domain in enumerate(domains):
        by_budget = {point.budget: point.perplexity for point in final if point.domain == domain}
        points = [(float(idx), by_budget[budget]) for idx, budget in enumerate(budgets) if budget in by_budget]
        chart = Chart(
            title=f"Perplexity by thinking budget, {domain}",
            x_label="tokens that think at each step",
            y_label="perplexity",
            series=[Series(name=domain, points=points, style=place % (NUM_STYLES - 1), markers=True)],
            categories=[show_budget(budget) for budget in budgets],
        )
        figures.append(draw_figure(chart, heading=f"Perplexity, {domain}", num_columns=max(2, len(domains))))
    return figures


def budget_table(run: RunRecord) -> Table | None:
    """Perplexity per budget and domain after the last validation, and the overall loss; None without validation."""
    final = run.final_validation()
    if not final:
        return None
    domains, trained = _domains(final), trained_budget_of(run)
    rows = []
    for budget in _budgets(final):
        points = [point for point in final if point.budget == budget]
        by_domain = {point.domain: point.perplexity for point in points}
        name = show_budget(budget) if budget is not None else "no routing"
        name += " (as trained)" if budget is not None and budget == trained else ""
        cells = [f"{by_domain[domain]:,.3f}" if domain in by_domain else "-" for domain in domains]
        rows.append([name, *cells, f"{overall_loss(points):.4f}"])
    header = ["thinking budget", *(f"perplexity, {domain}" for domain in domains), "loss over all (nats)"]
    return Table(header=header, rows=rows)


def _domains(points: Sequence[ValidationPoint]) -> list[str]:
    """Domains by name, the one over all of them last."""
    return sorted({point.domain for point in points}, key=lambda domain: (domain == ALL_DOMAINS, domain))


def _budgets(points: Sequence[ValidationPoint]) -> list[Budget | None]:
    """Budgets from the least to the most thinking."""
    return sorted({point.budget for point in points}, key=lambda budget: (sum(budget or ()), budget or ()))

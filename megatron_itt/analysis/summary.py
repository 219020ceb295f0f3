"""The words of the page: what was trained and what came out, in one paragraph and a few tiles, from real figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_itt.analysis.collect import ALL_DOMAINS, RunRecord, is_finite, overall_loss
from megatron_itt.analysis.run_charts import Budget, main_budget, show_budget, trained_budget_of

_KINDS = {"itt": "an Inner Thinking Transformer", "loop": "a looped transformer", "none": "a LLaMA transformer"}


def validation_ends(run: RunRecord) -> tuple[float, float] | None:
    """Validation loss over all domains at the main budget, at the first and at the last validated step."""
    budget = main_budget(run)
    points = [point for point in run.validation if point.budget == budget]
    steps = sorted({point.step for point in points})
    if not steps:
        return None
    first, last = (overall_loss([p for p in points if p.step == step]) for step in (steps[0], steps[-1]))
    return first, last


def tell_summary(run: RunRecord, num_parameters: int | None) -> str:
    """One paragraph: what was trained on how much, how far the loss fell, and what the thinking budget changes."""
    sentences = [_what_was_trained(run, num_parameters)]
    ends = validation_ends(run)
    if ends is not None:
        budget = main_budget(run)
        at = "" if budget is None else f" when {_share_phrase(budget)}"
        change = f"{'fell' if ends[1] < ends[0] else 'went'} from {ends[0]:.3f} to {ends[1]:.3f}"
        if len({point.step for point in run.validation}) == 1:
            change = f"at step {run.validation[0].step:,}, the only one validated, was {ends[0]:.3f}"
        sentences.append(f"Validation loss {change} nats per token{at}.")
    elif run.training:
        first, last = run.training[0]["loss"], run.training[-1]["loss"]
        sentences.append(f"Training loss went from {first:.3f} to {last:.3f} nats per token; nothing was validated.")
    sentences += _tell_budgets(run)
    sentences += _tell_speed(run)
    return " ".join(sentences)


def make_tiles(run: RunRecord, num_parameters: int | None) -> list[dict[str, str]]:
    """Name, value and unit of the figures at the top of the page; only those that are known."""
    tiles = []
    if num_parameters is not None:
        tiles.append({"name": "parameters", "value": short_number(num_parameters), "unit": ""})
    last = run.training[-1] if run.training else {}
    if is_finite(last.get("consumed_tokens")):
        tiles.append({"name": "training tokens", "value": short_number(last["consumed_tokens"]), "unit": ""})
    if run.training:
        tiles.append({"name": "steps", "value": f"{last['step']:,}", "unit": ""})
    ends = validation_ends(run)
    if ends is not None:
        value = f"{ends[0]:.2f} \u2192 {ends[1]:.2f}"
        tiles.append({"name": "validation loss (nats)", "value": value, "unit": ""})
    speeds = [value for _, value in run.series("tokens_per_second")]
    if speeds:
        tiles.append({"name": "tokens per second", "value": short_number(statistics.median(speeds)), "unit": ""})
    return tiles


def list_versions(environment: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Names and versions from the run's environment.json (nested keys joined), then from the evaluation."""
    pairs = dict(_flatten(environment))
    for name, version in ((evaluation or {}).get("versions") or {}).items():
        if str(version) not in (pairs.get(name), pairs.get(name.replace("_", "-"))):
            pairs[f"{name} (evaluation)"] = str(version)
    return list(pairs.items())


def short_number(value: float) -> str:
    """Write 1234567 as "1.23 M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value)
        elif value is not None and value != "":
            pairs.append((str(key), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return pairs


def _what_was_trained(run: RunRecord, num_parameters: int | None) -> str:
    thinking = run.recipe.get("thinking") or {}
    model = run.recipe.get("model") or {}
    subject = _KINDS.get(str(thinking.get("kind")), "a model")
    size = "" if num_parameters is None else f" of {short_number(num_parameters)} parameters"
    layers = f" and {model['num_layers']} layers" if size and is_finite(model.get("num_layers")) else ""
    amount = ""
    if run.training:
        last = run.training[-1]
        amount = f" for {last['step']:,} steps"
        if is_finite(last.get("consumed_tokens")):
            amount += f" on {short_number(last['consumed_tokens'])} tokens"
    domains = sorted({point.domain for point in run.validation} - {ALL_DOMAINS})
    text = f" of {_join(domains)}" if amount and domains else ""
    return f"The run {run.name} trained {subject}{size}{layers}{amount}{text}."


def _tell_budgets(run: RunRecord) -> list[str]:
    final = run.final_validation()
    budgets = sorted({point.budget for point in final if point.budget is not None}, key=sum)
    if len(budgets) < 2:
        return []
    losses = {budget: overall_loss([p for p in final if p.budget == budget]) for budget in budgets}
    least, most = budgets[0], budgets[-1]
    best = min(budgets, key=lambda budget: losses[budget])
    told = (
        f"With the same weights, budgets from {show_budget(least)} to {show_budget(most)} of the tokens move it "
        f"from {losses[least]:.3f} to {losses[most]:.3f}; the lowest of {len(budgets)} is {losses[best]:.3f} at "
        f"{show_budget(best)}"
    )
    trained = trained_budget_of(run)
    return [told + (", as trained." if best == trained else ".")]


def _tell_speed(run: RunRecord) -> list[str]:
    speeds = [value for _, value in run.series("tokens_per_second")]
    if not speeds:
        return []
    mfu = [value for _, value in run.series("mfu")]
    utilisation = f", {100 * statistics.median(mfu):.1f}% model FLOPs utilisation" if mfu and max(mfu) > 0 else ""
    return [f"It ran at {short_number(statistics.median(speeds))} tokens per second in the median{utilisation}."]


def _share_phrase(budget: Budget) -> str:
    where = "the routed step" if len(budget) == 1 else f"each of {len(budget)} routed steps"
    return f"{show_budget(budget)} of the tokens think again at {where}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

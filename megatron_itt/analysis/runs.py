"""Run folders: metrics, recipe and versions of a run, with every defect named.

A damaged or unfinished run is read as far as possible; `RunRecord.problems` lists what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_itt.config.load import parse_config
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.evaluation.options import Budget

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
ALL_DOMAINS = "all"  # the validation entry over all held-out tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationPoint:
    """Validation loss (nats per token) of one domain at one thinking budget after `step` training steps."""

    step: int
    budget: Budget | None
    domain: str
    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run folder in memory. `training` holds the training lines of metrics.jsonl with a finite loss, by step; `tasks`
    the metrics of evaluation tasks, {step, task, budget, num_samples, metrics by name}, the last ones last.
    """

    name: str
    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of a training metric where it is a finite number."""
        return [(float(row["step"]), float(row[key])) for row in self.training if is_finite(row.get(key))]

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the recipe; {} if it is missing."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}

    def final_validation(self) -> list[ValidationPoint]:
        """Return the validation points of the last validated step."""
        last = max((point.step for point in self.validation), default=0)
        return [point for point in self.validation if point.step == last]

    def main_validation(self) -> list[tuple[int, float]]:
        """Return (step, loss over all domains) of every validation at the main budget."""
        by_step: dict[int, list[ValidationPoint]] = {}
        for point in self.validation:
            if point.budget == self.main_budget:
                by_step.setdefault(point.step, []).append(point)
        return [(step, overall_loss(points)) for step, points in sorted(by_step.items())]

    @property
    def config(self) -> RunConfig | None:
        """The recipe, checked; None where it is missing or of another version."""
        try:
            return parse_config(self.recipe) if self.recipe else None
        except ConfigError:
            return None

    @property
    def trained_budget(self) -> Budget | None:
        """The thinking budget of the recipe; None without routing or without a recipe."""
        capacity = self.section("thinking").get("capacity") if self.section("thinking").get("kind") == "itt" else None
        return tuple(map(float, capacity)) if isinstance(capacity, list) and capacity else None

    @property
    def main_budget(self) -> Budget | None:
        """The budget of the run's curves: trained, or nearest to the middle of the sampled range, or the first."""
        budgets = [point.budget for point in self.validation]
        if self.trained_budget in budgets or not budgets:
            return self.trained_budget
        capacity = self.section("thinking").get("capacity")
        sampled = capacity.get("sample") if isinstance(capacity, dict) else None
        given = [budget for budget in budgets if budget]
        if not isinstance(sampled, list) or len(sampled) != 2 or not given:
            return budgets[0]
        return min(given, key=lambda budget: abs(sum(budget) / len(budget) - sum(sampled) / 2))


def is_finite(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def overall_loss(points: Sequence[ValidationPoint]) -> float:
    """Return the loss of the domain "all", else the mean over domains with equal weights; NaN without points."""
    losses = [point.loss for point in points if point.domain == ALL_DOMAINS] or [point.loss for point in points]
    return sum(losses) / len(losses) if losses else math.nan


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder. DataError if it does not exist; every other defect becomes a line of `problems`."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the logging.run_dir of a recipe")
    problems: list[str] = []

    def read(name: str, consequence: str) -> str:
        if (run_dir / name).is_file():
            return (run_dir / name).read_text(encoding="utf-8", errors="replace")
        problems.append(f"{name} is missing: {consequence}.")
        return ""

    lines = _parse_metrics(read(METRICS_FILE, "the run has no curves"), problems)
    training, validation = _training_lines(lines, problems), _validation_points(lines, problems)
    recipe_text = read(RECIPE_FILE, "the recipe of the run is unknown")
    environment = read(ENVIRONMENT_FILE, "the versions of the training run are unknown")
    run = RunRecord(
        name=run_dir.resolve().name,
        training=training,
        validation=validation,
        tasks=[{"step": line["step"], **entry} for line in lines for entry in line.get("tasks") or []],
        recipe=_parse_mapping(recipe_text, yaml.safe_load, f"{RECIPE_FILE} is not valid YAML", problems),
        recipe_text=recipe_text,
        environment=_parse_mapping(environment or "{}", json.loads, f"{ENVIRONMENT_FILE} is not valid JSON", problems),
        problems=problems,
    )
    num_steps = run.section("schedule").get("steps")
    if training and isinstance(num_steps, int) and training[-1]["step"] < num_steps:
        problems.append(f"The run has not finished: it is at step {training[-1]['step']:,} of {num_steps:,}.")
    return run


def _parse_mapping(text: str, parse: Callable[[str], Any], fault: str, problems: list[str]) -> dict[str, Any]:
    try:
        found = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{fault} ({' '.join(str(error).split())[:120]}).")
        return {}
    return found if isinstance(found, dict) else {}


def _parse_metrics(text: str, problems: list[str]) -> list[dict[str, Any]]:
    lines, damaged = [], []
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(row or "0")
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif row.strip():
            damaged.append(number)
    if damaged:
        problems.append(f"{METRICS_FILE}: {len(damaged)} unreadable line(s) left out (first: line {damaged[0]}).")
    return lines


def _training_lines(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """Training lines by step; after a resume the later line of a step counts."""
    by_step = {line["step"]: line for line in lines if "loss" in line}
    if lines and not by_step:
        problems.append("metrics.jsonl has no training line with a loss.")
    broken = sorted(step for step, line in by_step.items() if not is_finite(line["loss"]))
    if broken:
        problems.append(
            f"Training loss is not a finite number at {len(broken)} logged step(s), first at step {broken[0]:,}; "
            "these points are not drawn."
        )
    return [by_step[step] for step in sorted(set(by_step) - set(broken))]


def _validation_points(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[ValidationPoint]:
    rows = [(line["step"], row) for line in lines for row in line.get("validation") or []]
    found: dict[tuple[int, Budget | None, str], ValidationPoint] = {}
    for step, row in rows:
        if is_finite(row.get("loss")):
            budget = None if row.get("budget") is None else tuple(map(float, row["budget"]))
            domain, loss, perplexity = str(row.get("domain", ALL_DOMAINS)), float(row["loss"]), row.get("perplexity")
            perplexity = float(perplexity) if is_finite(perplexity) else math.exp(min(loss, 700.0))
            found[step, budget, domain] = ValidationPoint(
                step=step, budget=budget, domain=domain, loss=loss, perplexity=perplexity
            )
    num_broken = sum(not is_finite(row.get("loss")) for _, row in rows)
    if num_broken:
        problems.append(f"Validation loss is not a finite number at {num_broken} point(s); these are not drawn.")
    if lines and not found:
        problems.append("metrics.jsonl has no validation line: there is no validation loss to show.")
    return sorted(found.values(), key=lambda point: (point.step, point.domain, point.budget or ()))

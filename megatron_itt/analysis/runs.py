"""Run folders: metrics, recipe and versions of a run, with every defect named.

A damaged or unfinished run is read as far as possible; `RunRecord.problems` lists what is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_itt.errors import DataError

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
ALL_DOMAINS = "all"  # the validation entry over all held-out tokens

Budget = tuple[float, ...]


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
    """A run folder in memory. `training` holds the training lines of metrics.jsonl with a finite loss, by step."""

    name: str
    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
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


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder. DataError if it does not exist; every other defect becomes a line of `problems`."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the logging.run_dir of a recipe")
    problems: list[str] = []
    lines = _read_metrics(run_dir / METRICS_FILE, problems)
    training = _training_lines(lines, problems)
    validation = _validation_points(lines, problems)
    recipe_text = _read_text(run_dir / RECIPE_FILE, problems, "the recipe of the run is unknown")
    recipe = _parse_recipe(recipe_text, problems)
    run = RunRecord(
        name=run_dir.resolve().name,
        training=training,
        validation=validation,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_environment(run_dir / ENVIRONMENT_FILE, problems),
        problems=problems,
    )
    num_steps = run.section("schedule").get("steps")
    if training and isinstance(num_steps, int) and training[-1]["step"] < num_steps:
        problems.append(f"The run has not finished: it is at step {training[-1]['step']:,} of {num_steps:,}.")
    return run


def overall_loss(points: Sequence[ValidationPoint]) -> float:
    """Return the loss of the domain "all", else the mean over domains with equal weights; NaN without points."""
    losses = [point.loss for point in points if point.domain == ALL_DOMAINS] or [point.loss for point in points]
    return sum(losses) / len(losses) if losses else math.nan


def percent(budget: Sequence[float] | None) -> str:
    """Format a budget as "50%" where all steps are equal, else as "90/70/50%"; "-" without routing."""
    if budget is None:
        return "-"
    shares = [f"{100 * share:g}" for share in budget]
    return (shares[0] if len(set(shares)) == 1 else "/".join(shares)) + "%"


def _read_text(path: Path, problems: list[str], consequence: str) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    problems.append(f"{path.name} is missing: {consequence}.")
    return ""


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    lines, damaged = [], []
    for number, text in enumerate(_read_text(path, problems, "the run has no curves").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged.append(number)
    if damaged:
        problems.append(f"{path.name}: {len(damaged)} unreadable line(s) left out (first: line {damaged[0]}).")
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
    found: dict[tuple[int, Budget | None, str], ValidationPoint] = {}
    rows = [(line["step"], row) for line in lines for row in line.get("validation") or []]
    for step, row in rows:
        if not is_finite(row.get("loss")):
            continue
        budget = None if row.get("budget") is None else tuple(map(float, row["budget"]))
        domain, loss, perplexity = str(row.get("domain", ALL_DOMAINS)), float(row["loss"]), row.get("perplexity")
        found[(step, budget, domain)] = ValidationPoint(
            step=step,
            budget=budget,
            domain=domain,
            loss=loss,
            perplexity=float(perplexity) if is_finite(perplexity) else math.exp(min(loss, 700.0)),
        )
    num_broken = sum(not is_finite(row.get("loss")) for _, row in rows)
    if num_broken:
        problems.append(f"Validation loss is not a finite number at {num_broken} point(s); these are not drawn.")
    if lines and not found:
        problems.append("metrics.jsonl has no validation line: there is no validation loss to show.")
    return sorted(found.values(), key=lambda point: (point.step, point.domain, point.budget or ()))


def _parse_recipe(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{RECIPE_FILE} is not valid YAML ({' '.join(str(error).split())[:120]}).")
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _read_text(path, problems, "the versions of the training run are unknown")
    try:
        environment = json.loads(text or "{}")
    except ValueError:
        problems.append(f"{path.name} is not valid JSON.")
        return {}
    return environment if isinstance(environment, dict) else {}

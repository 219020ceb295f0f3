"""What a run folder says about its run: metrics, recipe, versions, and everything that is wrong with them.

A damaged or unfinished run is still read as far as it goes; `RunRecord.problems` says what is missing. Measuring an
export is `passage.py`; nothing is drawn here.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationPoint:
    """Validation loss (nats per token) of one domain at one thinking budget after `step` training steps."""

    step: int
    budget: tuple[float, ...] | None
    domain: str
    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run folder in memory. `training` holds the training lines of metrics.jsonl, by step, finite losses only."""

    name: str
    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one training metric, where it is a finite number."""
        rows = [row for row in self.training if is_finite(row.get(key))]
        return [(float(row["step"]), float(row[key])) for row in rows]

    def final_validation(self) -> list[ValidationPoint]:
        """The validation points of the last step that has any."""
        last = max((point.step for point in self.validation), default=0)
        return [point for point in self.validation if point.step == last]


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run folder. Only a missing folder is an error; every other defect becomes a line of `problems`."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the logging.run_dir of a recipe")
    problems: list[str] = []
    lines = _read_metrics(run_dir / METRICS_FILE, problems)
    training = _training_lines(lines, problems)
    validation = _validation_points(lines, problems)
    recipe_text = _read_text(run_dir / RECIPE_FILE, problems)
    recipe = _parse_recipe(recipe_text, problems)
    _check_finished(recipe, training, problems)
    return RunRecord(
        name=run_dir.resolve().name,
        training=training,
        validation=validation,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_environment(run_dir / ENVIRONMENT_FILE, problems),
        problems=problems,
    )


def overall_loss(points: Sequence[ValidationPoint]) -> float:
    """Loss over all domains: the point of the domain "all", else the mean with equal weights; NaN without any."""
    whole = [point.loss for point in points if point.domain == ALL_DOMAINS]
    losses = whole or [point.loss for point in points]
    return sum(losses) / len(losses) if losses else math.nan


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append(f"{path.name} is missing: the run has no curves.")
        return []
    lines, damaged = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            damaged.append(number)
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged.append(number)
    if damaged:
        problems.append(f"{path.name}: {len(damaged)} unreadable line(s) left out (first: line {damaged[0]}).")
    return lines


def _training_lines(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """Training lines by step; after a resume the later line of a step counts. Non-finite losses are reported."""
    by_step = {line["step"]: line for line in lines if "loss" in line}
    if lines and not by_step:
        problems.append("metrics.jsonl has no training line with a loss.")
    broken = sorted(step for step, line in by_step.items() if not is_finite(line["loss"]))
    if broken:
        problems.append(
            f"Training loss is not a finite number at {len(broken)} logged step(s), first at step {broken[0]:,}; "
            "these points are not drawn."
        )
    return [by_step[step] for step in sorted(by_step) if step not in set(broken)]


def _validation_points(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[ValidationPoint]:
    found: dict[tuple[int, tuple[float, ...] | None, str], ValidationPoint] = {}
    num_broken = 0
    for line in lines:
        for row in line.get("validation") or []:
            loss = row.get("loss")
            if not is_finite(loss):
                num_broken += 1
                continue
            budget = None if row.get("budget") is None else tuple(float(share) for share in row["budget"])
            domain = str(row.get("domain", ALL_DOMAINS))
            perplexity = row.get("perplexity")
            found[(line["step"], budget, domain)] = ValidationPoint(
                step=line["step"],
                budget=budget,
                domain=domain,
                loss=float(loss),
                perplexity=float(perplexity) if is_finite(perplexity) else math.exp(min(float(loss), 700.0)),
            )
    if num_broken:
        problems.append(f"Validation loss is not a finite number at {num_broken} point(s); these are not drawn.")
    if lines and not found:
        problems.append("metrics.jsonl has no validation line: there is no validation loss to show.")
    return sorted(found.values(), key=lambda point: (point.step, point.domain, point.budget or ()))


def _read_text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        problems.append(f"{path.name} is missing: the recipe of the run is not known.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _parse_recipe(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        problems.append(f"{RECIPE_FILE} is not valid YAML ({' '.join(str(error).split())[:120]}).")
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _check_finished(recipe: dict[str, Any], training: Sequence[dict[str, Any]], problems: list[str]) -> None:
    schedule = recipe.get("schedule")
    wanted = schedule.get("steps") if isinstance(schedule, dict) else None
    if training and isinstance(wanted, int) and training[-1]["step"] < wanted:
        problems.append(f"The run has not finished: it stands at step {training[-1]['step']:,} of {wanted:,}.")


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append(f"{path.name} is missing: the versions of the training run are not known.")
        return {}
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        problems.append(f"{path.name} is not valid JSON.")
        return {}
    return environment if isinstance(environment, dict) else {}

"""A small made-up run folder in the format of the training loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

BUDGETS = ([0.25, 0.25], [0.5, 0.25], [1.0, 1.0])
DOMAINS = ("code", "docs", "all")


def training_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": step,
        "loss": 6.0 * 0.95**step,
        "grad_norm": 1.5,
        "learning_rate": 3e-4,
        "consumed_tokens": 1000 * step,
        "tokens_per_second": 2000.0 + step,
        "mfu": 0.0,
    }
    return {**line, **changes}


def routing_line(step: int) -> dict[str, Any]:
    """A training line with what the routers did: two thinking layers of two routed steps."""
    entries = [
        {
            "layer": layer,
            "step": routed,
            "phi_norm": 0.5 + 0.01 * step,
            "score_mean": 0.1 * routed,
            "score_std": 0.3,
            "threshold": 0.02 * step,
            "share": 0.5 / routed,
            "position_share": None,
        }
        for layer in (1, 3)
        for routed in (1, 2)
    ]
    return training_line(step, routing=entries)


def real_recipe(kind: str, **data: Any) -> dict[str, Any]:
    """A recipe that loads, of the shape of the metrics above."""
    capacity = {"none": [], "loop": [1.0, 1.0], "itt": [0.5, 0.25]}[kind]
    return {
        "model": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 500,
            "seq_length": 125,
        },
        "thinking": {"kind": kind, "capacity": capacity},
        "batch": {"global": 8},
        "schedule": {"steps": 20},
        "data": {"tokenizer": "tok", "blend": {"code": {"path": "data/code", "weight": 1.0}}, **data},
        "logging": {"run_dir": "runs/x"},
    }


def validation_line(step: int, budgets: tuple[list[float] | None, ...] = BUDGETS) -> dict[str, Any]:
    rows = []
    for budget in budgets:
        for place, domain in enumerate(DOMAINS):
            loss = 6.0 * 0.95**step + 0.2 * place - 0.01 * sum(budget or ())
            rows.append({"budget": budget, "domain": domain, "loss": loss, "perplexity": math.exp(loss)})
    return {"step": step, "validation": rows}


def run_lines(num_steps: int = 20) -> list[dict[str, Any]]:
    lines = [validation_line(0), *(training_line(step) for step in range(1, num_steps + 1))]
    return [*lines, validation_line(num_steps)]


def write_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    *,
    kind: str = "itt",
    num_steps: int = 1,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write metrics.jsonl, recipe.yaml and environment.json."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in (run_lines() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if recipe is None:
        recipe = {"model": {"num_layers": 4}, "thinking": {"kind": kind, "capacity": [0.5, 0.25]}}
        recipe["schedule"] = {"steps": num_steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    environment = {"python": "3.11", "packages": {"torch": "2.13.0"}, "git_hash": "abc"}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return folder

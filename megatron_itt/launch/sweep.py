"""Sweep of a recipe over lists of values: a folder with one run for each combination. No torch.

ROOT/sweep.json   the resolved recipe, and the values of each key
ROOT/runs.txt     the arguments of each run, a line for each task of a Slurm array
ROOT/NAME/        the run folders, named by their values
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_itt.config.load import dump_config, load_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.snapshot import find_changes
from megatron_itt.tables import write_json, write_text

SWEEP_FILE, RUNS_FILE = "sweep.json", "runs.txt"
_UNSAFE = re.compile(r"[^A-Za-z0-9.,=+-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """One combination: its values by key, its folder, and the arguments of `itt train`."""

    values: dict[str, str]
    run_dir: Path
    arguments: tuple[str, ...]
    seed: int


def plan_sweep(recipe: str, words: Sequence[str], root: Path) -> list[SweepRun]:
    """Return the runs of `key=a,b,c` words in order; the last key varies fastest. One value applies to all runs.

    ConfigError for a key or value that the recipe refuses, in any combination, and where nothing is swept.
    """
    fixed, swept = [], {}
    for word in words:
        key, _, text = word.partition("=")
        values = _split(text)
        if len(values) < 2:
            fixed.append(word)
        elif key == "logging.run_dir" or key in swept or len(set(values)) < len(values):
            raise ConfigError(f"{word}: give each key once, without equal values, and --root in place of run folders")
        else:
            swept[key] = values
    if not swept:
        raise ConfigError("nothing is swept; give a key several values, such as optimizer.learning_rate=1e-4,3e-4")
    runs = []
    for combination in product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        run_dir = root / _UNSAFE.sub("_", "_".join(f"{key.split('.')[-1]}={value}" for key, value in chosen.items()))
        own = [*fixed, *(f"{key}={value}" for key, value in chosen.items()), f"logging.run_dir={run_dir}"]
        seed = load_config(recipe, own).runtime.seed
        runs.append(SweepRun(values=chosen, run_dir=run_dir, arguments=(recipe, *own), seed=seed))
    if len({run.run_dir for run in runs}) < len(runs):
        raise ConfigError("two runs of the sweep would share a folder; give values that differ in letters and digits")
    return runs


def _split(text: str) -> list[str]:
    """Values between the commas that are in no list or mapping."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def claim_sweep(recipe: str, words: Sequence[str], root: Path) -> list[SweepRun]:
    """Return the runs after noting the sweep in its folder; ConfigError if that holds another sweep, or a run."""
    runs = plan_sweep(recipe, words, root)
    resolved = {run.run_dir.name: dump_config(load_config(recipe, run.arguments[1:])) for run in runs}
    for config in resolved.values():
        del config["logging"]["run_dir"]  # the folder may be moved
    sweep = {"recipe": recipe, "values": [run.values for run in runs], "runs": resolved}
    file = root / SWEEP_FILE
    if file.exists():
        changes = find_changes(read_sweep(root)["runs"], resolved)
        if changes:
            key, (old, new) = next(iter(changes.items()))
            texts = [str(value)[:60] for value in (old, new)]
            raise ConfigError(f"{root} holds another sweep ({key} was {texts[0]}, is {texts[1]}); give another --root")
    elif (root / "metrics.jsonl").exists() or (root / "code").exists():
        raise ConfigError(f"{root} is a run folder; give another --root for the sweep")
    try:
        write_json(file, sweep)
        write_text(root / RUNS_FILE, "".join(f"{shlex.join(run.arguments)}\n" for run in runs))
    except OSError as error:
        raise ConfigError(f"--root is {root}, which cannot be written ({error}); choose another") from None
    return runs


def read_sweep(root: Path) -> dict[str, Any]:
    """Return the content of ROOT/sweep.json. ConfigError if there is none."""
    try:
        return dict(json.loads((root / SWEEP_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{root} holds no sweep ({error}); start one with itt sweep") from None

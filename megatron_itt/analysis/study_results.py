"""What a study found: losses per variant with standard errors, paired differences, and a verdict for each claim.

Reads run folders ROOT/VARIANT/seed_N as `megatron_itt/study.py` makes them. Nothing is trained here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_itt.analysis.collect import RunRecord, overall_loss, read_run
from megatron_itt.analysis.curves import check_comparable, curves_of, tokens_to_reach
from megatron_itt.analysis.measurement import mean_and_error
from megatron_itt.analysis.run_charts import show_budget
from megatron_itt.analysis.study_claims import BEYOND_THE_SCALE, CLAIMS, Claim, Judgement, judge
from megatron_itt.errors import DataError
from megatron_itt.files import atomic_write
from megatron_itt.launch.refusals import finished_step
from megatron_itt.training.run_folder import DIVERGED_FILE

RunState = Literal["waiting", "interrupted", "finished", "diverged"]
MAIN_VARIANTS = ("llama", "loop_x4", "itt_x4")
BASELINE = "llama"
REFERENCE = "itt_x4"
# The same models, trained for as many steps as cost what the reference costs.
EQUAL_FLOPS = {"llama_equal_flops": "llama", "loop_x4_equal_flops": "loop_x4"}
ELASTIC = "elastic"
MIN_BUDGETS = 5
_DESCRIBED_SECTIONS = ("model", "data", "batch", "schedule", "optimizer", "validation")
_SHARED_SECTIONS = ("model", "batch", "schedule", "optimizer", "precision")
_PAPER_TOKENS_SHARE = 0.568
Curves = dict[int, dict[str, Any]]  # by seed


def seed_dir(root: Path, variant: str, seed: int) -> Path:
    """Where the run of a variant with a seed lies."""
    return root / variant / f"seed_{seed}"


def state_of(run_dir: Path) -> RunState:
    """How far a run is; a diverged one is not started again."""
    if finished_step(run_dir) is not None:
        return "finished"
    if (run_dir / DIVERGED_FILE).is_file():
        return "diverged"
    return "interrupted" if (run_dir / "checkpoints").is_dir() else "waiting"


def collect_study(root: Path) -> dict[str, Any]:
    """All finished runs under `root`, as data for JSON: `variants`, `judgements`, `problems`.

    DataError when there is no finished run, or when runs saw different text or differ in more than `thinking`.
    """
    records, problems = _finished_runs(root)
    if not records:
        raise DataError(f"{root} has no finished run; start the queue with itt study")
    check_comparable({f"{variant}/seed_{seed}": run for variant, runs in records.items() for seed, run in runs.items()})
    _check_settings(records)
    curves = {
        variant: {seed: curves_of(variant, run) for seed, run in runs.items()} for variant, runs in records.items()
    }
    rows = [_variant_row(variant, curves, records[variant]) for variant in sorted(curves, key=_table_place)]
    judgements = [
        *[_judge_claim(claim, curves) for claim in CLAIMS],
        _judge_reach(curves),
        _judge_elastic(records.get(ELASTIC, {})),
        *[
            Judgement(text=text, source="", verdict="not testable at this scale", reason=reason, differences=[])
            for text, reason in BEYOND_THE_SCALE
        ],
    ]
    first = next(iter((records.get(REFERENCE) or next(iter(records.values()))).values()))
    return {
        "recipe": {key: first.recipe.get(key) for key in _DESCRIBED_SECTIONS},
        "variants": rows,
        "judgements": [asdict(judgement) for judgement in judgements],
        "problems": problems,
    }


def paired_differences(better: Curves, worse: Curves) -> list[float]:
    """Last validation loss of `better` minus that of `worse`, for every seed that both have."""
    return [final_loss(better[seed]) - final_loss(worse[seed]) for seed in sorted(set(better) & set(worse))]


def final_loss(curve: dict[str, Any]) -> float:
    """The last validation loss."""
    return curve["validation"][-1]["loss"]


def write_study(study: Mapping[str, Any], output: Path) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(study, indent=1) + "\n"), (".md", study_markdown(study))):
        atomic_write(output.with_name(output.name + suffix), text)


def study_markdown(study: Mapping[str, Any]) -> str:
    """The tables for people."""
    model, batch, schedule = (study["recipe"].get(key) or {} for key in ("model", "batch", "schedule"))
    tokens = schedule.get("steps", 0) * batch.get("global", 0) * model.get("seq_length", 0)
    lines = [
        "# The study: LLaMA, Loop and ITT on the same text",
        "",
        f"{schedule.get('steps', 0):,} steps, {tokens:,} tokens a run, hidden size {model.get('hidden_size')}, "
        f"{model.get('num_layers')} layers. The seed decides initial weights and the order of the text; differences "
        "are paired by seed. +/- is the standard error between seeds. `_equal_flops`: trained, with the whole schedule,"
        f" for as many steps as cost what {REFERENCE} costs.",
        "",
        _told_of_routing(study["recipe"].get("validation") or {}),
        "",
        "| variant | seeds | validation loss | perplexity | minus LLaMA | minus ITT x4 | training TFLOPs | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in study["variants"]:
        cells = [
            row["variant"],
            str(len(row["losses"])),
            _with_error(row["loss"], row["loss_stderr"], ".4f"),
            f"{row['perplexity']:,.2f}",
            _with_error(row["minus_baseline"], row["minus_baseline_stderr"], "+.4f"),
            _with_error(row["minus_reference"], row["minus_reference_stderr"], "+.4f"),
            "-" if row["training_flops"] is None else f"{row['training_flops'] / 1e12:,.1f}",
            "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## The paper's claims", "", "| claim | verdict | found | paper |", "|---|---|---|---|"]
    for row in study["judgements"]:
        lines.append(f"| {row['text']} | {row['verdict']} | {row['reason']} | {row['source'] or '-'} |")
    if study["problems"]:
        lines += ["", "## Left out", "", *[f"- {problem}" for problem in study["problems"]]]
    return "\n".join(lines) + "\n"


def _told_of_routing(validation: Mapping[str, Any]) -> str:
    if validation.get("routing") == "threshold":
        return (
            "Who thinks in validation is decided by thresholds, which look at no later token; in top-p and other runs "
            "that are not trained with top-k by the rule of training."
        )
    return (
        "Who thinks in validation is decided as in training. Top-k over a sequence looks at later tokens, which LLaMA "
        "and Loop do not: ITT is flattered by an unknown amount (`validation.routing=threshold` is the causal rule)."
    )


def _finished_runs(root: Path) -> tuple[dict[str, dict[int, RunRecord]], list[str]]:
    """Runs that finished and have a validation loss, by variant and seed; and why others are not among them."""
    records: dict[str, dict[int, RunRecord]] = {}
    problems = []
    for run_dir in sorted(root.glob("*/seed_*")):
        name, seed = run_dir.parent.name, int(run_dir.name.removeprefix("seed_"))
        state = state_of(run_dir)
        if state != "finished":
            problems.append(f"{name}, seed {seed}: {state}")
            continue
        run = read_run(run_dir)
        if curves_of(name, run)["validation"]:
            records.setdefault(name, {})[seed] = run
        else:
            problems.append(f"{name}, seed {seed}: no validation loss")
    return records, problems


def _check_settings(records: Mapping[str, Mapping[int, RunRecord]]) -> None:
    """DataError when two runs differ in anything but `thinking`, the budgets they validate, and where they write."""
    runs = [(name, seed, run) for name, own in records.items() for seed, run in own.items()]
    first_name, first_seed, first = runs[0]
    for name, seed, run in runs[1:]:
        for section in _SHARED_SECTIONS:
            settings = [dict(record.recipe.get(section) or {}) for record in (first, run)]
            if section == "schedule" and {first_name, name} & set(EQUAL_FLOPS):
                settings = [{**own, "steps": None} for own in settings]
            if settings[0] != settings[1]:
                raise DataError(
                    f"{first_name}, seed {first_seed} and {name}, seed {seed} differ in {section} ({settings[0]} and "
                    f"{settings[1]}); remove the runs of the older recipe, or give another --root"
                )


def _variant_row(variant: str, curves: Mapping[str, Curves], runs: Mapping[int, RunRecord]) -> dict[str, Any]:
    own = curves[variant]
    losses = [final_loss(own[seed]) for seed in sorted(own)]
    loss, error = mean_and_error(losses)
    assert loss is not None, "a variant has at least one run"
    baseline = mean_and_error(paired_differences(own, curves.get(BASELINE, {})))
    reference = mean_and_error(paired_differences(own, curves.get(REFERENCE, {})))
    speeds = [value for run in runs.values() for _, value in run.series("tokens_per_second")]
    return {
        "variant": variant,
        "seeds": sorted(own),
        "losses": losses,
        "loss": loss,
        "loss_stderr": error,
        "perplexity": math.exp(loss),
        "minus_baseline": None if variant == BASELINE else baseline[0],
        "minus_baseline_stderr": None if variant == BASELINE else baseline[1],
        "minus_reference": None if variant == REFERENCE else reference[0],
        "minus_reference_stderr": None if variant == REFERENCE else reference[1],
        "training_flops": own[min(own)]["validation"][-1]["flops"],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def _judge_claim(claim: Claim, curves: Mapping[str, Curves]) -> Judgement:
    differences = paired_differences(curves.get(claim.better, {}), curves.get(claim.worse, {}))
    return judge(claim.text, claim.source, differences)


def _judge_reach(curves: Mapping[str, Curves]) -> Judgement:
    """Whether the reference meets the baseline's last loss with fewer tokens; differences are shares minus one."""
    text, source = (
        "ITT x4 reaches LLaMA's loss with fewer tokens",
        f"section 4.2: with {_PAPER_TOKENS_SHARE:.1%} of them",
    )
    base, own = curves.get(BASELINE, {}), curves.get(REFERENCE, {})
    seeds = sorted(set(base) & set(own))
    shares = [tokens_to_reach(own[seed], base[seed])["tokens_share"] for seed in seeds]
    if seeds and None in shares:
        reason = f"never reached with {shares.count(None)} of {len(seeds)} seeds"
        return Judgement(text=text, source=source, verdict="not reproduced", reason=reason, differences=[])
    judged = judge(text, source, [share - 1.0 for share in shares])
    if judged.mean is None:
        return judged
    told = f"at {1 + judged.mean:.1%} of the tokens; share minus 1: {judged.reason}"
    return Judgement(**{**asdict(judged), "reason": told})


def _judge_elastic(runs: Mapping[int, RunRecord]) -> Judgement:
    """Whether the loss of one checkpoint falls with each larger budget."""
    text = "from one elastic checkpoint, perplexity falls with the thinking budget"
    source = "Table 2; Figure 6, left"
    falls, told = [], []
    for seed, run in sorted(runs.items()):
        final = run.final_validation()
        budgets = sorted({point.budget for point in final if point.budget}, key=sum)
        losses = [overall_loss([point for point in final if point.budget == budget]) for budget in budgets]
        falls.append(len(budgets) >= MIN_BUDGETS and all(b < a for a, b in pairwise(losses)))
        told.append(
            f"seed {seed}: "
            + ", ".join(f"{loss:.4f} at {show_budget(at)}" for at, loss in zip(budgets, losses, strict=True))
        )
    if not runs:
        return Judgement(
            text=text, source=source, verdict="not testable at this scale", reason="no such run", differences=[]
        )
    verdict: Literal["reproduced", "not reproduced"] = "reproduced" if all(falls) else "not reproduced"
    return Judgement(text=text, source=source, verdict=verdict, reason="; ".join(told), differences=[])


def _table_place(variant: str) -> tuple[int, str]:
    """LLaMA, Loop and ITT by steps first, then the others by name."""
    known = ("llama", *EQUAL_FLOPS, "loop_x3", "loop_x4", "itt_x2", "itt_x3", "itt_x4")
    return (known.index(variant), "") if variant in known else (len(known), variant)


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} +/- {error:.4f}"


def shown_states(states: Mapping[str, int]) -> str:
    """As "12 finished, 1 diverged"."""
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "no runs"

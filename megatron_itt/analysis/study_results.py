"""Results of a study: losses per variant, paired differences by seed, and verdicts on the paper's claims.

Reads run folders ROOT/VARIANT/seed_N of `itt study`. A difference counts when it exceeds two standard errors of the
differences paired by seed (same text in the same order). One seed has no error, so it decides nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_itt.analysis.curves import check_comparable, curves_of, tokens_to_reach
from megatron_itt.analysis.measurement import mean_and_error, write_new
from megatron_itt.analysis.runs import RunRecord, overall_loss, percent, read_run
from megatron_itt.errors import DataError
from megatron_itt.launch.refusals import finished_step
from megatron_itt.training.run_folder import DIVERGED_FILE

RunState = Literal["waiting", "interrupted", "finished", "diverged"]
Verdict = Literal["reproduced", "not reproduced", "not testable at this scale"]
Curves = dict[int, dict[str, Any]]  # by seed

MAIN_VARIANTS = ("llama", "loop_x4", "itt_x4")
BASELINE = "llama"
REFERENCE = "itt_x4"
# The same models, trained for as many steps as cost what the reference costs.
EQUAL_FLOPS = {"llama_equal_flops": "llama", "loop_x4_equal_flops": "loop_x4"}
ELASTIC = "elastic"
MIN_BUDGETS = 5
NUM_ERRORS = 2.0
_UNTESTABLE: Verdict = "not testable at this scale"
_DESCRIBED_SECTIONS = ("model", "data", "batch", "schedule", "optimizer", "validation")
_SHARED_SECTIONS = ("model", "batch", "schedule", "optimizer", "precision")
_PAPER_TOKENS_SHARE = 0.568
_FIRST_ROWS = ("llama", *EQUAL_FLOPS, "loop_x3", "loop_x4", "itt_x2", "itt_x3", "itt_x4")


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim that the last validation loss of `better` is below that of `worse`."""

    text: str
    better: str
    worse: str
    source: str


CLAIMS = (
    Claim("ITT x4 beats LLaMA at equal tokens", "itt_x4", "llama", "Table 3: perplexity 10.25 against 11.13"),
    Claim(
        "ITT x4 beats Loop x4 at equal tokens", "itt_x4", "loop_x4", "Table 2: perplexity 10.25 to 10.52 against 10.78"
    ),
    Claim(
        "ITT x4 beats Loop x4 at equal training FLOPs", "itt_x4", "loop_x4_equal_flops", "section 4.2: 70% of the FLOPs"
    ),
    Claim(
        "ITT x4 beats LLaMA at equal training FLOPs",
        "itt_x4",
        "llama_equal_flops",
        "section 4.2: higher performance with the same FLOPs",
    ),
    Claim("Loop x4 beats LLaMA at equal tokens", "loop_x4", "llama", "Table 2: 10.78, 11.13"),
    Claim("three routed steps beat two", "itt_x4", "itt_x3", "Figure 5: x4 above x3"),
    Claim("two routed steps beat one", "itt_x3", "itt_x2", "Figure 5: x3 above x2"),
    Claim("residual thinking helps", "itt_x4", "without_residual_thinking", "Table 3: +0.77 without"),
    Claim("token routing helps", "itt_x4", "without_token_routing", "Table 3: +0.19 without"),
    Claim("step encoding helps", "itt_x4", "without_step_encoding", "Table 3: +0.31 without"),
    Claim("top-k beats top-p", "itt_x4", "top_p_routing", "Table 3: +0.09 with top-p"),
    Claim("sigmoid beats tanh", "itt_x4", "tanh_gate", "Table 3: +0.13 with tanh"),
    Claim(
        "reweighting the selected tokens only beats reweighting all",
        "itt_x4",
        "symmetric_reweighting",
        "Table 3: +0.16 with all",
    ),
)
# Claims that need the paper's sizes.
_BEYOND_THE_SCALE = (
    ("162M reaches 96.5% of a 466M Transformer's score", "needs both sizes and the ten tasks"),
    ("better at 10 of the tasks of Table 1", "models of this size answer them by chance"),
    ("the advantage grows with width (section 4.4)", "needs several sizes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A claim with its differences (better minus worse, nats per token; negative supports it) and the verdict."""

    text: str
    source: str
    verdict: Verdict
    reason: str
    differences: list[float]
    mean: float | None = None
    stderr: float | None = None


def judge(text: str, source: str, differences: Sequence[float]) -> Judgement:
    """Return the verdict on paired differences of the loss, one per seed."""
    mean, error = mean_and_error(differences)
    verdict: Verdict = "not reproduced"
    if mean is None:
        verdict, reason = _UNTESTABLE, "the runs are not there"
    elif error is None:
        verdict, reason = _UNTESTABLE, f"one seed only ({mean:+.4f}); run more"
    elif abs(mean) <= NUM_ERRORS * error:
        reason = f"{mean:+.4f} +/- {error:.4f}: within two standard errors of no difference"
    elif mean < 0:
        verdict, reason = "reproduced", f"{mean:+.4f} +/- {error:.4f}: beyond two standard errors"
    else:
        reason = f"{mean:+.4f} +/- {error:.4f}: the opposite, beyond two standard errors"
    return Judgement(
        text=text, source=source, verdict=verdict, reason=reason, differences=list(differences), mean=mean, stderr=error
    )


def seed_dir(root: Path, variant: str, seed: int) -> Path:
    """Return the run folder of a variant with a seed."""
    return root / variant / f"seed_{seed}"


def state_of(run_dir: Path) -> RunState:
    """Return the state of a run; a diverged one is not started again."""
    if finished_step(run_dir) is not None:
        return "finished"
    if (run_dir / DIVERGED_FILE).is_file():
        return "diverged"
    return "interrupted" if (run_dir / "checkpoints").is_dir() else "waiting"


def collect_study(root: Path) -> dict[str, Any]:
    """Return all finished runs under `root` as data for JSON: `variants`, `judgements`, `problems`.

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
    rows = [_variant_row(variant, curves, records[variant]) for variant in sorted(curves, key=_row_order)]
    judgements = [
        *[
            judge(row.text, row.source, paired_differences(curves.get(row.better, {}), curves.get(row.worse, {})))
            for row in CLAIMS
        ],
        _judge_reach(curves),
        _judge_elastic(records.get(ELASTIC, {})),
        *[
            Judgement(text=text, source="", verdict=_UNTESTABLE, reason=reason, differences=[])
            for text, reason in _BEYOND_THE_SCALE
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
    """Return the last validation loss of `better` minus that of `worse`, for every seed that both have."""
    return [_final_loss(better[seed]) - _final_loss(worse[seed]) for seed in sorted(set(better) & set(worse))]


def _final_loss(curve: dict[str, Any]) -> float:
    return curve["validation"][-1]["loss"]


def write_study(study: Mapping[str, Any], output: Path) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    write_new(output.with_name(f"{output.name}.json"), json.dumps(study, indent=1) + "\n")
    write_new(output.with_name(f"{output.name}.md"), study_markdown(study))


def study_markdown(study: Mapping[str, Any]) -> str:
    """Return OUTPUT.md: the losses per variant and the verdicts."""
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
        _routing_of_validation(study["recipe"].get("validation") or {}),
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


def _routing_of_validation(validation: Mapping[str, Any]) -> str:
    if validation.get("routing") == "threshold":
        return (
            "Tokens are selected by thresholds in validation, which look at no later token; in top-p and other runs "
            "that are not trained with top-k, by the rule of training."
        )
    return (
        "Tokens are selected in validation as in training. Top-k over a sequence looks at later tokens, which LLaMA "
        "and Loop do not: ITT is flattered by an unknown amount (`validation.routing=threshold` is the causal rule)."
    )


def _finished_runs(root: Path) -> tuple[dict[str, dict[int, RunRecord]], list[str]]:
    """Finished runs with a validation loss by variant and seed, and the reasons why others are left out."""
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
    """Raise DataError when two runs differ in more than `thinking`, validated budgets and output folders."""
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
    losses = [_final_loss(own[seed]) for seed in sorted(own)]
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
    return replace(judged, reason=f"at {1 + judged.mean:.1%} of the tokens; share minus 1: {judged.reason}")


def _judge_elastic(runs: Mapping[int, RunRecord]) -> Judgement:
    """Whether the loss of one checkpoint falls with each larger budget."""
    falls, reasons = [], []
    for seed, run in sorted(runs.items()):
        final = run.final_validation()
        budgets = sorted({point.budget for point in final if point.budget}, key=sum)
        losses = [overall_loss([point for point in final if point.budget == budget]) for budget in budgets]
        falls.append(len(budgets) >= MIN_BUDGETS and all(b < a for a, b in pairwise(losses)))
        found = [f"{loss:.4f} at {percent(budget)}" for budget, loss in zip(budgets, losses, strict=True)]
        reasons.append(f"seed {seed}: {', '.join(found)}")
    verdict: Verdict = _UNTESTABLE if not runs else "reproduced" if all(falls) else "not reproduced"
    return Judgement(
        text="from one elastic checkpoint, perplexity falls with the thinking budget",
        source="Table 2; Figure 6, left",
        verdict=verdict,
        reason="; ".join(reasons) or "no such run",
        differences=[],
    )


def _row_order(variant: str) -> tuple[int, str]:
    """LLaMA, Loop and ITT by steps first, then the others by name."""
    return (_FIRST_ROWS.index(variant), "") if variant in _FIRST_ROWS else (len(_FIRST_ROWS), variant)


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} +/- {error:.4f}"

"""Results of a study: losses per variant, paired differences by seed, and verdicts on the paper's claims.

Reads run folders ROOT/VARIANT/seed_N of `itt study`. A difference counts when it exceeds two standard errors of the
differences paired by seed (same text in the same order). One seed has no error, so it decides nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_itt.analysis.curves import check_comparable, curves_of, tokens_to_reach
from megatron_itt.analysis.measurement import mean_and_error
from megatron_itt.analysis.runs import RunRecord, overall_loss, read_run
from megatron_itt.errors import DataError
from megatron_itt.evaluation.options import percent
from megatron_itt.launch.refusals import finished_step
from megatron_itt.tables import Columns, table_of, with_error, write_json, write_text
from megatron_itt.training.run_folder import DIVERGED_FILE

RunState = Literal["waiting", "interrupted", "finished", "diverged"]
Row = dict[str, Any]
Curves = dict[int, Row]  # by seed

MAIN_VARIANTS = ("llama", "loop_x4", "itt_x4")
BASELINE = "llama"
REFERENCE = "itt_x4"
# The same models, trained for as many steps as cost what the reference costs.
EQUAL_FLOPS = {"llama_equal_flops": "llama", "loop_x4_equal_flops": "loop_x4"}
ELASTIC = "elastic"
MIN_BUDGETS = 5
NUM_ERRORS = 2.0
_UNTESTABLE = "not testable at this scale"
_DESCRIBED_SECTIONS = ("model", "data", "batch", "schedule", "optimizer", "validation")
_SHARED_SECTIONS = ("model", "batch", "schedule", "optimizer", "precision")
_FIRST_ROWS = ("llama", *EQUAL_FLOPS, "loop_x3", "loop_x4", "itt_x2", "itt_x3", "itt_x4")
# A claim that the last validation loss of one variant is below that of another: text, both variants, source.
CLAIMS = (
    ("ITT x4 beats LLaMA at equal tokens", "itt_x4", "llama", "Table 3: perplexity 10.25 against 11.13"),
    ("ITT x4 beats Loop x4 at equal tokens", "itt_x4", "loop_x4", "Table 2: perplexity 10.25 to 10.52 against 10.78"),
    (
        *("ITT x4 beats Loop x4 at equal training FLOPs", "itt_x4", "loop_x4_equal_flops"),
        "section 4.2: 70% of the FLOPs",
    ),
    (
        *("ITT x4 beats LLaMA at equal training FLOPs", "itt_x4", "llama_equal_flops"),
        "section 4.2: higher performance with the same FLOPs",
    ),
    ("Loop x4 beats LLaMA at equal tokens", "loop_x4", "llama", "Table 2: 10.78, 11.13"),
    ("three routed steps beat two", "itt_x4", "itt_x3", "Figure 5: x4 above x3"),
    ("two routed steps beat one", "itt_x3", "itt_x2", "Figure 5: x3 above x2"),
    ("residual thinking helps", "itt_x4", "without_residual_thinking", "Table 3: +0.77 without"),
    ("token routing helps", "itt_x4", "without_token_routing", "Table 3: +0.19 without"),
    ("step encoding helps", "itt_x4", "without_step_encoding", "Table 3: +0.31 without"),
    ("top-k beats top-p", "itt_x4", "top_p_routing", "Table 3: +0.09 with top-p"),
    ("sigmoid beats tanh", "itt_x4", "tanh_gate", "Table 3: +0.13 with tanh"),
    (
        *("reweighting the selected tokens only beats reweighting all", "itt_x4", "symmetric_reweighting"),
        "Table 3: +0.16 with all",
    ),
)
# Claims that need the paper's sizes.
_BEYOND_THE_SCALE = {
    "162M reaches 96.5% of a 466M Transformer's score": "needs both sizes and the ten tasks",
    "better at 10 of the tasks of Table 1": "models of this size answer them by chance",
    "the advantage grows with width (section 4.4)": "needs several sizes",
}


def judge(text: str, source: str, differences: Sequence[float]) -> Row:
    """Return the verdict on paired differences of the loss, one per seed (nats per token; negative supports the claim).

    Verdicts: reproduced, not reproduced, not testable at this scale.
    """
    mean, error = mean_and_error(differences)
    found = with_error(mean, error, "+.4f")
    if mean is None:
        verdict, reason = _UNTESTABLE, "the runs are not there"
    elif error is None:
        verdict, reason = _UNTESTABLE, f"one seed only ({found}); run more"
    elif abs(mean) <= NUM_ERRORS * error:
        verdict, reason = "not reproduced", f"{found}: within two standard errors of no difference"
    elif mean < 0:
        verdict, reason = "reproduced", f"{found}: beyond two standard errors"
    else:
        verdict, reason = "not reproduced", f"{found}: the opposite, beyond two standard errors"
    return {
        **_judgement(text, source, verdict, reason),
        "differences": list(differences),
        "mean": mean,
        "stderr": error,
    }


def _judgement(text: str, source: str, verdict: str, reason: str) -> Row:
    row = {"text": text, "source": source, "verdict": verdict, "reason": reason}
    return {**row, "differences": [], "mean": None, "stderr": None}


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
    records: dict[str, dict[int, RunRecord]] = {}
    curves: dict[str, Curves] = {}
    problems = []
    for run_dir in sorted(root.glob("*/seed_*")):
        name, seed, state = run_dir.parent.name, int(run_dir.name.removeprefix("seed_")), state_of(run_dir)
        if state == "finished":
            run = read_run(run_dir)
            curve = curves_of(name, run)
            if curve["validation"]:
                records.setdefault(name, {})[seed] = run
                curves.setdefault(name, {})[seed] = curve
                continue
        problems.append(f"{name}, seed {seed}: {'no validation loss' if state == 'finished' else state}")
    if not records:
        raise DataError(f"{root} has no finished run; start the queue with itt study")
    check_comparable({f"{variant}/seed_{seed}": run for variant, runs in records.items() for seed, run in runs.items()})
    _check_settings(records)
    first = next(iter((records.get(REFERENCE) or next(iter(records.values()))).values()))
    order = [*_FIRST_ROWS, *sorted(set(curves) - set(_FIRST_ROWS))]
    return {
        "recipe": {key: first.recipe.get(key) for key in _DESCRIBED_SECTIONS},
        "variants": [_variant_row(name, curves, records[name]) for name in order if name in curves],
        "judgements": [
            *(
                judge(text, source, paired_differences(curves.get(better, {}), curves.get(worse, {})))
                for text, better, worse, source in CLAIMS
            ),
            _judge_reach(curves),
            _judge_elastic(records.get(ELASTIC, {})),
            *(_judgement(text, "-", _UNTESTABLE, reason) for text, reason in _BEYOND_THE_SCALE.items()),
        ],
        "problems": problems,
    }


def paired_differences(better: Curves, worse: Curves) -> list[float]:
    """Return the last validation loss of `better` minus that of `worse`, for every seed that both have."""
    return [_final_loss(better[seed]) - _final_loss(worse[seed]) for seed in sorted(set(better) & set(worse))]


def _final_loss(curve: Row) -> float:
    return curve["validation"][-1]["loss"]


def write_study(study: Mapping[str, Any], output: Path) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    write_json(output.with_name(f"{output.name}.json"), study)
    write_text(output.with_name(f"{output.name}.md"), study_markdown(study))


def study_markdown(study: Mapping[str, Any]) -> str:
    """Return OUTPUT.md: the losses per variant and the verdicts."""
    model, batch, schedule, validation = (
        study["recipe"].get(key) or {} for key in ("model", "batch", "schedule", "validation")
    )
    tokens = schedule.get("steps", 0) * batch.get("global", 0) * model.get("seq_length", 0)
    routing = (
        "Tokens are selected in validation as in training. Top-k over a sequence looks at later tokens, which LLaMA "
        "and Loop do not: ITT is flattered by an unknown amount (`validation.routing=threshold` is the causal rule)."
    )
    if validation.get("routing") == "threshold":
        routing = (
            "Tokens are selected by thresholds in validation, which look at no later token; in top-p and other runs "
            "that are not trained with top-k, by the rule of training."
        )
    variants: Columns = {
        "variant": "{variant}",
        "seeds": lambda row: len(row["losses"]),
        "validation loss": lambda row: with_error(row["loss"], row["loss_stderr"], ".4f"),
        "perplexity": "{perplexity:,.2f}",
        "minus LLaMA": lambda row: with_error(row["minus_baseline"], row["minus_baseline_stderr"], "+.4f"),
        "minus ITT x4": lambda row: with_error(row["minus_reference"], row["minus_reference_stderr"], "+.4f"),
        "training TFLOPs": lambda row: with_error(row["training_flops"] and row["training_flops"] / 1e12, None, ",.1f"),
        "tokens/s": lambda row: with_error(row["tokens_per_second"], None, ",.0f"),
    }
    claims: Columns = {"claim": "{text}", "verdict": "{verdict}", "found": "{reason}", "paper": "{source}"}
    left_out = ["## Left out", "\n".join(f"- {problem}" for problem in study["problems"])]
    parts = [
        "# The study: LLaMA, Loop and ITT on the same text",
        f"{schedule.get('steps', 0):,} steps, {tokens:,} tokens a run, hidden size {model.get('hidden_size')}, "
        f"{model.get('num_layers')} layers. The seed decides initial weights and the order of the text; differences "
        "are paired by seed. +/- is the standard error between seeds. `_equal_flops`: trained, with the whole schedule,"
        f" for as many steps as cost what {REFERENCE} costs.",
        routing,
        table_of(variants, study["variants"]),
        "## The paper's claims",
        table_of(claims, study["judgements"]),
        *(left_out if study["problems"] else []),
    ]
    return "\n\n".join(parts) + "\n"


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


def _variant_row(variant: str, curves: Mapping[str, Curves], runs: Mapping[int, RunRecord]) -> Row:
    own = curves[variant]
    losses = [_final_loss(own[seed]) for seed in sorted(own)]
    loss, error = mean_and_error(losses)
    assert loss is not None, "a variant has at least one run"
    row: Row = {"variant": variant, "seeds": sorted(own), "losses": losses, "loss": loss, "loss_stderr": error}
    row["perplexity"] = math.exp(loss)
    for name, other in (("minus_baseline", BASELINE), ("minus_reference", REFERENCE)):
        differences = [] if variant == other else paired_differences(own, curves.get(other, {}))
        row[name], row[f"{name}_stderr"] = mean_and_error(differences)
    speeds = [value for run in runs.values() for _, value in run.series("tokens_per_second")]
    row["training_flops"] = own[min(own)]["validation"][-1]["flops"]
    row["tokens_per_second"] = statistics.median(speeds) if speeds else None
    return row


def _judge_reach(curves: Mapping[str, Curves]) -> Row:
    """Whether the reference meets the baseline's last loss with fewer tokens; differences are shares minus one."""
    text, source = "ITT x4 reaches LLaMA's loss with fewer tokens", "section 4.2: with 56.8% of them"
    base, own = curves.get(BASELINE, {}), curves.get(REFERENCE, {})
    seeds = sorted(set(base) & set(own))
    shares = [tokens_to_reach(own[seed], base[seed])["tokens_share"] for seed in seeds]
    if None in shares:
        reason = f"never reached with {shares.count(None)} of {len(seeds)} seeds"
        return _judgement(text, source, "not reproduced", reason)
    judged = judge(text, source, [share - 1.0 for share in shares])
    if judged["mean"] is not None:
        judged["reason"] = f"at {1 + judged['mean']:.1%} of the tokens; share minus 1: {judged['reason']}"
    return judged


def _judge_elastic(runs: Mapping[int, RunRecord]) -> Row:
    """Whether the loss of one checkpoint falls with each larger budget."""
    falls, reasons = [], []
    for seed, run in sorted(runs.items()):
        final = run.final_validation()
        budgets = sorted({point.budget for point in final if point.budget}, key=sum)
        losses = [overall_loss([point for point in final if point.budget == budget]) for budget in budgets]
        falls.append(len(budgets) >= MIN_BUDGETS and all(b < a for a, b in pairwise(losses)))
        found = [f"{loss:.4f} at {percent(budget)}" for budget, loss in zip(budgets, losses, strict=True)]
        reasons.append(f"seed {seed}: {', '.join(found)}")
    verdict = _UNTESTABLE if not runs else "reproduced" if all(falls) else "not reproduced"
    text = "from one elastic checkpoint, perplexity falls with the thinking budget"
    return _judgement(text, "Table 2; Figure 6, left", verdict, "; ".join(reasons) or "no such run")

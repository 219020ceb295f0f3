"""What more thinking steps bring: Loop and ITT models of one size, by their number of steps.

Source: paper, Figure 5 (test-time scaling of Loop and ITT) and section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_itt.accounting.flops import forward_flops, paper_flops
from megatron_itt.accounting.params import count_parameters
from megatron_itt.analysis.collect import overall_loss, read_run
from megatron_itt.analysis.curves import check_comparable, run_config
from megatron_itt.analysis.elastic import mean_accuracy
from megatron_itt.analysis.measurement import SCALING, Measurement
from megatron_itt.analysis.run_charts import main_budget
from megatron_itt.errors import DataError
from megatron_itt.evaluation.results import read_results


def measure_scaling(run_dirs: Sequence[Path], *, evaluations: Sequence[Path] = ()) -> Measurement:
    """Final validation loss of every run, by its kind, its size and its number of thinking steps.

    `evaluations` are results of itt evaluate, one per run and in the same order; their mean accuracy is then
    drawn as well. Values: `points` with run, kind, steps, hidden_size, parameters, loss, accuracy, flops, paper_flops.
    """
    if evaluations and len(evaluations) != len(run_dirs):
        raise DataError(f"{len(evaluations)} evaluations for {len(run_dirs)} runs; give one per run, in the same order")
    runs = {str(path): read_run(path) for path in run_dirs}
    check_comparable(runs)
    points: list[dict[str, Any]] = []
    notes = []
    for place, (path, run) in enumerate(runs.items()):
        config = run_config(run)
        budget = main_budget(run)
        final = [point for point in run.final_validation() if point.budget == budget]
        if config is None or not final:
            notes.append(f"{path} is left out: it has no {'readable recipe' if config is None else 'validation loss'}.")
            continue
        accuracy = mean_accuracy(read_results(evaluations[place])["runs"][0]) if evaluations else None
        points.append(
            {
                "run": run.name,
                "kind": config.thinking.kind,
                "steps": config.thinking.num_steps,
                "hidden_size": config.model.hidden_size,
                "parameters": count_parameters(config.model, config.thinking).total,
                "loss": overall_loss(final),
                "accuracy": accuracy,
                "flops": forward_flops(config.model, config.thinking).total,
                "paper_flops": paper_flops(config.model, config.thinking),
            }
        )
    if not points:
        raise DataError("none of the runs has a recipe and a validation loss; " + " ".join(notes))
    return Measurement(kind=SCALING, values={"points": points}, source={"runs": list(runs)}, notes=notes)

"""A training job of the tiny recipe on a test cluster: submitting it, watching it, reading what it left behind."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.architecture.sources import ROOT
from tests.slurm.cluster import Cluster


@dataclass(frozen=True)
class Shape:
    """Nodes and ranks of a job, and the layout that fits them."""

    nodes: int
    tasks_per_node: int
    layout: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """What sbatch is told."""
        tasks = self.tasks_per_node
        return (f"--nodes={self.nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1")


_TENSOR = ("parallel.tensor=2", "parallel.sequence=true")
TWO_BY_ONE = Shape(2, 1, _TENSOR)
TWO_BY_TWO = Shape(2, 2, (*_TENSOR, "parallel.pipeline=2"))
FOUR_BY_ONE = Shape(4, 1, (*_TENSOR, "parallel.pipeline=2"))


@dataclass
class Submitted:
    """A job of the tiny recipe, and what it left behind."""

    cluster: Cluster
    job_id: str
    run_dir: Path
    log: Path

    def wait_for_step(self, step: int, *, of: str | None = None) -> None:
        """Wait until a step (or a later one) has been recorded; `of`: the array's task that is expected to do it."""

        def reached() -> bool:
            return any(record["step"] >= step for record in self.records())

        def ended() -> bool:
            return self.cluster.has_ended(of or self.job_id)

        self.cluster.wait_until(lambda: reached() or ended(), f"step {step}\n{self.text()}", timeout_s=300)
        assert reached(), self.text()

    def end(self, *, timeout_s: float = 300) -> str:
        """Wait until the job is over for good; its state."""
        try:
            return self.cluster.wait_for_end(self.job_id, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def num_restarts(self) -> int:
        """How often Slurm has queued the job again."""
        return int(self.cluster.job(self.job_id)["Restarts"])

    def text(self) -> str:
        """The job's log."""
        return self.log.read_text() if self.log.exists() else "(no log yet)"

    def records(self) -> list[dict[str, Any]]:
        """The training records so far."""
        metrics = self.run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if "loss" in record]

    def assert_same_as(self, whole: Submitted) -> None:
        """Every step once, with bit for bit the numbers of an uninterrupted run."""
        assert (self.run_dir / "finished").is_file(), self.text()
        expected = whole.records()
        assert [record["step"] for record in self.records()] == list(range(1, len(expected) + 1)), self.text()
        for key in ("loss", "grad_norm", "learning_rate"):
            assert [record[key] for record in self.records()] == [record[key] for record in expected], key


def submit(
    cluster: Cluster,
    recipe: Path,
    settings: dict[str, str],
    *arguments: str,
    name: str = "tiny",
    shape: Shape = TWO_BY_ONE,
) -> Submitted:
    """Submit the recipe into runs/NAME; arguments are options of sbatch, and overrides and options of the launcher."""
    log = recipe.parent / f"{name}-{time.monotonic_ns()}.log"
    overrides = [argument for argument in arguments if not argument.startswith("-") or "--allow-changed" in argument]
    options = [argument for argument in arguments if argument not in overrides]
    job_id = cluster.submit(
        *shape.options,
        f"--chdir={ROOT}",
        f"--output={log}",
        *options,
        str(ROOT / "slurm" / "train.sbatch"),
        str(recipe),
        *shape.layout,
        f"logging.run_dir=runs/{name}",
        *overrides,
        environment=settings,
    )
    return Submitted(cluster, job_id, recipe.parent / "runs" / name, log)

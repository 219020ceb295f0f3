"""Plan a cluster job, check it, and prepare its run folder. slurm/launch.sh calls this; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.accounting.gpus import GPUS
from megatron_itt.commands.arguments import Count, GpuName, Overrides, Recipe, Repeated
from megatron_itt.config import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.launch.folders import ClusterFolders, load_for_cluster
from megatron_itt.launch.plan import JobShape, check_shape, format_plan, plan_job
from megatron_itt.launch.refusals import find_folder_refusals, find_input_refusals, is_finished, reopen_if_longer
from megatron_itt.launch.snapshot import check_snapshot, take_snapshot, use_snapshot

EXAMPLES = """
  itt launch show recipes/466m/itt_x4.yaml --nodes 4 --tasks-per-node 8 --gpu a100-80gb --mfu 0.35
  itt launch check recipes/466m/itt_x4.yaml --nodes 2 --tasks-per-node 8 --data-root /scratch/data
  itt launch run-dir recipes/466m/itt_x4.yaml --run-root /scratch/runs
  itt launch prepare recipes/466m/itt_x4.yaml schedule.steps=100 --tasks-per-node 8
  itt launch minimum recipes/scale/7b_itt_x4.yaml
"""


@dataclass(frozen=True, kw_only=True)
class _Job:
    recipe: Recipe
    overrides: Overrides = ()
    nodes: Count = 1  # nodes of the job
    tasks_per_node: Count = 1  # processes on each
    data_root: str | None = None  # where relative data/... paths of the recipe are
    run_root: str | None = None  # where relative runs/... folders are
    allow_changed: Repeated = ()  # a section or section.key that may differ from what the run was started with
    ended_owner: str | None = None  # a claim of the run folder whose job has ended, as the scheduler says

    def _load(self, *, fits: bool = True) -> RunConfig:
        folders = ClusterFolders(data_root=self.data_root, run_root=self.run_root)
        config = load_for_cluster(self.recipe, self.overrides, folders)
        if fits:
            check_shape(config, self._shape)
        return config

    def _refusals(self, config: RunConfig) -> list[str]:
        return find_folder_refusals(config, allow_changed=self.allow_changed, ended_owner=self.ended_owner)

    @property
    def _shape(self) -> JobShape:
        return JobShape(num_nodes=self.nodes, tasks_per_node=self.tasks_per_node)


@dataclass(frozen=True, kw_only=True)
class Show(_Job):
    """Print the job: layout, memory, speed, days and GPU-hours, and what would refuse it."""

    gpu: GpuName = "a100-80gb"  # the GPU of a task
    mfu: float = 0.35  # the share of peak FLOP/s that is assumed

    def execute(self) -> int:
        """Print them; exit code 2 if the run folder would refuse the job. Data may come later."""
        config = self._load(fits=False)
        plan = plan_job(config, self._shape, GPUS[self.gpu], mfu=self.mfu)
        print(format_plan(config, plan, gpu_name=self.gpu, mfu=self.mfu))
        if is_finished(config):
            print(f"state        {config.logging.run_dir} is finished already; a job ends at once")
        refused = self._refusals(config)
        for problem in refused + find_input_refusals(config):
            print(f"problem      {problem}")
        return 2 if refused else 0


@dataclass(frozen=True, kw_only=True)
class Check(_Job):
    """Raise an error if the run folder, the weights, the tokenizer or the data would refuse the job."""

    def execute(self) -> int:
        config = self._load()
        refused = self._refusals(config) + find_input_refusals(config)
        if refused:
            raise ConfigError("the job would end at once: " + "; ".join(refused))
        return 0


@dataclass(frozen=True, kw_only=True)
class RunDir(_Job):
    """Check recipe and layout, print the run folder, and `finished` if it is; writes nothing."""

    def execute(self) -> int:
        config = self._load()
        check_snapshot(config, allow_changed=self.allow_changed)
        print(config.logging.run_dir)
        if is_finished(config):
            print("finished")
        return 0


@dataclass(frozen=True, kw_only=True)
class Prepare(_Job):
    """Snapshot code and recipe at the first start, print the snapshot's folder. Only for the run folder's owner."""

    def execute(self) -> int:
        config = self._load()
        snapshot = use_snapshot(config, allow_changed=self.allow_changed)
        reopen_if_longer(config)
        print(snapshot or take_snapshot(config, Path(__file__).resolve().parents[2]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Minimum(_Job):
    """Print the fewest processes that the layout needs."""

    def execute(self) -> int:
        config = self._load(fits=False)
        print(config.parallel.tensor * config.parallel.pipeline)
        return 0


COMMAND = {"show": Show, "check": Check, "run-dir": RunDir, "prepare": Prepare, "minimum": Minimum}

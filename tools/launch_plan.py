"""What slurm/launch.sh asks before a job starts: what it will cost, and the snapshot that it runs from. No torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.accounting.gpus import GPUS
from megatron_itt.config import RunConfig
from megatron_itt.errors import ConfigError
from megatron_itt.launch.folders import ClusterFolders, load_for_cluster
from megatron_itt.launch.plan import JobShape, check_shape, format_plan, plan_job
from megatron_itt.launch.refusals import find_folder_refusals, find_input_refusals, is_finished, reopen_if_longer
from megatron_itt.launch.snapshot import check_snapshot, take_snapshot, use_snapshot
from megatron_itt.log import run_command

EPILOG = """examples:
  python tools/launch_plan.py show recipes/466m/itt_x4.yaml --nodes 4 --tasks-per-node 8 --gpu a100-80gb --mfu 0.35
  python tools/launch_plan.py prepare recipes/466m/itt_x4.yaml schedule.steps=100 --nodes 1 --tasks-per-node 8
"""
ACTIONS = {
    "show": "print the job: layout, memory, speed, days and GPU-hours, and what would refuse it",
    "check": "end with an error if the run folder, the tokenizer or the data would refuse the job",
    "run-dir": "check layout and recipe, print the run folder, and `finished` if it is; writes nothing",
    "prepare": "the same, then snapshot code and recipe into the run folder, print the snapshot's folder",
    "minimum": "print the fewest processes that the layout needs",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; overrides may stand before or after options."""
    parser = argparse.ArgumentParser(
        prog="launch_plan.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS, help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()))
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80gb", help="default: %(default)s")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of peak FLOP/s assumed; default: %(default)s")
    parser.add_argument("--data-root", metavar="DIR", help="where relative data/... paths of the recipe are")
    parser.add_argument("--run-root", metavar="DIR", help="where relative runs/... folders are")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="section or section.key that may differ from what the run was started with; repeat for several",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.nodes < 1 or arguments.tasks_per_node < 1:
        parser.error(f"{arguments.nodes} nodes x {arguments.tasks_per_node} tasks; a job has at least one of each")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Do one action and print its result."""
    arguments = parse_arguments(argv)
    folders = ClusterFolders(data_root=arguments.data_root, run_root=arguments.run_root)
    config = load_for_cluster(arguments.recipe, arguments.overrides, folders)
    shape = JobShape(num_nodes=arguments.nodes, tasks_per_node=arguments.tasks_per_node)
    if arguments.action == "minimum":
        print(config.parallel.tensor * config.parallel.pipeline)
        return 0
    if arguments.action == "show":
        return show(config, shape, arguments)
    check_shape(config, shape)
    if arguments.action == "check":
        refused = find_folder_refusals(config, allow_changed=arguments.allow_changed) + find_input_refusals(config)
        if refused:
            raise ConfigError("the job would end at once: " + "; ".join(refused))
    elif arguments.action == "run-dir":
        check_snapshot(config, allow_changed=arguments.allow_changed)
        print(config.logging.run_dir)
        if is_finished(config):
            print("finished")
    else:
        snapshot = use_snapshot(config, allow_changed=arguments.allow_changed)
        reopen_if_longer(config)
        print(snapshot or take_snapshot(config, Path(__file__).resolve().parents[1]))
    return 0


def show(config: RunConfig, shape: JobShape, arguments: argparse.Namespace) -> int:
    """Print the plan and what would refuse the job; exit code 2 if the run folder would. Data may come later."""
    plan = plan_job(config, shape, GPUS[arguments.gpu], mfu=arguments.mfu)
    print(format_plan(config, plan, gpu_name=arguments.gpu, mfu=arguments.mfu))
    if is_finished(config):
        print(f"state        {config.logging.run_dir} is finished already; a job ends at once")
    refused = find_folder_refusals(config, allow_changed=arguments.allow_changed)
    for problem in refused + find_input_refusals(config):
        print(f"problem      {problem}")
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(run_command(main))

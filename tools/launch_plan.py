"""What slurm/launch.sh asks before a job starts: what it will cost, and the snapshot that it runs from. No torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.accounting.gpus import GPUS
from megatron_itt.launch.plan import JobShape, check_shape, format_plan, plan_job
from megatron_itt.launch.snapshot import ClusterFolders, load_for_cluster, take_snapshot, use_snapshot
from megatron_itt.log import run_command

EPILOG = """examples:
  python tools/launch_plan.py show recipes/466m/itt_x4.yaml --nodes 4 --tasks-per-node 8 --gpu a100-80gb --mfu 0.35
  python tools/launch_plan.py prepare recipes/466m/itt_x4.yaml schedule.steps=100 --nodes 1 --tasks-per-node 8
"""
ACTIONS = {
    "show": "print the job: layout, memory, speed, days and GPU-hours",
    "run-dir": "print the run folder",
    "prepare": "check the layout, snapshot code and recipe into the run folder, print the snapshot's folder",
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
    if arguments.action == "show":
        plan = plan_job(config, shape, GPUS[arguments.gpu], mfu=arguments.mfu)
        print(format_plan(config, plan, gpu_name=arguments.gpu, mfu=arguments.mfu))
    elif arguments.action == "run-dir":
        print(config.logging.run_dir)
    elif arguments.action == "minimum":
        print(config.parallel.tensor * config.parallel.pipeline)
    else:
        check_shape(config, shape)
        snapshot = use_snapshot(config, allow_changed=arguments.allow_changed)
        print(snapshot or take_snapshot(config, Path(__file__).resolve().parents[1]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

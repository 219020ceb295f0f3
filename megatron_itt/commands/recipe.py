"""Check a recipe and report its cost without a GPU; only building ranks needs torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from megatron_itt.accounting import report
from megatron_itt.accounting.gpus import GPUS, calibrated
from megatron_itt.accounting.law import pay_off_line
from megatron_itt.accounting.layout import Machine, format_layouts, layout_report, note_order
from megatron_itt.commands.arguments import Count, Flag, GpuName, OptionalCount, Overrides, Recipe
from megatron_itt.config import RunConfig
from megatron_itt.config.keys import describe_keys
from megatron_itt.config.load import config_to_yaml, dump_config, load_config
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.log import configure_logging, silence_known_warnings
from megatron_itt.parallel.megatron_compat.eager_import import import_megatron_core
from megatron_itt.tables import write_json

EXAMPLES = """
  itt recipe check recipes/466m/itt_x4.yaml parallel.tensor=2 --world-size 16 --no-build
  itt recipe check recipes/scale/7b_itt_x4.yaml --world-size 64
  itt recipe layout scale/7b_itt_x4 --nodes 8 --gpu a100-80gb
  itt recipe layout debug/itt_tiny runtime.device=cpu --gpus-per-node 2 --calibrate runs/rates.json --measure 5
  itt recipe keys overlap
  itt recipe flops 162m/itt_x4 --json
  itt recipe memory 466m/itt_x4 --world-size 8
  itt recipe show 162m/llama schedule.steps=100
  itt recipe preprocess 466m/itt_x4 --input text --workers 32
  itt recipe index recipes/466m/itt_x4.yaml data.tokenizer=/data/tokenizer
  itt recipe heldout recipes/debug/quickstart.yaml --output runs/quickstart/heldout
  itt recipe plan 466m/itt_x4 --nodes 2 --gpu h100 --format k8s --image registry/megatron-itt
"""


@dataclass(frozen=True, kw_only=True)
class _OfRecipe:
    recipe: Recipe
    overrides: Overrides = ()


@dataclass(frozen=True, kw_only=True)
class _Printed(_OfRecipe):
    json: Flag = False  # print JSON

    def _print(self, result: Any, format_text: Callable[[Any], str]) -> int:
        print(json.dumps(result, indent=2) if self.json else format_text(result))
        return 0


@dataclass(frozen=True, kw_only=True)
class _OfLayout(_Printed):
    world_size: int | None = None  # processes of the job (default: the fewest)

    def _load(self) -> RunConfig:
        """Load the recipe; problems of its layout are reported together with its own."""
        if self.world_size is not None and self.world_size < 1:
            raise ConfigError(f"--world-size is {self.world_size}; a job has at least 1 process")
        return load_config(self.recipe, self.overrides, world_size=self.world_size or "fewest")


@dataclass(frozen=True, kw_only=True)
class Check(_OfLayout):
    """Validate a recipe and print its size and layout; with a world size, build its distinct ranks."""

    build: bool | None = None
    """build every distinct rank on the meta device and count its parameters (default: with --world-size, if torch and
    megatron-core are installed)"""

    def execute(self) -> int:
        return self._print(self._report(self._load()), report.format_check)

    def _report(self, config: RunConfig) -> dict[str, Any]:
        if self.build is False or (self.build is None and self.world_size is None):
            return report.check_report(config, self.world_size)
        try:
            import_megatron_core()
            from megatron_itt.training.trainer import built_check_report
        except ImportError as error:
            if self.build:
                raise ConfigError(
                    f"--build needs torch and megatron-core ({error}); install them or leave it out"
                ) from None
            print(f"ranks are not built: torch or megatron-core is missing ({error})", file=sys.stderr)
            return report.check_report(config, self.world_size)
        return built_check_report(config, self.world_size)


@dataclass(frozen=True, kw_only=True)
class Layout(_Printed):
    """Search the layouts of a recipe: the best that fit the machine by estimated time, as overrides to paste."""

    nodes: Count = 1  # nodes of the job
    gpus_per_node: Count = 8  # GPUs of each
    gpu: GpuName = "a100-80gb"  # their kind
    calibrate: Path | None = None  # JSON of itt benchmark --parts rates, whose rates replace those of the GPU
    best: Count = 5  # layouts to print
    spread: Flag = False  # print as many between the best and the worst; with --measure, a check of the order
    measure: OptionalCount = None  # steps to run of each, on this machine; on a CPU with the busiest rank's own time
    output: Path | None = None  # JSON file for the result

    def execute(self) -> int:
        gpu = GPUS[self.gpu] if self.calibrate is None else calibrated(GPUS[self.gpu], self.calibrate)
        machine = Machine(num_nodes=self.nodes, gpus_per_node=self.gpus_per_node, gpu=gpu)
        config = load_config(self.recipe, self.overrides)
        found = layout_report(config, machine, num_best=self.best, spread=self.spread)
        if self.measure is not None:
            self._measure(found, machine.world_size, config.runtime.device)
        if self.output is not None:
            write_json(self.output, found)
        return self._print(found, format_layouts)

    def _measure(self, found: dict[str, Any], num_ranks: int, device: str) -> None:
        silence_known_warnings()
        from megatron_itt.benchmark.layouts import check_ranks, measure_layout

        check_ranks(num_ranks, device=device)
        for row in found["layouts"]:
            overrides = (*self.overrides, *row["overrides"].split())
            measured = measure_layout(self.recipe, overrides, num_ranks=num_ranks, num_steps=self.measure or 1)
            row["measured_s"] = measured["seconds"]
            if "processor_seconds" in measured:
                row["measured_processor_s"] = measured["processor_seconds"]
        note_order(found)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """List the keys of recipes whose name or description contains a pattern, with type, default and meaning."""

    pattern: Annotated[Positional[str], arg(metavar="PATTERN")] = ""
    json: Flag = False  # print JSON

    def execute(self) -> int:
        found = [key for key in describe_keys() if self.pattern.lower() in f"{key['key']} {key['meaning']}".lower()]
        if not found:
            raise ConfigError(f"no key or description contains {self.pattern!r}; itt recipe keys lists all")
        lines = (f"{row['key']}: {row['type']} = {row['default']}" + f"  # {row['meaning']}" * bool(row["meaning"])
                 for row in found)  # fmt: skip
        print(json.dumps(found, indent=2) if self.json else "\n".join(lines))
        return 0


@dataclass(frozen=True, kw_only=True)
class Flops(_Printed):
    """Parameters and FLOPs of one sequence, as computed and as the paper counts them."""

    def execute(self) -> int:
        return self._print(report.flops_report(load_config(self.recipe, self.overrides)), report.format_flops)


@dataclass(frozen=True, kw_only=True)
class Memory(_OfLayout):
    """Bytes per rank for each pipeline stage."""

    def execute(self) -> int:
        return self._print(report.memory_report(self._load(), self.world_size), report.format_memory)


@dataclass(frozen=True, kw_only=True)
class Show(_Printed):
    """The resolved recipe, with its base and the overrides, and what it reads of its data, if that is here."""

    def execute(self) -> int:
        """Print it as YAML, with whether its thinking pays and the table of the data as comments, or as JSON."""
        config = load_config(self.recipe, self.overrides)
        return self._print(dump_config(config), lambda _: config_to_yaml(config) + _comments(config))


def _comments(config: RunConfig) -> str:
    """Return whether thinking pays, and tokens and epochs of each domain and phase or why they are not known."""
    from megatron_itt.data.batches.blend import resolve_blend

    try:
        lines = resolve_blend(config).table().splitlines()
    except IttError as error:
        lines = [f"no table of the data: {error}"]
    if pay_off := pay_off_line(config):
        lines.insert(0, f"thinking {pay_off}")
    return "\n".join(f"# {line}".rstrip() for line in lines)


@dataclass(frozen=True, kw_only=True)
class Preprocess(_OfRecipe):
    """Preprocess every domain of a recipe from INPUT/DOMAIN or INPUT/DOMAIN.*, with the recipe's tokenizer and paths.

    Prints tokens, weights and epochs of all domains at the end. A domain that is written already is left alone; other
    options of preprocessing: itt preprocess.
    """

    input: Path  # folder with a folder, or files, for each domain
    workers: OptionalCount = None  # processes (default: one per core)

    def execute(self) -> int:
        configure_logging()
        from megatron_itt.data.batches.blend import resolve_blend
        from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess

        config = load_config(self.recipe, self.overrides)
        if config.data.tokenizer is None:
            raise ConfigError("data.tokenizer is not set; name a tokenizer folder in the recipe or behind it")
        prefixes = {name: domain.path for name, domain in config.data.blend.items() if domain.path}
        inputs = {name: self._inputs(name) for name in prefixes}
        if missing := [name for name, found in inputs.items() if not found]:
            raise ConfigError(
                f"--input is {self.input}, without text for {', '.join(missing)}; name folders or files by domain, "
                f"or leave one out with data.blend.{missing[0]}.path=null"
            )
        for name, prefix in prefixes.items():
            options = PreprocessOptions(
                inputs=inputs[name],
                tokenizer=config.data.tokenizer,
                output_prefix=prefix,
                num_workers=self.workers or os.cpu_count() or 1,
                show_progress=True,
            )
            manifest = preprocess(options).manifest
            print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens", flush=True)
        print(resolve_blend(config).table())
        return 0

    def _inputs(self, domain: str) -> tuple[str, ...]:
        folder = self.input / domain
        return (str(folder),) if folder.is_dir() else tuple(sorted(map(str, self.input.glob(f"{domain}.*"))))


@dataclass(frozen=True, kw_only=True)
class Index(_OfRecipe):
    """Build the sample indices of a recipe before its run: which documents make which sample, in which order.

    Training builds them itself where they are missing, while all its processes wait; for large data build them first,
    on one machine. Safe to start from many processes and nodes at once: one builds, the others wait for it. An index
    that is there and undamaged is left alone.
    """

    def execute(self) -> int:
        import_megatron_core()
        configure_logging()
        from megatron_itt.data.text.tokenizer import recipe_tokenizer

        config = load_config(self.recipe, self.overrides)
        tokenizer = recipe_tokenizer(config)
        from megatron_itt.data.batches.blend import resolve_blend
        from megatron_itt.data.batches.datasets import prebuild_index

        print(resolve_blend(config).table())
        started = time.monotonic()
        folder, was_built = prebuild_index(config, tokenizer=tokenizer)
        size_mb = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        done = "built" if was_built else "there already, undamaged"
        print(f"{folder}: {done}; {size_mb:,.1f} MB, {time.monotonic() - started:.1f} s")
        return 0


@dataclass(frozen=True, kw_only=True)
class Heldout(_OfRecipe):
    """Write the held-out (validation) documents of a recipe as text, for evaluations of what it trained."""

    output: Path  # folder for DOMAIN.jsonl.zst

    def execute(self) -> int:
        from megatron_itt.data.batches.blend import write_heldout_text

        for domain, path in write_heldout_text(load_config(self.recipe, self.overrides), self.output).items():
            print(f"{domain}: {path}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Plan(_OfRecipe):
    """Plan a job: nodes, memory, days and GPU-hours; or write the task file of another scheduler than Slurm."""

    nodes: Count = 1  # nodes of the job
    gpus_per_node: Count = 8  # GPUs of each
    gpu: GpuName = "a100-80gb"  # their kind
    mfu: float = 0.35  # the share of peak FLOP/s that is assumed
    format: Literal["text", "skypilot", "k8s"] = "text"  # k8s: a PyTorchJob of the Kubeflow training operator
    image: str | None = None  # container image with this package
    data: str = "itt-data"  # volume that tasks see as data/ (k8s: a PersistentVolumeClaim; skypilot: or a bucket)
    runs: str = "itt-runs"  # volume that tasks see as runs/

    def execute(self) -> int:
        from megatron_itt.launch.plan import JobShape, format_plan, plan_job
        from megatron_itt.launch.task_files import FORMATS, TaskOptions, load_for_tasks

        shape = JobShape(num_nodes=self.nodes, tasks_per_node=self.gpus_per_node)
        if self.format == "text":
            config = load_config(self.recipe, self.overrides)
            plan = plan_job(config, shape, GPUS[self.gpu], mfu=self.mfu)
            print(format_plan(config, plan, gpu_name=self.gpu, mfu=self.mfu))
            return 0
        options = TaskOptions(shape=shape, gpu=self.gpu, image=self.image, data=self.data, runs=self.runs)
        print(FORMATS[self.format](load_for_tasks(self.recipe, self.overrides, shape), options), end="")
        return 0


COMMAND = {
    "check": Check,
    "layout": Layout,
    "keys": Keys,
    "flops": Flops,
    "memory": Memory,
    "show": Show,
    "preprocess": Preprocess,
    "index": Index,
    "heldout": Heldout,
    "plan": Plan,
}

"""Looks at this machine: Python, required packages, optional parts, CPU and GPU; and measures what it is asked to.

`diagnose` collects, `format_diagnosis` writes it as text; `itt doctor` is the command.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import process_info
from megatron_itt.config.optional_packages import (
    OptionalPackage,
    find_apex,
    find_dali,
    find_transformer_engine,
    has_nvidia_gpu,
    hide_unusable_packages,
)
from megatron_itt.doctor.folders import FolderSpeed, folders_of, measure_folders, measure_reading
from megatron_itt.doctor.gpus import GpuSpeed, find_slow, measure_gpus
from megatron_itt.doctor.links import LinkSpeeds, measure_links

_WAY_OUT = "run make install, or pip install -c requirements/constraints.txt -e ."
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)

# Distribution -> module whose import shows that it works.
REQUIRED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "pydantic": "pydantic",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "zstandard": "zstandard",
    "orjson": "orjson",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "tensorboard": "tensorboard",
}
# Distribution -> its module, and what its absence costs.
EXTRAS = {
    "datasets": ("datasets", "no text from the Hugging Face hub (extra: data)"),
    "pyarrow": ("pyarrow", "no parquet input (extra: data)"),
    "sentencepiece": ("sentencepiece", "no SentencePiece .model tokenizers (extra: data)"),
    "lm-eval": ("lm_eval", "itt evaluate cannot run the benchmark tasks (extra: eval)"),
    "matplotlib": ("matplotlib", "no static plots (extra: analysis)"),
    "gigatoken": (
        "gigatoken",
        "tokenizing runs on the tokenizers library, tens of times slower (extra: data)",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageStatus:
    """A required package; `reason` says why it is not usable."""

    name: str
    usable: bool
    version: str | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that the doctor saw. `problems` stop the project from working, `warnings` do not."""

    python: str
    system: str
    cpu_cores: int
    memory_bytes: int | None
    free_disk_bytes: int
    gpus: list[str]
    required: list[PackageStatus]
    optional: list[OptionalPackage]
    problems: list[str]
    warnings: list[str]
    folders: list[FolderSpeed] = field(default_factory=list)
    gpu_speeds: list[GpuSpeed] = field(default_factory=list)
    links: LinkSpeeds | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether training on this machine can work."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "is_healthy": self.is_healthy}


def diagnose(folders: Sequence[str] = (), *, recipe: RunConfig | None = None, speed: bool = False) -> Diagnosis:
    """Look at everything; takes seconds, because packages are really imported and folders really written.

    `folders` are measured, and those that a `recipe` writes and reads. `speed` measures GPUs, and, in a job of several
    processes, the links between them: each of its processes must ask for it.
    """
    hide_unusable_packages()
    optional = [find_transformer_engine(), find_apex(), find_dali(), *(_find_extra(name) for name in EXTRAS)]
    required = [_find_required(name) for name in REQUIRED]
    gpus, gpu_warnings = _find_gpus(required)
    written, read = folders_of(recipe) if recipe is not None else ([], [])
    folder_speeds = measure_folders([*folders, *written]) + measure_reading(read)
    has_torch = _is_usable("torch", required)
    gpu_speeds = measure_gpus() if speed and has_torch else []
    place = process_info()
    links = measure_links(place) if speed and has_torch and place.world_size > 1 else None
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_cores=os.cpu_count() or 1,
        memory_bytes=_find_memory(),
        free_disk_bytes=shutil.disk_usage(".").free,
        gpus=gpus,
        required=required,
        optional=optional,
        problems=[
            *_find_python_problem(),
            *(f"{package.name}: {package.reason}; {_WAY_OUT}" for package in required if not package.usable),
            *(f"{folder.path}: {folder.problem}" for folder in folder_speeds if folder.problem),
            *(f"{gpu.device}: {gpu.problem}" for gpu in gpu_speeds if gpu.problem),
            *([f"links: {links.problem}"] if links is not None and links.problem else []),
        ],
        warnings=[
            *gpu_warnings,
            *find_slow(gpu_speeds),
            *(links.warnings() if links is not None else []),
            *(line for folder in folder_speeds for line in folder.warnings()),
            *(f"{part.name}: {part.reason}. Cost: {part.cost}" for part in optional if not part.usable),
        ],
        folders=folder_speeds,
        gpu_speeds=gpu_speeds,
        links=links,
    )


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The diagnosis as text: what is there, then warnings, then problems."""
    memory = f"{diagnosis.memory_bytes / 2**30:.0f} GiB memory" if diagnosis.memory_bytes else "memory unknown"
    usable = [f"{part.name} {part.version or ''}".rstrip() for part in diagnosis.optional if part.usable]
    required = [f"{package.name} {package.version or '?'}" for package in diagnosis.required if package.usable]
    links = diagnosis.links
    lines = [
        f"Python    {diagnosis.python} on {diagnosis.system}",
        f"machine   {diagnosis.cpu_cores} cores, {memory}, {diagnosis.free_disk_bytes / 2**30:.0f} GiB disk free here",
        f"GPU       {', '.join(diagnosis.gpus) or 'none: training runs on CPU, for trying things out'}",
        f"required  {', '.join(required)}",
        f"optional  {', '.join(usable) or 'none'}",
        *(f"speed     {gpu.describe()}" for gpu in diagnosis.gpu_speeds if not gpu.problem),
        *([f"links     {links.describe()}"] if links is not None and not links.problem else []),
        *(f"folder    {folder.describe()}" for folder in diagnosis.folders if not folder.problem),
        *(f"warning: {warning}" for warning in diagnosis.warnings),
        *(f"problem: {problem}" for problem in diagnosis.problems),
    ]
    verdict = "healthy" if diagnosis.is_healthy else f"{len(diagnosis.problems)} problem(s): training cannot work here"
    return "\n".join([*lines, verdict])


def _find_python_problem() -> list[str]:
    version = sys.version_info[:2]
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return []
    return [f"Python is {platform.python_version()}; megatron-core needs 3.10, 3.11 or 3.12"]


def _find_required(name: str) -> PackageStatus:
    version, reason = _try_package(name, REQUIRED[name])
    return PackageStatus(name=name, usable=not reason, version=version, reason=reason)


def _find_extra(name: str) -> OptionalPackage:
    module, cost = EXTRAS[name]
    version, reason = _try_package(name, module)
    return OptionalPackage(name=name, usable=not reason, version=version, reason=reason, cost=cost)


def _try_package(name: str, module: str) -> tuple[str | None, str]:
    """Its version, and why it cannot be used (empty if it can)."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            return version, "not installed"
        return version, f"installed, but its import misses {error.name}"
    except Exception as error:  # a broken binary raises anything
        lines = str(error).strip().splitlines()
        return version, f"installed, but its import fails: {type(error).__name__}: {lines[0] if lines else ''}"
    return version, ""


def _find_gpus(required: list[PackageStatus]) -> tuple[list[str], list[str]]:
    """Names of the GPUs that torch can use, and a warning if there is one that it cannot."""
    if not _is_usable("torch", required):
        return [], []
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names or not has_nvidia_gpu():
        return names, []
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    return [], [f"torch: this machine has an NVIDIA GPU that {build} cannot use. Cost: training runs on CPU"]


def _is_usable(name: str, required: list[PackageStatus]) -> bool:
    return next(package.usable for package in required if package.name == name)


def _find_memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)

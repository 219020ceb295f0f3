"""State of a machine: packages, hardware, folders, and speed on request; `itt doctor` prints it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import process_info
from megatron_itt.config.optional_packages import (
    OptionalPackage,
    find_apex,
    find_dali,
    find_transformer_engine,
    find_version,
    has_nvidia_gpu,
    hide_unusable_packages,
)
from megatron_itt.config.versions import find_megatron_core_problem
from megatron_itt.doctor.speed import Speed, gpu_warnings, measure_folder, measure_gpu, measure_links, measure_reading

_WAY_OUT = "run make install, or pip install -c requirements/constraints.txt -e ."
_MODULES = {"megatron-core": "megatron.core", "pyyaml": "yaml", "lm-eval": "lm_eval"}  # where the name differs
REQUIRED = (
    *("torch", "megatron-core", "numpy", "pyyaml", "pydantic", "tokenizers", "transformers", "safetensors"),
    *("zstandard", "orjson", "filelock", "psutil", "tqdm", "tyro", "jinja2", "tensorboard"),
)
# Optional distribution -> cost of its absence. The NVIDIA packages are in config/optional_packages.py.
EXTRAS = {
    "datasets": "no text from the Hugging Face hub (extra: data)",
    "pyarrow": "no parquet input (extra: data)",
    "sentencepiece": "no SentencePiece .model tokenizers (extra: data)",
    "lm-eval": "itt evaluate cannot run the benchmark tasks (extra: eval)",
    "matplotlib": "no static plots (extra: analysis)",
    "gigatoken": "tokenizing runs on the tokenizers library, tens of times slower (extra: data)",
}
# Fields of torch's environment report that are printed; `--json` has all of them.
ENVIRONMENT = ("cuda_compiled_version", "nvidia_driver_version", "cudnn_version", "nvidia_gpu_models", "os")


def diagnose(folders: Sequence[str] = (), *, recipe: RunConfig | None = None, speed: bool = False) -> dict[str, Any]:
    """Import every package and measure `folders` and those that `recipe` uses; takes seconds.

    `speed` measures GPUs, and the links of a job of several processes, each of which must then call this. Returns plain
    data. Training cannot work with `problems`; `warnings` say what it costs to go without a package.
    """
    hide_unusable_packages()
    nvidia = [find_transformer_engine(), find_apex(), find_dali()]
    optional = [*nvidia, *(_find_package(name, cost) for name, cost in EXTRAS.items())]
    required = [_find_package(name, "training cannot work") for name in REQUIRED]
    has_torch = next(package.usable for package in required if package.name == "torch")
    gpus, environment, hidden_gpu = _find_gpus() if has_torch else ([], {}, [])
    written, read = recipe_folders(recipe) if recipe is not None else ([], [])
    gpu_speeds = [measure_gpu(index) for index in range(len(gpus))] if speed else []
    job = process_info()
    links = [measure_links(job)] if speed and has_torch and job.world_size > 1 else []
    speeds = [*gpu_speeds, *links, *map(measure_folder, [*folders, *written]), *map(measure_reading, read)]
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    problems = [
        *([] if supported else [f"Python is {platform.python_version()}; tested are 3.10 to 3.13"]),
        *(f"{package.name}: {package.reason}; {_WAY_OUT}" for package in required if not package.usable),
        *([problem] if (problem := find_megatron_core_problem()) else []),
        *(f"{'links' if s.kind == 'links' else s.name}: {s.problem}" for s in speeds if s.problem),
    ]
    warnings = [
        *hidden_gpu,
        *gpu_warnings(gpu_speeds),
        *(line for measured in speeds for line in measured.warnings),
        *(f"{package.name}: {package.reason}. Cost: {package.cost}" for package in optional if not package.usable),
    ]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "gpus": gpus,
        "environment": environment,  # torch.utils.collect_env
        "required": list(map(asdict, required)),
        "optional": list(map(asdict, optional)),
        "speeds": list(map(asdict, speeds)),
        "problems": problems,
        "warnings": warnings,
        "is_healthy": not problems,
    }


def format_diagnosis(diagnosis: Mapping[str, Any]) -> str:
    """Format the state of the machine, then warnings, then problems, then the verdict."""
    memory, disk = (f"{diagnosis[key] / 2**30:.0f} GiB" for key in ("memory_bytes", "free_disk_bytes"))
    required, optional = (
        ", ".join(f"{package['name']} {package['version'] or '?'}" for package in diagnosis[kind] if package["usable"])
        for kind in ("required", "optional")
    )
    found = [(key, diagnosis["environment"].get(key)) for key in ENVIRONMENT]
    environment = [
        f"{key.removesuffix('_version')} {' / '.join(str(text).splitlines())}" for key, text in found if text
    ]
    problems = diagnosis["problems"]
    lines = [
        f"Python    {diagnosis['python']} on {diagnosis['system']}",
        f"machine   {diagnosis['cpu_cores']} cores, {memory} memory, {disk} disk free here",
        f"GPU       {', '.join(diagnosis['gpus']) or 'none: training runs on CPU, for trying things out'}",
        f"system    {', '.join(environment) or 'unknown without torch'}",
        f"required  {required}",
        f"optional  {optional or 'none'}",
        *(Speed(**speed).describe() for speed in diagnosis["speeds"] if not speed["problem"]),
        *(f"warning: {warning}" for warning in diagnosis["warnings"]),
        *(f"problem: {problem}" for problem in problems),
        f"{len(problems)} problem(s): training cannot work here" if problems else "healthy",
    ]
    return "\n".join(lines)


def recipe_folders(config: RunConfig) -> tuple[list[str], list[str]]:
    """Return the existing folders that a run writes below, and one data file of each folder that it reads."""
    written = [config.logging.run_dir, *([config.data.cache_dir] if config.data.cache_dir else [])]
    prefixes = [domain.path for domain in config.data.blend.values() if domain.path is not None]
    files = {str(Path(prefix).parent): f"{prefix}.bin" for prefix in prefixes}
    existing = [
        next((path for path in (Path(name), *Path(name).absolute().parents) if path.exists()), Path(name))
        for name in written
    ]
    return list(map(str, existing)), list(files.values())


def _find_package(name: str, cost: str) -> OptionalPackage:
    module, reason = _MODULES.get(name, name), ""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_absent = error.name == module.split(".")[0]
        reason = "not installed" if is_absent else f"installed, but its import misses {error.name}"
    except Exception as error:  # a broken binary raises anything
        lines = str(error).strip().splitlines()
        reason = f"installed, but its import fails: {type(error).__name__}: {lines[0] if lines else ''}"
    return OptionalPackage(name=name, usable=not reason, version=find_version(name), reason=reason, cost=cost)


def _find_gpus() -> tuple[list[str], dict[str, Any], list[str]]:
    """GPUs that torch can use, torch's environment report, and a warning for a GPU that torch cannot use."""
    import torch
    from torch.utils.collect_env import get_env_info

    environment = get_env_info()._asdict()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names or not has_nvidia_gpu():
        return names, environment, []
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    warning = f"torch: this machine has an NVIDIA GPU that {build} cannot use. Cost: training runs on CPU"
    return [], environment, [warning]

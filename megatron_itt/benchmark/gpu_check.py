"""Check of a GPU: numerics first, then times at the paper's shapes, within a limit of minutes.

Every row is appended to FOLDER/gpu-NAME-DATE.jsonl as soon as it is measured, so that an interrupted check keeps what
it has; the Markdown beside it is written again after every check. It needs few packages: a leased machine is bare.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_itt.config.versions import check_megatron_core
from megatron_itt.errors import ConfigError
from megatron_itt.log import silence_known_warnings
from megatron_itt.tables import markdown_table

# Import name -> name for pip. pydantic and pyyaml read the recipes, psutil is needed by megatron-core.
PACKAGES = {
    **{name: name for name in ("torch", "numpy", "transformers", "pydantic", "psutil")},
    **{"megatron.core": "megatron-core", "yaml": "pyyaml"},
}
_MODELS = ("ITT x4", "ITT x4, selected", "Loop x4")
TINY = (
    *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=256", "model.seq_length=64", "batch.global=4", "batch.micro=2"),
)


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check, and how."""

    output: Path = Path("docs/results")  # folder of the results
    minutes: float = 9.5  # limit of the whole check; with more, the limit of each part grows alike
    repeats: int = 5  # timed steps per model
    device: str = "cuda"  # cuda or cpu
    tiny: bool = False  # tiny shapes, to try the check itself
    command: str = ""  # as the results name it

    @property
    def limit_scale(self) -> float:
        """Factor of the time limits of the parts, which suit an idle GPU."""
        return max(1.0, self.minutes / type(self).minutes)


def require_packages() -> None:
    """Import what the check needs; ConfigError that names every package that cannot be imported, and why."""
    silence_known_warnings()
    problems = {}
    for name, label in PACKAGES.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package is as bad as a missing one
            problems[label] = f"{label} ({type(error).__name__}: {error})"
    if problems:
        raise ConfigError(f"not usable here: {'; '.join(problems.values())}; pip install {' '.join(problems)}")
    check_megatron_core()


def run_check(request: CheckRequest, *, show: Callable[[str], None] = print) -> int:
    """Run the check and show each row; return 1 if a row failed. ConfigError if there is no GPU."""
    import torch

    from megatron_itt.benchmark.isolated import SETUP_LIMIT_S, run_isolated

    if request.repeats < 1:
        raise ConfigError(f"--repeats is {request.repeats}; at least one step must be timed")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no NVIDIA GPU here; run this on a GPU machine, or make bench for the CPU")
    name = torch.cuda.get_device_name(0) if request.device == "cuda" else "cpu"
    num_gpus = torch.cuda.device_count() if request.device == "cuda" else 2
    request.output.mkdir(parents=True, exist_ok=True)
    path = request.output / f"gpu-{slug(name)}-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}.jsonl"
    origin = {"check": "request", "command": request.command, "device": name, "torch": torch.__version__}
    rows: list[dict[str, Any]] = [origin]
    began = time.monotonic()
    scale = request.limit_scale
    plan = [replace(check, limit_s=scale * check.limit_s) for check in plan_check(request, num_gpus=num_gpus)]
    checks = run_isolated(plan, total_s=60 * request.minutes, setup_limit_s=scale * SETUP_LIMIT_S)
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(origin), file=file, flush=True)
        for check, row in checks:
            if check.name != rows[-1]["check"]:
                render(path)
            rows.append({"check": check.name, "at_s": round(time.monotonic() - began, 1), **row})
            print(json.dumps(rows[-1]), file=file, flush=True)
            show(json.dumps(rows[-1]))
    page = render(path)
    failed = failed_checks(rows)
    show(f"written to {path} and {page}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def plan_check(request: CheckRequest, *, num_gpus: int) -> list[Any]:
    """Return all checks in order, with their time limits.

    bfloat16 kernels at the paper's sizes and the steps of its models come first; graphs, which may break a process,
    come last.
    """
    import torch

    from megatron_itt.benchmark import gpu_kernels, gpu_rows
    from megatron_itt.benchmark.decode import Decoding
    from megatron_itt.benchmark.isolated import Check

    device = torch.device("cpu") if request.device == "cpu" else torch.device("cuda", 0)
    backends, dtype = usable_backends(request.device), torch.bfloat16
    small = _shape(request, "tiny", *(() if request.tiny else TINY))
    whole = {"tiny": small} if request.tiny else {name: _shape(request, name) for name in ("162m", "230m", "466m")}
    shapes = {name: shape for name, shape in whole.items() if name != "230m"}
    first = next(iter(shapes.values()))
    cases = [
        gpu_kernels.AttentionCase(f"{name}, {capacity:.0%}", shape.config.model, capacity, shape.config.batch.micro)
        for name, shape in whole.items()
        for capacity in (0.5, 0.7)
    ]
    models = {name: shape.config.model for name, shape in shapes.items()}
    lengths = (
        {"num_new_tokens": 3, "num_prompt_tokens": 8}
        if request.tiny
        else {"num_new_tokens": 64, "num_prompt_tokens": 512}
    )
    decoding = Decoding(**lengths, num_repeats=3, device=request.device, dtype="fp32" if request.tiny else "bf16")
    steps = (request.repeats, 15.0)
    configs = {name: replace(small.config, precision=replace(small.config.precision, parts=name)) for name in backends}
    # Name, backend, limit in seconds, function of rows, its arguments.
    plan: list[tuple[str, str, float, Callable[..., Iterator[Any]], tuple[Any, ...]]] = [
        ("machine", "native", 20, gpu_rows.machine_rows, (device,)),
        ("attention, bf16", "native", 90, gpu_kernels.attention_rows, (cases, dtype, device)),
        ("row operations, bf16", "native", 30, gpu_kernels.row_kernel_rows, (models, dtype, device)),
        *(
            (f"steps {name}", "native", 90, gpu_rows.step_rows, (shape, _MODELS, *steps))
            for name, shape in shapes.items()
        ),
        ("decode", "native", 45, gpu_rows.decode_rows, (first, (1, 2) if request.tiny else (1, 8, 64), decoding)),
        *(
            (f"precision, {name}", name, 25, gpu_rows.precision_rows, (config, device))
            for name, config in configs.items()
        ),
        ("steps, TE", "transformer_engine", 60, gpu_rows.step_rows, (first, _MODELS[:1], *steps)),
        ("layouts", "native", 120, gpu_rows.layout_rows, (2, request.device)),
        ("graphs", "native", 30, gpu_rows.graph_rows, (small.config, device)),
    ]
    left_out = {"layouts"} if num_gpus < 2 else set()
    left_out |= {"graphs"} if request.device == "cpu" else set()
    return [
        Check(name=name, function=function, arguments=given, limit_s=limit, setup=(prepare, (backend, request.device)))
        for name, backend, limit, function, given in plan
        if backend in backends and name not in left_out
    ]


def usable_backends(device: str) -> list[str]:
    """Return the choices of `precision.parts` that work here, native first."""
    from megatron_itt.config.backends import choose_backend

    found = ["native"]
    for name in ("apex", "transformer_engine"):
        try:
            found.append(choose_backend(name, device=device).name)
        except ConfigError:
            continue
    return found


def prepare(backend: str, device: str) -> None:
    """Select the backend in a fresh process, before megatron-core is imported."""
    from megatron_itt.config.backends import use_backend

    silence_known_warnings()
    use_backend(backend, device=device)


def render(path: Path) -> Path:
    """Write the rows of a .jsonl file as Markdown beside it, one table per check; return the page's path."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sections.setdefault(row["check"], []).append({key: row[key] for key in row if key not in ("check", "at_s")})
    failed = failed_checks(rows)
    heading = f"# {rows[0]['device']}\n\n{'FAILED: ' + ', '.join(failed) if failed else 'All rows agree.'}"
    parts = [heading]
    for name, entries in sections.items():
        columns = list(dict.fromkeys(key for row in entries for key in row))
        table = markdown_table(columns, [[_cell(row.get(key, "")) for key in columns] for row in entries])
        parts.append(f"## {name}\n\n{table}")
    page = path.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def failed_checks(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the checks with an error or a difference beyond its tolerance."""
    return list(dict.fromkeys(row["check"] for row in rows if "error" in row or row.get("agrees") is False))


def slug(text: str) -> str:
    """Return text as part of a file name."""
    return re.sub(r"\W+", "-", text).strip("-").lower()


def _shape(request: CheckRequest, name: str, *overrides: str) -> Any:
    from megatron_itt.benchmark.shapes import load_shape

    settings = [f"runtime.device={request.device}", *(TINY if request.tiny else ()), *overrides]
    return load_shape(name, settings, device=request.device)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Registers, spills and shared memory of every Triton launch of a model, compiled for NVIDIA GPUs without having one.

The launchers run on meta tensors with Triton's driver replaced, so that the signatures and specialisations are those of
training. NVIDIA's own disassembler, which Triton ships, reads the binaries. Nothing is executed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_itt.config import load_config
from megatron_itt.config.load import find_recipe
from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ConfigError
from megatron_itt.ops import rows_triton
from megatron_itt.ops.attention_triton import triton_attention
from megatron_itt.tables import Columns, table_of

# Compute capability -> bytes of shared memory that one block may use, and that one multiprocessor has.
# Source: CUDA C++ programming guide, table of technical specifications per compute capability.
SHARED_BYTES = {
    80: (163 << 10, 164 << 10),
    86: (99 << 10, 100 << 10),
    90: (227 << 10, 228 << 10),
    100: (227 << 10, 228 << 10),
}
MAX_SPILLS = 32  # instructions per launch
MIN_WARPS = 8  # per multiprocessor
SHAPES = {"162m": "162m/itt_x4", "230m": "230m/itt_x4", "466m": "466m/itt_x4", "1b3": "scale/1b3_itt_x4"}
CAPACITIES = (0.5, 0.7)
_REGISTERS, _MAX_WARPS, _RESERVED_BYTES = 65536, 64, 1024  # per multiprocessor; reserved: per block


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelResources:
    """What one compiled launch takes."""

    kernel: str
    capability: int
    num_warps: int
    registers: int  # per thread
    spill_stores: int  # instructions that write registers to local memory
    spill_loads: int
    shared_bytes: int  # per block

    @property
    def warps_per_multiprocessor(self) -> int:
        """Resident warps, limited by registers, shared memory and the hardware."""
        registers_per_warp = -(-self.registers // 8) * 8 * 32
        by_registers = _REGISTERS // registers_per_warp // self.num_warps
        by_shared = SHARED_BYTES[self.capability][1] // (self.shared_bytes + _RESERVED_BYTES)
        return min(by_registers, by_shared, _MAX_WARPS // self.num_warps) * self.num_warps

    @property
    def is_good(self) -> bool:
        """Whether the launch fits the GPU, hardly spills, and fills the multiprocessor."""
        fits = self.shared_bytes <= SHARED_BYTES[self.capability][0]
        return fits and self.spill_stores <= MAX_SPILLS and self.warps_per_multiprocessor >= MIN_WARPS


def compile_launches(
    model: ModelConfig, *, capability: int, capacity: float, micro_batch: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[KernelResources]:
    """Compile what one layer launches, forward and backward, for a compute capability such as 80 or 90."""
    compiled: list[tuple[str, Any]] = []
    with _compile_only(capability, compiled):
        _launch_attention(model, capacity, micro_batch, dtype)
        _launch_rows(model, capacity, micro_batch, dtype)
    unique = {(name, kernel.hash): kernel for name, kernel in compiled}
    return [_read_resources(name, kernel, capability) for (name, _), kernel in unique.items()]


def compile_shapes(
    capabilities: Sequence[int], *, shapes: Sequence[str] = tuple(SHAPES), capacities: Sequence[float] = CAPACITIES
) -> dict[str, list[KernelResources]]:
    """Compile the launches of named shapes at several capacities; the keys describe shape and capacity."""
    if unknown := [capability for capability in capabilities if capability not in SHARED_BYTES]:
        raise ConfigError(f"--capabilities: {unknown[0]} is not known; choose from {', '.join(map(str, SHARED_BYTES))}")
    found: dict[str, list[KernelResources]] = {}
    for shape in shapes:
        model = load_config(find_recipe(SHAPES[shape])).model
        for capacity in capacities:
            found[f"{shape}, {capacity:.0%}"] = [
                row
                for capability in capabilities
                for row in compile_launches(model, capability=capability, capacity=capacity)
            ]
    return found


def problems_of(found: Mapping[str, Sequence[KernelResources]]) -> list[str]:
    """Describe the launches that are not good."""
    return [f"{shape}, sm_{row.capability}: {row}" for shape, rows in found.items() for row in rows if not row.is_good]


def kernel_page(found: Mapping[str, Sequence[KernelResources]], *, command: str) -> str:
    """Format all launches as a Markdown page."""
    columns: Columns = {
        **{"shape, capacity": "{shape}", "GPU": "sm_{row.capability}", "kernel": "{row.kernel}"},
        **{"warps": "{row.num_warps}", "registers": "{row.registers}", "STL": "{row.spill_stores}"},
        "LDL": "{row.spill_loads}",
        "shared KiB": lambda line: f"{line['row'].shared_bytes / 1024:.1f}",
        "warps per SM": "{row.warps_per_multiprocessor}",
    }
    lines = [{"shape": shape, "row": row} for shape, rows in found.items() for row in rows]
    text = (
        f"# Triton kernels, compiled ahead of time\n\nTriton {triton.__version__}, bfloat16, micro-batch 4. STL, LDL: "
        f"spill instructions (at most {MAX_SPILLS} stores are accepted).\n\n    {command}\n\n"
    )
    return text + table_of(columns, lines) + "\n"


class _CompilerTarget:
    """Replacement of Triton's GPU driver; launches under it only compile."""

    def __init__(self, capability: int) -> None:
        target = GPUTarget("cuda", capability, 32)
        self.get_current_target = lambda: target
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda _device: 0
        self.get_active_torch_device = lambda: torch.device("meta")
        self.map_python_to_cpp_type = lambda _type: "void*"


@contextmanager
def _compile_only(capability: int, compiled: list[tuple[str, Any]]) -> Iterator[None]:
    given_driver, given_run = driver._active, JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = given_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(_CompilerTarget(capability))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run, driver._active = given_run, given_driver


def _launch_attention(model: ModelConfig, capacity: float, micro_batch: int, dtype: torch.dtype) -> None:
    tensor = partial(torch.empty, device="meta", dtype=dtype)
    num_selected = int(capacity * model.seq_length + 0.5)
    query = tensor(num_selected, micro_batch, model.num_attention_heads, model.head_size, requires_grad=True)
    shape = (model.seq_length, micro_batch, model.num_key_value_heads, model.head_size)
    positions = tensor(num_selected, micro_batch, dtype=torch.int64)
    context = triton_attention(query, tensor(*shape, requires_grad=True), tensor(*shape), positions)
    context.backward(torch.empty_like(context))


def _launch_rows(model: ModelConfig, capacity: float, micro_batch: int, dtype: torch.dtype) -> None:
    tensor = partial(torch.empty, device="meta", dtype=dtype)
    num_selected = int(capacity * model.seq_length + 0.5)
    num_rows = num_selected * micro_batch
    rows, weight = tensor(num_rows, model.hidden_size), tensor(model.hidden_size)
    _, inverse_rms = rows_triton.rms_norm_forward(rows, weight, model.norm_eps)
    rows_triton.rms_norm_backward(rows, rows, weight, inverse_rms)
    fused = tensor(num_rows, 2 * model.ffn_hidden_size)
    rows_triton.swiglu_backward(rows_triton.swiglu_forward(fused), fused)
    heads = tensor(num_selected, micro_batch, model.num_key_value_heads, model.head_size)
    angles: Tensor = tensor(num_selected, micro_batch, 1, model.head_size)
    rows_triton.rotate(heads, torch.empty_like(heads), angles, torch.empty_like(angles), direction=1.0)


def _read_resources(name: str, kernel: Any, capability: int) -> KernelResources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output_of(tools / "cuobjdump", "-res-usage", file.name)
        assembly = _output_of(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"\bREG:(\d+)", usage)
    assert found is not None, f"cuobjdump names no registers: {usage[:200]}"
    return KernelResources(
        kernel=name.strip("_"),
        capability=capability,
        num_warps=kernel.metadata.num_warps,
        registers=int(found.group(1)),
        spill_stores=len(re.findall(r"\bSTL\b", assembly)),
        spill_loads=len(re.findall(r"\bLDL\b", assembly)),
        shared_bytes=kernel.metadata.shared,
    )


def _output_of(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout

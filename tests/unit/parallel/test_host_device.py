"""Substitutes for CUDA calls place megatron-core's tensors on the host, and are undone by stop_parallel."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import torch
from megatron_itt.parallel.megatron_compat.host_device import install_host_device, is_installed
assert not is_installed()
install_host_device()
install_host_device()
assert is_installed()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
assert torch.ones(1).cuda().device.type == "cpu"
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).type(torch.float64).dtype == torch.float64
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
with torch.device("meta"):
    assert torch.arange(3).device.type == "meta"
    assert torch.zeros(3).device.type == "meta"
import megatron.core.tensor_parallel.random as megatron_random
assert torch.equal(megatron_random._get_cuda_rng_state(), torch.get_rng_state())
"""


def test_cuda_requests_are_answered_on_the_host_and_other_devices_still_work() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# In a process with a GPU (here: one that reports two) every attribute of torch and megatron-core is restored, after a
# run and after a failed start, and no substitute is referenced any more.
UNDONE = """
import gc, sys, types
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
torch.accelerator.current_accelerator = lambda *_args, **_kwargs: None  # a build for CUDA would ask the driver
import megatron_itt.checkpoint.save
from megatron_itt.errors import ConfigError
from megatron_itt.config.environment import ProcessInfo
from megatron_itt.parallel.groups import start_parallel
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import observe_steps

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name.split(".")[0] in ("torch", "megatron"):
            found |= {(name, key): value for key, value in list(vars(module).items())}
    for owner in (torch.Tensor, torch.cuda.Stream, torch.cuda.Event):
        found |= {(owner.__name__, key): value for key, value in vars(owner).items()}
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    return found, flags

def is_code(value):
    return callable(value) and not isinstance(value, torch.distributed.ProcessGroup)

before, flags = attributes()
recipe = tiny_recipe(runtime={"device": "cpu", "deterministic": True}, batch={"global": 4, "micro": 2})
lost = ProcessInfo(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=0)
for attempt in range(3):
    if attempt == 1:
        try:
            start_parallel(recipe, process=lost)
            raise SystemExit("a start without a port succeeded")
        except ConfigError:
            pass
    else:
        observe_steps(ONE_PROCESS, recipe, steps=(0, 1))
    after, now = attributes()
    changed = [key for key, value in before.items() if is_code(value) and after.get(key) is not value]
    added = [key for key in after if key not in before and key[0] in ("torch", "torch.cuda", "Tensor")]
    assert not changed and not added, (attempt, changed, added)
    assert now == flags, (attempt, now)
gc.collect()
kept = [
    found for found in gc.get_objects()
    if isinstance(found, types.FunctionType) and found.__module__ == "megatron_itt.parallel.megatron_compat.host_device"
    and ("<locals>" in found.__qualname__ or "<lambda>" in found.__qualname__)
]
assert not kept, kept
assert torch.ones(1).type() == "torch.FloatTensor"
try:
    moved = torch.ones(1).cuda()
except (AssertionError, RuntimeError):
    pass  # there is no GPU here
else:
    assert moved.device.type == "cuda"
"""


def test_stop_parallel_restores_every_attribute_of_torch_and_megatron_core() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", UNDONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_patches_nothing() -> None:
    code = (
        "import megatron_itt.parallel.groups\n"
        "from megatron_itt.parallel.megatron_compat.host_device import is_installed\n"
        "assert not is_installed()"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0

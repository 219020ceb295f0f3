"""The stand-in for a missing GPU changes where megatron-core's tensors live, and nothing else."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import torch
from megatron_itt.parallel.host_device import install_host_device, is_installed
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


def test_importing_the_package_patches_nothing() -> None:
    code = (
        "import megatron_itt.parallel.groups\n"
        "from megatron_itt.parallel.host_device import is_installed\n"
        "assert not is_installed()"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0

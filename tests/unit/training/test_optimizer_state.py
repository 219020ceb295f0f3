"""Checkpoints move between AdamWs that count steps per tensor (torch) and per group (apex and TransformerEngine).

apex needs a GPU, so a package with its interface and AdamW in plain torch stands on the path of another interpreter;
megatron-core there takes every branch that it takes for apex.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_itt.config import RunConfig
from megatron_itt.training.optimizer_state import from_portable_state, to_portable_state
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import observe_steps

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "def multi_tensor_applier(op, *args): return op(*args)\n",
    "apex/optimizers/__init__.py": """
import torch

class FusedSGD: ...

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["bias_correction"] and "fused" not in group
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                assert "step" not in state
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / scale)
""",
    "amp_C.py": """
import torch

def multi_tensor_l2norm(_overflow, lists, _per_parameter):
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm().reshape(1), None

def multi_tensor_scale(_overflow, lists, factor):
    for source, target in zip(*lists):
        target.copy_(source * factor)
""",
}
DRIVER = """
import json, sys
from megatron_itt.parallel.megatron_compat.host_device import install_host_device
install_host_device()
from megatron.core.optimizer import distrib_optimizer
assert distrib_optimizer.USING_APEX_OPTIMIZER
from tests.helpers.one_rank import ONE_PROCESS
from tests.helpers.steps import observe_steps
from tests.unit.training.test_optimizer_state import recipe
found = {}
for distributed in (True, False):
    config, name = recipe(distributed), str(distributed)
    observe_steps(ONE_PROCESS, config, save_to=f"apex_{name}", steps=(0, 3))
    for writer in ("torch", "apex"):
        again = observe_steps(ONE_PROCESS, config, load_from=f"{writer}_{name}/step_0000003", steps=(3, 5))
        found[f"{writer}_{name}"] = again.losses
print(json.dumps(found))
"""


def recipe(distributed: bool) -> RunConfig:
    return tiny_recipe(optimizer={"distributed": distributed, "weight_decay": 0.1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("states")
    for name, text in STAND_IN.items():
        (place / "path" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "path" / name).write_text(text, encoding="utf-8")
    return place


@pytest.mark.slow
def test_runs_continue_under_another_adam(folder: Path) -> None:
    whole: dict[str, list[float]] = {}
    for distributed in (True, False):
        root = str(folder / f"torch_{distributed}")
        observe_steps(ONE_PROCESS, recipe(distributed), save_to=root, steps=(0, 3))
        whole[str(distributed)] = observe_steps(ONE_PROCESS, recipe(distributed), steps=(0, 5)).losses[3:]
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'path'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, losses in json.loads(done.stdout.splitlines()[-1]).items():
        # The same update in another order of float32 operations.
        assert losses == pytest.approx(whole[name.rpartition("_")[2]], rel=1e-5), f"{name}, continued by apex"
    for distributed in (True, False):
        checkpoint = str(folder / f"apex_{distributed}" / "step_0000003")
        losses = observe_steps(ONE_PROCESS, recipe(distributed), load_from=checkpoint, steps=(3, 5)).losses
        assert losses == pytest.approx(whole[str(distributed)], rel=1e-5), f"apex_{distributed}, continued by torch"


def test_the_form_on_disk_names_no_implementation() -> None:
    torch_group = {"lr": 0.1, "fused": True, "amsgrad": False, "step": 3.0}
    apex_group = {"lr": 0.1, "bias_correction": True, "step": 3}
    for group in (torch_group, apex_group):
        state: dict[str, Any] = {"optimizer": {"param_groups": [dict(group)]}, "param_state": {}}
        to_portable_state(state)
        assert state["optimizer"]["param_groups"] == [{"lr": 0.1, "step": 3}]


def test_a_reader_keeps_its_own_switches_and_counts_its_own_way() -> None:
    plain: dict[str, Any] = {"state": {0: {}, "common_step": torch.tensor(3.0)}, "param_groups": [{"fused": None}]}
    to_portable_state(plain)
    assert plain == {"state": {0: {}}, "param_groups": [{"step": 3}]}
    from_portable_state(plain, [{"fused": True, "lr": 9.0}], counts_per_tensor=True)
    assert plain["param_groups"] == [{"step": 3, "fused": True, "lr": 9.0}]
    assert float(plain["state"]["common_step"]) == 3
    old: dict[str, Any] = {"state": {"common_step": torch.tensor(3.0)}, "param_groups": [{"foreach": None}]}
    from_portable_state(old, [{"bias_correction": True}], counts_per_tensor=False)
    assert old == {"state": {}, "param_groups": [{"step": 3, "bias_correction": True}]}

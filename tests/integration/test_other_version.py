"""Checkpoints of another megatron-core: read and written again bit for bit, in both directions.

`make test-versions` names the other environment's Python by `--other-python`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_itt.config import RunConfig
from tests.architecture.sources import ROOT
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import NUM_STEPS, observe_steps

SAVED_AFTER = NUM_STEPS - 1
NAME = f"step_{SAVED_AFTER:07d}"
IN_OTHER_VERSION = f"""
import sys
from tests.helpers.steps import observe_steps
from tests.integration.test_other_version import ONE_PROCESS, SAVED_AFTER, bf16_recipe
written, copied, copy = sys.argv[1:]
observe_steps(ONE_PROCESS, bf16_recipe(), save_to=written, steps=(0, SAVED_AFTER))
observe_steps(
    ONE_PROCESS, bf16_recipe(), load_from=f"{{copied}}/{NAME}", save_to=copy, steps=(SAVED_AFTER, SAVED_AFTER)
)
"""


def bf16_recipe() -> RunConfig:
    """bfloat16 weights with float32 copies in the distributed optimizer: the most states that a run has."""
    return tiny_recipe(optimizer={"weight_decay": 0.1}, precision={"dtype": "bf16"})


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their names, without megatron-core."""
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()), "a checkpoint holds no objects"
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    torch_checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and sequences by path."""
    if isinstance(state, Mapping):
        items = {str(key): value for key, value in state.items()}
    elif isinstance(state, list | tuple):
        items = {str(idx): value for idx, value in enumerate(state)}
    else:
        return {prefix: state}
    return {path: leaf for key, part in items.items() for path, leaf in flatten(part, f"{prefix}/{key}").items()}


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    tensors, others = read_tensors(one), read_tensors(other)
    assert tensors.keys() == others.keys() and any("exp_avg_sq" in name for name in tensors)
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    common, other_common = (flatten(torch.load(path / "common.pt", weights_only=False)) for path in (one, other))
    assert common.keys() == other_common.keys()
    for path, leaf in common.items():
        is_tensor = isinstance(leaf, torch.Tensor)
        assert torch.equal(leaf, other_common[path]) if is_tensor else leaf == other_common[path], path


def test_checkpoints_pass_between_versions_bit_for_bit(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    other_python = pytestconfig.getoption("--other-python")
    if other_python is None:
        pytest.skip("needs another environment: --other-python, or make test-versions")
    here, there, copied_there, copied_here = (
        tmp_path / name for name in ("here", "there", "copied_there", "copied_here")
    )
    config = bf16_recipe()
    whole = observe_steps(ONE_PROCESS, config)
    observe_steps(ONE_PROCESS, config, save_to=str(here), steps=(0, SAVED_AFTER))
    done = subprocess.run(
        [other_python, "-W", "ignore", "-c", IN_OTHER_VERSION, str(there), str(here), str(copied_there)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_equal_checkpoints(here / NAME, copied_there / NAME)
    resaved = observe_steps(
        ONE_PROCESS,
        config,
        load_from=str(there / NAME),
        save_to=str(copied_here),
        steps=(SAVED_AFTER, SAVED_AFTER),
    )
    assert resaved.losses == []
    assert_equal_checkpoints(there / NAME, copied_here / NAME)
    continued = observe_steps(ONE_PROCESS, config, load_from=str(copied_there / NAME), steps=(SAVED_AFTER, NUM_STEPS))
    assert continued.losses == whole.losses[SAVED_AFTER:] and continued.grad_norms == whole.grad_norms[SAVED_AFTER:]

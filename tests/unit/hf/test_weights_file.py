"""Weights survive the file system, in one file or in many; anything but whole safetensors is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_itt.errors import ExportError
from megatron_itt.hf.weights_file import SINGLE_FILE, cast_weights, read_weights, write_weights


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layer.{idx}.weight": torch.randn(8, 8) for idx in range(5)} | {"a.logit_quantiles": torch.randn(2, 5)}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 600, 1])
def test_weights_come_back_bit_for_bit(state: dict[str, Tensor], max_shard_bytes: int, tmp_path: Path) -> None:
    names = write_weights(tmp_path, state, max_shard_bytes=max_shard_bytes)
    stored = read_weights(tmp_path)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(names)
    assert len(names) == {10**9: 1, 600: 3, 1: 6}[max_shard_bytes]


def test_casting_leaves_the_quantiles_in_float32(state: dict[str, Tensor]) -> None:
    cast = cast_weights(state, torch.bfloat16)
    assert cast["layer.0.weight"].dtype == torch.bfloat16
    assert torch.equal(cast["a.logit_quantiles"], state["a.logit_quantiles"])


def test_a_truncated_file_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    write_weights(tmp_path, state)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="missing or damaged"):
        read_weights(tmp_path)


def test_a_missing_shard_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = write_weights(tmp_path, state, max_shard_bytes=600)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ExportError, match="missing or damaged"):
        read_weights(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ExportError, match="pickled"):
        read_weights(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=SINGLE_FILE):
        read_weights(tmp_path)

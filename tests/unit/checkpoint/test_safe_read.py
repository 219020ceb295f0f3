"""Loading a checkpoint runs no code from it: a malicious pickle in each place is refused, and does nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_itt.checkpoint.load import SafeShardedStrategy, load_sharded_state
from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.errors import CheckpointError
from tests.helpers.one_rank import built_model, tiny_recipe

WEIGHT = "embedding.word_embeddings.weight"


class Malice:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A model and a checkpoint of it."""
    config = tiny_recipe()
    with built_model(config, dtype=torch.float32) as built:
        state = {**sharded_model_state(built.chunks), "facts": {"step": 1}}
        yield built, save_checkpoint(state, new_run_state(config, step=1), tmp_path / "checkpoints", keep_last=1)


def load(built: Any, checkpoint: Path) -> dict[str, Any]:
    return load_sharded_state(sharded_model_state(built.chunks), checkpoint)


def test_an_honest_checkpoint_is_read(place: tuple[Any, Path]) -> None:
    built, checkpoint = place
    loaded = load(built, checkpoint)
    assert loaded["facts"] == {"step": 1}
    assert loaded["model"][WEIGHT].equal(built.chunks[0].state_dict()[WEIGHT])


def test_the_malice_of_this_test_works_where_pickle_is_trusted(trace: Path) -> None:
    pickle.loads(pickle.dumps(Malice(trace)))
    assert trace.exists()


def in_common(checkpoint: Path, malice: Malice) -> None:
    torch.save({"facts": malice}, checkpoint / "common.pt")


def in_plain_pickle_of_common(checkpoint: Path, malice: Malice) -> None:
    (checkpoint / "common.pt").write_bytes(pickle.dumps(malice))


def in_metadata(checkpoint: Path, malice: Malice) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(malice))


def deep_in_metadata(checkpoint: Path, malice: Malice) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = malice
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_tensor(checkpoint: Path, malice: Malice) -> None:
    replace_entry(checkpoint, malice, as_object=False)


def in_an_object_in_place_of_a_tensor(checkpoint: Path, malice: Malice) -> None:
    replace_entry(checkpoint, malice, as_object=True)


def replace_entry(checkpoint: Path, malice: Malice, *, as_object: bool) -> None:
    """Append a pickle to a data file, and let the metadata point at it for one weight."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index, info), *_ = [item for item in metadata.storage_data.items() if item[0].fqn == WEIGHT]
    buffer = io.BytesIO()
    torch.save([malice], buffer)
    data = checkpoint / info.relative_path
    info.offset, info.length = data.stat().st_size, buffer.tell()
    data.write_bytes(data.read_bytes() + buffer.getvalue())
    if as_object:
        metadata.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
        metadata.storage_data[type(index)(WEIGHT)] = info
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "plant",
    [
        in_common,
        in_plain_pickle_of_common,
        in_metadata,
        deep_in_metadata,
        in_a_tensor,
        in_an_object_in_place_of_a_tensor,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_malicious_file_is_refused_and_nothing_is_executed(place: tuple[Any, Path], trace: Path, plant: Any) -> None:
    built, checkpoint = place
    plant(checkpoint, Malice(trace))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(built, checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize("plant", [in_metadata, deep_in_metadata], ids=lambda plant: plant.__name__)
def test_listing_the_tensors_executes_nothing_either(place: tuple[Any, Path], trace: Path, plant: Any) -> None:
    _, checkpoint = place
    assert WEIGHT in SafeShardedStrategy().load_tensors_metadata(checkpoint)
    plant(checkpoint, Malice(trace))
    with pytest.raises(pickle.UnpicklingError):
        SafeShardedStrategy().load_tensors_metadata(checkpoint)
    assert not trace.exists()


def test_a_rank_lost_while_loading_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CheckpointError would end the run for good; a lost peer must leave it free to start again."""

    def lose_peer(*_: Any, **__: Any) -> None:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:7")

    monkeypatch.setattr("megatron_itt.checkpoint.load.load_sharded", lose_peer)
    with pytest.raises(RuntimeError, match="closed by peer"):
        load_sharded_state({}, tmp_path)

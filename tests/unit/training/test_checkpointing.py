"""What a save costs the training that waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from megatron_itt.checkpoint.store import list_checkpoints
from megatron_itt.training.checkpointing import Checkpointer
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import microbatches

NUM_SAVES, NUM_WARM_UP = 9, 2
LARGE = {
    **{"hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 4, "num_attention_heads": 8, "num_query_groups": 8},
    **{"vocab_size": 4096, "seq_length": 64},
}


@pytest.fixture
def trainer() -> Iterator[Any]:
    from megatron_itt.parallel.groups import start_parallel, stop_parallel
    from megatron_itt.training.step import train_step
    from megatron_itt.training.trainer import build_trainer

    config = tiny_recipe(model=LARGE)
    place = start_parallel(config, process=ONE_PROCESS)
    try:
        trainer = build_trainer(config, place)
        train_step(trainer, iter(microbatches(trainer, 0)), 1)  # before it, an optimizer has no state to save
        yield trainer
    finally:
        stop_parallel()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_background_save_blocks_for_at_most_a_fifth_of_a_plain_one(tmp_path: Path, trainer: Any) -> None:
    """By turns in one process, with 270 MB of state; the first ones start helpers and make plans, and do not count."""
    checkpointers = {asynchronous: open_checkpointer(tmp_path, asynchronous) for asynchronous in (False, True)}
    waits: dict[bool, list[float]] = {False: [], True: []}
    for step in range(1, NUM_SAVES + 1):
        for asynchronous, checkpointer in checkpointers.items():
            started = time.perf_counter()
            checkpointer.save(trainer, step)
            waits[asynchronous].append(time.perf_counter() - started)
            checkpointer.finish()
    (checkpoint,) = list_checkpoints(tmp_path / "True/checkpoints")
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) > 100e6
    plain, background = (median(waits[asynchronous][NUM_WARM_UP:]) for asynchronous in (False, True))
    print(f"a plain save takes {plain:.3f} s, a background save {background:.3f} s: {background / plain:.1%}")
    assert background <= 0.2 * plain


def open_checkpointer(folder: Path, asynchronous: bool) -> Checkpointer:
    config = tiny_recipe(model=LARGE, checkpoint={"asynchronous": asynchronous, "keep_last": 1})
    return Checkpointer(
        config, folder / str(asynchronous), fingerprint_at=lambda _: "data", tokenizer_sha256="tokenizer"
    )


def test_random_states_of_another_type_of_device_start_anew(
    tmp_path: Path, trainer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the same layout on a GPU, whose generator has a state of 16 bytes."""
    checkpointer = open_checkpointer(tmp_path, asynchronous=False)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
        elsewhere = replace(trainer, place=replace(trainer.place, device=torch.device("cuda", 0)))
        checkpointer.save(elsewhere, 1)
    point = checkpointer.find_resume_point()
    assert point is not None and point.state.device == "cuda"
    weights = [value.detach().clone() for value in trainer.built.chunks[0].parameters()]
    for value in trainer.built.chunks[0].parameters():
        value.data.zero_()
    with caplog.at_level("INFO"):
        checkpointer.resume(trainer, point)
    assert all(value.equal(kept) for value, kept in zip(trainer.built.chunks[0].parameters(), weights, strict=True))
    assert "random states restart" in caplog.text

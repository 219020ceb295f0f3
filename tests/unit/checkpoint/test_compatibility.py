"""What may change between a checkpoint and the run that continues from it, and what may not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_itt.checkpoint.compatibility import check_resumable
from megatron_itt.checkpoint.state import new_run_state
from megatron_itt.errors import CheckpointError
from tests.helpers.one_rank import tiny_recipe


def check(*, fingerprint: str = "data", allow: tuple[str, ...] = (), **sections: Any) -> None:
    state = new_run_state(tiny_recipe(), step=3, data_fingerprint="data")

    def fingerprint_at(num_samples: int) -> str:
        assert num_samples == 5 * 4, "asked at the checkpoint's length"
        return fingerprint

    check_resumable(state, tiny_recipe(**sections), fingerprint_at=fingerprint_at, allow_changed=allow)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"parallel": {"tensor": 2, "sequence": True}},
        {"batch": {"global": 4, "micro": 1}},
        {"thinking": {"capacity": [0.7, 0.7, 0.7]}},
        {"thinking": {"routing": "threshold"}},
        {"optimizer": {"overlap_grad_reduce": True}},
    ],
)
def test_layouts_and_budgets_may_change(sections: dict[str, Any]) -> None:
    check(**sections)


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size was 32 and is now 64"),
        ({"thinking": {"capacity": [0.5]}}, "3 routed steps and now has 1"),
        ({"thinking": {"kind": "loop", "capacity": [1.0, 1.0, 1.0]}}, "thinking.kind was 'itt' and is now 'loop'"),
        ({"thinking": {"layers": [0]}}, "thinking.layers"),
        ({"batch": {"global": 8}}, "batch.global was 4 and is now 8"),
        ({"schedule": {"steps": 9}}, "schedule.steps was 5 and is now 9"),
        ({"data": {"reset_at_document_end": True}}, "data.reset_at_document_end was False and is now True"),
    ],
)
def test_another_architecture_or_order_of_samples_is_refused(sections: dict[str, Any], part: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(**sections)
    assert part in str(caught.value)


@pytest.mark.parametrize("key", ["model.qk_norm", "thinking.reuse", "schedule.decay_shape", "batch.ramp"])
def test_a_checkpoint_from_before_a_key_existed_has_its_default(key: str) -> None:
    state = new_run_state(tiny_recipe(), step=3, data_fingerprint="data")
    section, name = key.split(".")
    del state.recipe[section][name]
    check_resumable(state, tiny_recipe(), fingerprint_at=lambda _: "data")
    if key == "thinking.reuse":
        with pytest.raises(CheckpointError, match=r"thinking\.reuse was 'layer' and is now 'attention'"):
            check_resumable(state, tiny_recipe(thinking={"reuse": "attention"}), fingerprint_at=lambda _: "data")


def test_changed_data_is_refused() -> None:
    with pytest.raises(CheckpointError, match="data fingerprint"):
        check(fingerprint="other")


def test_another_end_of_document_token_is_refused_where_both_are_known() -> None:
    def resume(saved: int | None, now: int | None, *allow: str) -> None:
        state = new_run_state(tiny_recipe(), step=3, data_fingerprint="data", end_of_document=saved)
        recipe = tiny_recipe()
        check_resumable(state, recipe, fingerprint_at=lambda _: "data", end_of_document=now, allow_changed=allow)

    for known in ((0, 0), (None, 1), (1, None)):
        resume(*known)
    with pytest.raises(CheckpointError, match="data end-of-document token was 0 and is now 1"):
        resume(0, 1)
    resume(0, 1, "data")


@pytest.mark.parametrize("allow", ["data", "data.blend", "data.blend.code.path"])
def test_changed_data_that_is_wanted_is_accepted(allow: str) -> None:
    check(fingerprint="other", allow=(allow,))
    with pytest.raises(CheckpointError, match=r"schedule\.steps was 5"):
        check(fingerprint="other", allow=(allow,), schedule={"steps": 9})


@pytest.mark.parametrize("allow", ["schedule", "schedule.steps"])
def test_a_longer_run_that_is_wanted_is_accepted(allow: str) -> None:
    check(allow=(allow,), schedule={"steps": 9})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "learning_rate", 1e-4),
        ("optimizer", "betas", [0.8, 0.9]),
        ("optimizer", "clip_grad_norm", 0.5),
        ("schedule", "warmup_steps", 2),
        ("schedule", "decay", "constant"),
    ],
)
def test_other_updates_are_refused_unless_wanted(section: str, key: str, value: Any) -> None:
    changed = {section: {key: value}}
    with pytest.raises(CheckpointError, match=rf"{section}\.{key} was .*--allow-changed={section}\.{key}"):
        check(**changed)
    check(**changed, allow=(f"{section}.{key}",))


def test_a_sharded_optimizer_state_stays_sharded() -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.distributed was"):
        check(optimizer={"distributed": False}, allow=("optimizer", "optimizer.distributed"))


def test_what_the_weights_depend_on_cannot_be_allowed() -> None:
    with pytest.raises(CheckpointError, match=r"model\.hidden_size was 32"):
        check(allow=("model", "model.hidden_size"), model={"hidden_size": 64})


def test_the_way_out_is_named_where_there_is_one() -> None:
    with pytest.raises(CheckpointError, match=r"--allow-changed=schedule\.steps --allow-changed=data"):
        check(fingerprint="other", schedule={"steps": 9})
    with pytest.raises(CheckpointError) as caught:
        check(fingerprint="other", batch={"global": 8})
    assert "--allow-changed" not in str(caught.value)

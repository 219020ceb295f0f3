"""Every layout computes what one rank does (loss, gradient norm, picks, quantiles) and reads any other's checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_itt.model.initialisation import own_shard
from tests.helpers.launch import run_ranks
from tests.helpers.leaving import free_left_trainers
from tests.helpers.one_rank import ONE_PROCESS, tiny_recipe
from tests.helpers.steps import NUM_STEPS, Observed, global_batch, observe_gradients, observe_steps

# In float64 sums in another order differ by 1e-13 after five steps. What is left is a norm that megatron-core rounds to
# float32: its own value, and the clipping of gradients, which AdamW divides out again.
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-10  # of the largest entry; float64 throughout
THINKING: dict[str, dict[str, Any]] = {
    "itt": {},
    "itt_selected": {"attend": "selected", "routing": "topk"},
    "itt_symmetric": {"reweight": "symmetric"},
    "itt_threshold": {"routing": "threshold", "router_z_loss": 0.1},
    "itt_slack": {"routing": "threshold", "threshold_slack": 0.25},
    "itt_elastic": {"capacity": {"sample": [0.3, 0.9]}},
    "itt_z_losses": {"recompute": "routed", "router_z_loss": 0.1},
    "itt_topp": {"routing": "topp"},
    "itt_attention": {"reuse": "attention"},
    "itt_attention_threshold": {"reuse": "attention", "routing": "threshold"},
    "itt_delta_recompute_all": {"update": "delta", "recompute": "layer"},
    "loop": {"kind": "loop", "capacity": [1.0, 1.0, 1.0]},
    "none": {"kind": "none", "capacity": []},
    "itt_tied": {},
    "none_tied": {"kind": "none", "capacity": []},
    "itt_qwen": {},
    "itt_muon": {},
    "itt_ramp": {"router_z_loss": 0.1},
}
RAMP = {"start": 4, "increment": 4, "samples": 8}  # of three steps, the last is whole
QWEN = {"qkv_bias": True, "qk_norm": True, "head_dim": 12}


def layouts(world_size: int) -> list[dict[str, Any]]:
    """All layouts of that many ranks, as recipe sections."""
    found = []
    for tensor, pipeline, virtual, sequence in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (False, True)):
        fits = world_size % (tensor * pipeline) == 0
        if fits and not (virtual == 2 and pipeline == 1) and not (sequence and tensor == 1):
            found.append({"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "sequence": sequence})
    return found


def recipe(kind: str, parallel: dict[str, Any], **optimizer: Any) -> Any:
    """Shares of its 32 tokens are multiples of four: no layout rounds them (`routing.count_selected`).

    Drawn shares are twentieths; of 40 tokens they are even, which layouts of two ranks do not round.
    """
    seq_length = 40 if kind == "itt_elastic" else 32
    return tiny_recipe(
        model={
            "num_query_groups": 4,
            "num_layers": num_layers(parallel),
            "seq_length": seq_length,
            "tie_embeddings": kind.endswith("_tied"),
            **(QWEN if kind == "itt_qwen" else {}),
            "logit_soft_cap": 2.0 if kind == "itt_z_losses" else None,
        },
        thinking=THINKING[kind],
        parallel=parallel,
        batch={"global": 8, "micro": 2, "ramp": RAMP if kind == "itt_ramp" else None},
        optimizer={
            "z_loss": 0.1 if kind == "itt_z_losses" else 0.0,
            "kind": "muon" if kind == "itt_muon" else "adamw",
            **optimizer,
        },
    )


def num_layers(parallel: dict[str, Any]) -> int:
    """Four, or as many as there are model chunks to fill."""
    return max(4, parallel.get("pipeline", 1) * parallel.get("virtual_pipeline", 1))


def observe_on_one_rank(kind: str, *, layers: int = 4) -> Observed:
    config = recipe(kind, {})
    observed = observe_steps(ONE_PROCESS, replace(config, model=replace(config.model, num_layers=layers)))
    free_left_trainers()  # many kinds follow each other in one test
    return observed


def assert_same(observed: list[Observed], expected: Observed) -> None:
    """Every rank reports the same losses and norms, and all ranks together hold the same picks and quantiles."""
    for rank in observed:
        assert rank.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
        assert rank.validation == pytest.approx(expected.validation, rel=TOLERANCE)
        for layer_idx, table in rank.quantiles.items():
            assert (table - expected.quantiles[layer_idx]).abs().max() < 1e-5  # float32 tables of logits below 10
        for key, picked in rank.picks.items():
            assert torch.equal(picked, expected.picks[key]), key
    assert {key for rank in observed for key in rank.picks} == set(expected.picks)


OVERLAPPED = {"overlap_grad_reduce": True}
ALL_OVERLAPPED = {**OVERLAPPED, "overlap_param_gather": True}
REDUCED = [
    ("itt", {"tensor": 2, "sequence": True}, {}),
    ("itt", {"tensor": 2}, {}),
    ("itt", {"pipeline": 2}, {}),
    ("itt", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    ("itt", {}, OVERLAPPED),
    ("itt", {"pipeline": 2}, OVERLAPPED),
    ("itt", {}, {"distributed": False}),
    ("itt", {}, ALL_OVERLAPPED),
    ("itt_z_losses", {}, ALL_OVERLAPPED),
    ("itt_tied", {"pipeline": 2, "virtual_pipeline": 2, "overlap_p2p": True}, ALL_OVERLAPPED),
    ("itt_selected", {"tensor": 2, "sequence": True}, {}),
    ("itt_symmetric", {"tensor": 2, "sequence": True}, {}),
    ("itt_threshold", {"tensor": 2, "sequence": True}, {}),
    ("itt_slack", {"tensor": 2, "sequence": True}, {}),
    ("itt_slack", {"pipeline": 2}, OVERLAPPED),
    ("itt_elastic", {}, OVERLAPPED),
    ("itt_z_losses", {}, OVERLAPPED),
    ("itt_z_losses", {"tensor": 2, "sequence": True}, {}),
    ("itt_topp", {"tensor": 2, "sequence": True}, {}),
    ("itt_delta_recompute_all", {"tensor": 2, "sequence": True}, {}),
    ("itt_elastic", {"tensor": 2, "sequence": True}, {}),
    ("loop", {"tensor": 2, "sequence": True}, {}),
    ("none", {"tensor": 2, "sequence": True}, {}),
    ("none_tied", {"pipeline": 2}, {}),
    ("itt_tied", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    ("itt_tied", {"pipeline": 2}, OVERLAPPED),
    ("itt_tied", {"pipeline": 2}, {"distributed": False}),
    ("itt_tied", {"tensor": 2, "sequence": True}, {}),
    ("itt_qwen", {"tensor": 2, "sequence": True}, {}),
    ("itt_qwen", {"pipeline": 2}, {}),
    ("itt_muon", {"tensor": 2, "sequence": True}, {}),
    ("itt_muon", {"pipeline": 2}, {"distributed": False}),
    ("itt_muon", {}, {"distributed": False}),
    ("itt_muon", {}, ALL_OVERLAPPED),
    ("itt_ramp", {}, OVERLAPPED),
    ("itt_ramp", {"pipeline": 2, "virtual_pipeline": 2}, {}),
]


def test_two_ranks_compute_what_one_computes() -> None:
    expected = {kind: observe_on_one_rank(kind) for kind in THINKING}
    jobs = [(recipe(kind, parallel, **options),) for kind, parallel, options in REDUCED]
    for (kind, _, _), observed in zip(REDUCED, run_ranks(2, observe_steps, jobs), strict=True):
        assert_same(observed, expected[kind])


def test_tensor_sequence_and_pipeline_parallelism_together_compute_what_one_rank_computes() -> None:
    kinds = ("itt", "itt_selected", "itt_slack", "loop")
    parallel = {"tensor": 2, "sequence": True, "pipeline": 2}
    observed = run_ranks(4, observe_steps, [(recipe(kind, parallel),) for kind in kinds])
    for kind, ranks in zip(kinds, observed, strict=True):
        assert_same(ranks, observe_on_one_rank(kind))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["itt", "loop", "none", "itt_tied", "itt_muon"])
def test_every_layout_computes_what_one_rank_computes(kind: str, world_size: int) -> None:
    expected = {layers: observe_on_one_rank(kind, layers=layers) for layers in (4, 8)}
    cases = list(itertools.product(layouts(world_size), (True, False)))
    jobs = [(recipe(kind, parallel, distributed=distributed),) for parallel, distributed in cases]
    for (parallel, _), observed in zip(cases, run_ranks(world_size, observe_steps, jobs), strict=True):
        assert_same(observed, expected[num_layers(parallel)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pipelines_of_four_ranks_compute_the_same_while_gradients_are_reduced() -> None:
    cases: list[dict[str, Any]] = [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
    jobs = [(recipe("itt", parallel, **OVERLAPPED),) for parallel in cases]
    expected = observe_on_one_rank("itt")
    for observed in run_ranks(4, observe_steps, jobs):
        assert_same(observed, expected)


def test_every_gradient_is_that_of_one_rank() -> None:
    """Parameter by parameter, routers and step encodings included: norms of all could hide a wrong factor of one."""
    cases: list[tuple[str, dict[str, Any]]] = [
        *(("itt", parallel) for parallel in ({"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {})),
        ("itt_symmetric", {"tensor": 2, "sequence": True}),  # its logits are gathered with their gradient
        ("itt_tied", {"pipeline": 2}),
        ("itt_qwen", {"tensor": 2}),
        ("itt_qwen", {"tensor": 2, "sequence": True}),
        *(("itt_z_losses", parallel) for parallel in ({"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2})),
        ("itt_threshold", {"tensor": 2, "sequence": True}),
    ]
    expected = {kind: observe_gradients(ONE_PROCESS, recipe(kind, {}, distributed=False)) for kind, _ in cases}
    jobs = [(recipe(kind, parallel, distributed=False),) for kind, parallel in cases]
    for (kind, parallel), ranks in zip(cases, run_ranks(2, observe_gradients, jobs), strict=True):
        assert {name for gradients in ranks for name in gradients} == set(expected[kind])
        for rank, gradients in enumerate(ranks):
            for name, gradient in gradients.items():
                whole = expected[kind][name]
                own = own_shard(whole, name, rank=rank, degree=parallel.get("tensor", 1))
                assert gradient.shape == own.shape, name
                difference = (gradient - own).abs().max()
                assert difference <= GRADIENT_TOLERANCE * whole.abs().max(), (kind, parallel, name)


@pytest.mark.parametrize("kind", ["itt", "itt_tied", "itt_muon"])
def test_a_checkpoint_continues_under_another_layout(kind: str, tmp_path: Path) -> None:
    """Saved after two steps, under TP2 + SP or (tied) over two stages; the rest runs under others, as one rank would.

    A run that starts from its weights alone validates them as the run that saved them did.
    """
    whole = observe_on_one_rank(kind)
    saved_under = {"pipeline": 2} if kind == "itt_tied" else {"tensor": 2, "sequence": True}
    ((saved, _),) = run_ranks(2, _save_after_two, [(recipe(kind, saved_under), str(tmp_path))])
    checkpoint = str(tmp_path / "step_0000002")
    layouts_to_load: list[dict[str, Any]] = [{"tensor": 2}, {"pipeline": 2}, {}]
    jobs = [(recipe(kind, parallel), checkpoint) for parallel in layouts_to_load]
    continued = [ranks[0] for ranks in run_ranks(2, _continue_from, jobs)]
    continued.append(_continue_from(ONE_PROCESS, recipe(kind, {}), checkpoint))
    for observed in continued:
        assert observed.losses == pytest.approx(whole.losses[2:], rel=TOLERANCE)
        assert observed.grad_norms == pytest.approx(whole.grad_norms[2:], rel=TOLERANCE)
        assert observed.validation == pytest.approx(whole.validation, rel=TOLERANCE)
    started = [ranks[0] for ranks in run_ranks(2, _start_from, jobs)]
    started.append(_start_from(ONE_PROCESS, recipe(kind, {}), checkpoint))
    for observed in started:
        assert observed.validation == pytest.approx(saved.validation, rel=TOLERANCE)


def test_an_export_of_tied_stages_has_the_loss_that_they_validated(tmp_path: Path) -> None:
    from megatron_itt.hf.export import ExportOptions, export_checkpoint

    config = recipe("itt_tied", {"pipeline": 2})
    ((saved, _),) = run_ranks(2, _train_and_save, [(config, str(tmp_path / "checkpoints"))])
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "export", ExportOptions(with_tokenizer=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    rows = global_batch(config, NUM_STEPS)
    with torch.no_grad():
        logits = model(rows[:, :-1], routing="topk").logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert float(loss) == pytest.approx(saved.validation, rel=1e-5)  # float32, by another path


def _train_and_save(place: Any, config: Any, root: str) -> Observed:
    return observe_steps(place, config, save_to=root, as_trained=True)


def _save_after_two(place: Any, config: Any, root: str) -> Observed:
    return observe_steps(place, config, save_to=root, steps=(0, 2))


def _continue_from(place: Any, config: Any, checkpoint: str) -> Observed:
    return observe_steps(place, config, load_from=checkpoint, steps=(2, NUM_STEPS))


def _start_from(place: Any, config: Any, checkpoint: str) -> Observed:
    return observe_steps(place, config, weights_from=checkpoint, steps=(0, 0))

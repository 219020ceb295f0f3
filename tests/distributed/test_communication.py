"""Collectives of a routed step under sequence parallelism, counted as they are called; and that no host waits.

One base pass of a plain layer communicates s rows four times forward (gather, scatter, gather, scatter). A routed step
communicates its k selected rows four times, and the first one gathers the logits and the s hidden states before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from megatron_itt.config import RunConfig
from megatron_itt.config.environment import ProcessInfo
from tests.helpers.launch import run_ranks
from tests.helpers.one_rank import tiny_recipe
from tests.helpers.traffic import CountTraffic, Message
from tests.helpers.waiting import WatchOperations

PARALLEL = {"tensor": 2, "sequence": True}
Counted = dict[str, tuple[list[int], list[int], list[str]]]


def count_layer(process: ProcessInfo, config: RunConfig) -> tuple[list[int], list[int], list[str]]:
    """Bytes of the collectives of layer 1, forward and backward; and its operations for which the host waits."""
    from megatron_itt.model.builder import build_model
    from megatron_itt.parallel.groups import start_parallel, stop_parallel

    context = start_parallel(config, process=process)
    try:
        chunk = build_model(config, dtype=torch.float32, device=context.device).chunks[0]
        model = config.model
        hidden = torch.randn(model.seq_length // config.parallel.tensor, config.batch.micro, model.hidden_size)
        rotary = chunk.rotary_pos_emb(model.seq_length)
        hidden.requires_grad_(True)
        forward, backward, watch = CountTraffic(), CountTraffic(), WatchOperations()
        with watch, forward:
            output, _ = chunk.decoder.layers[1](hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        with watch, backward:
            output.sum().backward()
        waiting = [name for name in watch.waiting if name != "tolist"]  # of the attention for CPUs alone
        return _num_bytes(forward.messages), _num_bytes(backward.messages), waiting
    finally:
        stop_parallel()


def _num_bytes(messages: Iterable[Message]) -> list[int]:
    return [message.num_bytes for message in messages]


def recipe(capacity: list[float], **thinking: Any) -> RunConfig:
    kind = "itt" if capacity else "none"
    return tiny_recipe(
        model={"num_query_groups": 4}, thinking={"kind": kind, "capacity": capacity, **thinking}, parallel=PARALLEL
    )


@pytest.fixture(scope="module")
def counted() -> Counted:
    jobs: dict[str, Callable[[], RunConfig]] = {
        "plain": lambda: recipe([]),
        "one": lambda: recipe([0.5]),
        "two": lambda: recipe([0.5, 0.5]),
        "selected": lambda: recipe([0.5], attend="selected"),
        "symmetric": lambda: recipe([0.5], reweight="symmetric"),
        "topp": lambda: recipe([0.5], routing="topp"),
        "threshold": lambda: recipe([0.5], routing="threshold", attend="selected"),
        "recompute": lambda: recipe([0.5, 0.5], recompute="routed"),
    }
    results = run_ranks(2, count_layer, [(make(),) for make in jobs.values()])
    return {name: ranks[0] for name, ranks in zip(jobs, results, strict=True)}


def test_a_routed_step_sends_at_most_what_a_base_pass_sends(
    counted: Counted,
) -> None:
    for direction in (0, 1):
        plain = sum(counted["plain"][direction])
        first = sum(counted["one"][direction]) - plain
        second = sum(counted["two"][direction]) - sum(counted["one"][direction])
        assert 0 < second < first <= plain


def test_a_routed_step_has_four_collectives_of_the_selected_rows(
    counted: Counted,
) -> None:
    config = recipe([0.5])
    row = config.batch.micro * config.model.hidden_size * 4
    whole, selected = config.model.seq_length * row, config.model.seq_length // 2 * row
    logits = config.model.seq_length * config.batch.micro * 4
    base_pass, entry = [whole] * 4, [logits, whole]  # logits first: after the hidden states they would wait for them
    assert counted["plain"][0] == base_pass
    assert counted["one"][0] == base_pass + entry + [selected] * 4
    assert counted["two"][0] == base_pass + entry + [selected] * 8
    assert counted["selected"][0] == counted["symmetric"][0] == counted["one"][0]


def test_logits_are_reduced_backward_only_if_skipped_tokens_need_them(counted: Counted) -> None:
    assert len(counted["symmetric"][1]) == len(counted["one"][1]) + 1


def test_no_rank_waits_for_its_data(counted: Counted) -> None:
    assert {name: found[2] for name, found in counted.items()} == {name: [] for name in counted}

"""The decode speed measurement counts what it should; how fast a machine is, no test says."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_itt.benchmark.decode import DecodeCase, measure_decode_speed
from megatron_itt.errors import ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

SMALL = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 50}


def test_a_budget_of_everything_needs_the_flops_that_can_be_counted_by_hand() -> None:
    case = DecodeCase(**SMALL, capacity=(1.0,), batch_size=3, num_prompt_tokens=8, num_new_tokens=4, num_repeats=1)
    times = measure_decode_speed(case)
    key_value, other = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    attention = 4 * 32 * (8 + 2.5)
    plain = 2 * (2 * (key_value + other) + attention) + 2 * 32 * 50
    assert times.mean_share == 1.0
    assert times.flops_ratio == pytest.approx(1 + (2 * (key_value + other) + attention + 2 * 32) / plain)
    assert times.weight_bytes_ratio == pytest.approx(1 + (key_value + other) / (2 * (key_value + other) + 32 * 50))
    assert times.itt_s > 0 and times.llama_s > 0


def test_thresholds_are_fitted_to_the_random_routers() -> None:
    case = DecodeCase(**SMALL, capacity=(0.5, 0.5), batch_size=8, num_prompt_tokens=24, num_new_tokens=6, num_repeats=1)
    assert 0.25 < measure_decode_speed(case).mean_share < 0.75


def test_a_case_without_tokens_is_refused() -> None:
    with pytest.raises(ExportError, match="num_new_tokens is 0"):
        measure_decode_speed(DecodeCase(**SMALL, num_new_tokens=0))


@pytest.mark.slow
def test_cached_decoding_of_512_tokens_is_eight_times_faster_than_recomputing_the_prefix() -> None:
    torch.manual_seed(0)
    thinking = {"kind": "itt", "layers": [1, 3], "capacity": [0.5, 0.5, 0.5]}
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = ITTForCausalLM(ITTConfig(**shape, vocab_size=4000, thinking=thinking)).eval()
    for layer_idx in (1, 3):
        model.model.layers[layer_idx].thinking.logit_quantiles.copy_(torch.linspace(-0.5, 0.5, 1025).expand(3, -1))
    prompt = torch.randint(0, 4000, (1, 16))
    keys = {"do_sample": False, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=4, **keys)
    seconds = {}
    for use_cache in (True, False):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=512, use_cache=use_cache, **keys)
        seconds[use_cache] = time.perf_counter() - started
    print(f"cached {seconds[True]:.1f} s, recomputing {seconds[False]:.1f} s")
    assert seconds[False] >= 8 * seconds[True]

"""The decode speed measurement counts what it should; how fast a machine is, no test says."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_itt.benchmark.decode import Decoding, measure_decoding
from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ConfigError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

SMALL = ModelConfig(
    hidden_size=32, ffn_hidden_size=48, num_layers=2, num_attention_heads=4, num_query_groups=2, vocab_size=50
)


def test_a_budget_of_everything_needs_the_flops_that_can_be_counted_by_hand() -> None:
    row = measure_decoding(SMALL, (1.0,), 3, Decoding(num_prompt_tokens=8, num_new_tokens=4, num_repeats=1))
    key_value, other = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    attention = 4 * 32 * (8 + 2.5)
    plain = 2 * (2 * (key_value + other) + attention) + 2 * 32 * 50
    assert row["mean_share"] == 1.0
    assert row["flops_ratio"] == pytest.approx(1 + (2 * (key_value + other) + attention + 2 * 32) / plain)
    assert row["weight_bytes_ratio"] == pytest.approx(1 + (key_value + other) / (2 * (key_value + other) + 32 * 50))
    assert row["itt_s"] > 0 and row["llama_s"] > 0


def test_thresholds_are_fitted_to_the_random_routers() -> None:
    decoding = Decoding(num_prompt_tokens=24, num_new_tokens=6, num_repeats=1)
    assert 0.25 < measure_decoding(SMALL, (0.5, 0.5), 8, decoding)["mean_share"] < 0.75


def test_a_case_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_new_tokens is 0"):
        measure_decoding(SMALL, (0.5,), 1, Decoding(num_new_tokens=0))


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

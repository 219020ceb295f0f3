"""The exported model's prompt pass and cached decoding, beside LlamaForCausalLM and a LLaMA of equal FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from megatron_itt.benchmark.models import Shape
from megatron_itt.benchmark.sections import Section, markdown_table
from megatron_itt.errors import ConfigError
from megatron_itt.hf.decode_speed import DecodeCase, DecodeTimes, measure_decode_speed

_COLUMNS = (
    "batch",
    "LLaMA ms/token",
    "ITT ms/token",
    "LLaMA of equal FLOPs",
    "layers of it",
    "ITT / equal FLOPs",
    "ITT / LLaMA",
    "FLOPs",
    "weights read",
    "mean share",
    "LLaMA prompt ms",
    "ITT prompt ms",
    "prompt time/FLOPs",
)


def decode_section(
    shape: Shape,
    *,
    batch_sizes: Sequence[int],
    num_new_tokens: int,
    num_repeats: int,
    num_prompt_tokens: int = 32,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Section:
    """One row per batch size; the layers and the vocabulary are those of the shape."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"--batches {','.join(map(str, batch_sizes))}: give sizes of at least 1, such as 1,8,32")
    model, thinking = shape.config.model, shape.config.thinking
    times: dict[int, DecodeTimes] = {}
    for batch_size in batch_sizes:
        case = DecodeCase(
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_layers=model.num_layers,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_key_value_heads,
            vocab_size=model.vocab_size,
            capacity=tuple(thinking.nominal_capacity),
            batch_size=batch_size,
            num_prompt_tokens=num_prompt_tokens,
            num_new_tokens=num_new_tokens,
            num_repeats=num_repeats,
            device=device,
            dtype=dtype,
        )
        times[batch_size] = measure_decode_speed(case)
    lines = [
        [
            batch_size,
            f"{1e3 * row.llama_s:.2f}",
            f"{1e3 * row.itt_s:.2f}",
            f"{1e3 * row.equal_s:.2f}",
            row.equal_layers,
            f"{row.time_over_equal:.3f}",
            f"{row.itt_s / row.llama_s:.3f}",
            f"{row.flops_ratio:.3f}",
            f"{row.weight_bytes_ratio:.3f}",
            f"{row.mean_share:.2f}",
            f"{1e3 * row.llama_prompt_s:.1f}",
            f"{1e3 * row.itt_prompt_s:.1f}",
            f"{row.prompt_time_per_flops:.3f}",
        ]
        for batch_size, row in times.items()
    ]
    return Section(
        title=f"Cached decoding, {num_new_tokens} tokens after {num_prompt_tokens}, {dtype}: hidden "
        f"{model.hidden_size}, {model.num_layers} layers, vocabulary {model.vocab_size}",
        rows=[
            {"batch": batch_size, **asdict(row), "time_over_equal": row.time_over_equal}
            for batch_size, row in times.items()
        ],
        table=markdown_table(_COLUMNS, lines),
    )

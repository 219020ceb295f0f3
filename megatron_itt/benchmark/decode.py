"""Cached decoding of the export, beside transformers' LLaMA and a LLaMA of equal FLOPs per token.

The models share random weights; every other layer is a thinking layer, and the logit quantiles are fitted to the random
routers, so that about the requested share of tokens is selected. Repetitions alternate, and times are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.accounting.flops import layer_parameters
from megatron_itt.benchmark.machine import DTYPES, synchronized_time
from megatron_itt.benchmark.results import Section
from megatron_itt.benchmark.shapes import Shape
from megatron_itt.config.model import ModelConfig
from megatron_itt.errors import ConfigError
from megatron_itt.hf.folder import SHAPE_FIELDS
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM
from megatron_itt.tables import Columns

CALIBRATION_TOKENS = (2, 192)  # batch, length
COLUMNS: Columns = {
    "batch": "{batch}",
    "LLaMA ms/token": lambda row: f"{1e3 * row['llama_s']:.2f}",
    "ITT ms/token": lambda row: f"{1e3 * row['itt_s']:.2f}",
    "LLaMA of equal FLOPs": lambda row: f"{1e3 * row['equal_s']:.2f}",
    "its layers": "{equal_layers}",
    "ITT / equal FLOPs": "{time_over_equal:.3f}",
    "ITT / LLaMA": lambda row: f"{row['itt_s'] / row['llama_s']:.3f}",
    "FLOPs": "{flops_ratio:.3f}",
    "weights read": "{weight_bytes_ratio:.3f}",
    "selected": "{mean_share:.2f}",
    "LLaMA prompt ms": lambda row: f"{1e3 * row['llama_prompt_s']:.1f}",
    "ITT prompt ms": lambda row: f"{1e3 * row['itt_prompt_s']:.1f}",
    "prompt time/FLOPs": "{prompt_time_per_flops:.3f}",
}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What is decoded, and where."""

    num_prompt_tokens: int = 32
    num_new_tokens: int = 32
    num_repeats: int = 5
    device: str = "cpu"
    dtype: str = "fp32"  # or bf16


def decode_section(shape: Shape, batch_sizes: Sequence[int], decoding: Decoding) -> Section:
    """Measure one row per batch size, with the layers and the vocabulary of the shape."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"--batches {','.join(map(str, batch_sizes))}: give sizes of at least 1, such as 1,8,32")
    model, capacity = shape.config.model, shape.config.thinking.nominal_capacity
    lengths = f"{decoding.num_new_tokens} tokens after {decoding.num_prompt_tokens}"
    sizes = f"hidden {model.hidden_size}, {model.num_layers} layers, vocabulary {model.vocab_size}"
    return Section(
        title=f"Cached decoding, {lengths}, {decoding.dtype}: {sizes}",
        rows=[{"batch": size, **measure_decoding(model, capacity, size, decoding)} for size in batch_sizes],
        columns=COLUMNS,
    )


def measure_decoding(
    model: ModelConfig, capacity: Sequence[float], batch_size: int, decoding: Decoding
) -> dict[str, float]:
    """Decode greedily with all models. ConfigError for sizes below 1.

    Returns seconds per decoded token of the whole batch (`llama_s`, `itt_s`) and for the prompt; FLOPs over LLaMA's, of
    the selected tokens; `mean_share` of tokens that a routed step selects; `weight_bytes_ratio`: weights read per call
    over LLaMA's. `equal_*` is the LLaMA of equal FLOPs; `time_over_equal` is corrected for the FLOPs that whole layers
    cannot match.
    """
    prompt_length, num_new = decoding.num_prompt_tokens, decoding.num_new_tokens
    for name in ("num_prompt_tokens", "num_new_tokens", "num_repeats"):
        if getattr(decoding, name) < 1:
            raise ConfigError(f"{name} is {getattr(decoding, name)}; give at least 1")
    torch.manual_seed(0)
    length = prompt_length + num_new + CALIBRATION_TOKENS[1]
    settings = _settings(model, model.num_layers, length)
    thinking = {"kind": "itt", "layers": list(range(1, model.num_layers, 2)), "capacity": list(capacity)}
    itt = _place(ITTForCausalLM(ITTConfig(**settings, thinking=thinking)), decoding)
    llama = _place(LlamaForCausalLM(LlamaConfig(**settings)), decoding)
    llama.load_state_dict({name: value for name, value in itt.state_dict().items() if ".thinking." not in name})
    prompt = torch.randint(0, model.vocab_size, (batch_size, prompt_length), device=decoding.device)
    num_keys = prompt_length + (num_new + 1) / 2
    with torch.inference_mode():
        _calibrate(itt, decoding.device)
        prompt_selected, selected = _count_selected(itt, prompt, num_new)
        ratio = _flops_ratio(model, selected.sum(2) / (batch_size * num_new), num_keys)
        plain = _llama_flops(model, model.num_layers, num_keys)
        ratios = {
            depth: _llama_flops(model, depth, num_keys) / plain
            for depth in range(1, model.num_layers * (2 + len(capacity)))
        }
        equal_layers, equal_ratio = min(ratios.items(), key=lambda entry: abs(entry[1] - ratio))
        equal = _place(LlamaForCausalLM(LlamaConfig(**_settings(model, equal_layers, length))), decoding)
        times = _time_decoding({"llama": llama, "itt": itt, "equal": equal}, prompt, decoding)
    prompt_ratio = _flops_ratio(model, prompt_selected.double().mean((2, 3)), (prompt_length + 1) / 2)
    return {
        **{f"{name}_s": token for name, (_, token) in times.items()},
        "llama_prompt_s": times["llama"][0],
        "itt_prompt_s": times["itt"][0],
        "equal_layers": equal_layers,
        "equal_flops_ratio": equal_ratio,
        "flops_ratio": ratio,
        "prompt_flops_ratio": prompt_ratio,
        "mean_share": float(selected.mean() / batch_size),
        "weight_bytes_ratio": _weight_bytes_ratio(model, selected),
        "time_over_equal": times["itt"][1] / times["equal"][1] / (ratio / equal_ratio),
        "prompt_time_per_flops": times["itt"][0] / times["llama"][0] / prompt_ratio,
    }


def _settings(model: ModelConfig, num_layers: int, length: int) -> dict[str, Any]:
    shape = replace(model, num_layers=num_layers, seq_length=length, tie_embeddings=False)
    settings = {field: getattr(shape, name) for field, name in SHAPE_FIELDS.items()}
    return {**settings, "rope_theta": float(model.rope_base)}


def _place(model: Any, decoding: Decoding) -> Any:
    return model.eval().to(decoding.device, DTYPES[decoding.dtype])


def _calibrate(itt: ITTForCausalLM, device: str) -> None:
    """Fit the logit quantiles of each layer and step to random tokens, in the order in which they are computed."""
    tokens = torch.randint(0, itt.config.vocab_size, CALIBRATION_TOKENS, device=device)
    routers = [itt.model.layers[layer_idx].thinking for layer_idx in itt.config.thinking["layers"]]
    for thinking in routers:
        thinking.router.normal_(std=1.0)
        thinking.logit_quantiles.copy_(torch.linspace(-1, 1, thinking.logit_quantiles.shape[1], device=device))
    for idx, thinking in enumerate(routers):
        for step, table in enumerate(thinking.logit_quantiles):
            output = itt(tokens, routing="threshold", use_cache=False, output_router_logits=True)
            logits = output.router_logits[idx][:, step].flatten().float()
            table.copy_(torch.quantile(logits, torch.linspace(0, 1, table.shape[0], device=logits.device)))


def _time_decoding(models: dict[str, Any], prompt: Tensor, decoding: Decoding) -> dict[str, list[float]]:
    """Median seconds of each model for the prompt, and per token after it."""
    for model in models.values():
        _decode(model, prompt, min(decoding.num_new_tokens, 2))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(decoding.num_repeats):
        for name in list(models) if turn % 2 == 0 else reversed(list(models)):
            times[name].append(_decode(models[name], prompt, decoding.num_new_tokens))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}


def _decode(model: Any, prompt: Tensor, num_new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and per greedy token after it."""
    started = synchronized_time(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    between = synchronized_time(prompt.device)
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return between - started, (synchronized_time(prompt.device) - between) / num_new_tokens


def _count_selected(itt: ITTForCausalLM, prompt: Tensor, num_new_tokens: int) -> tuple[Tensor, Tensor]:
    """The prompt's selected tokens [layer, step, b, c], and their number in decoding [layer, step, call]."""
    output = itt(prompt, use_cache=True, logits_to_keep=1, output_routing=True)
    prompt_selected = torch.stack([mask.transpose(0, 1) for mask in output.routing])
    counts = []
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = itt(token, past_key_values=output.past_key_values, use_cache=True, output_routing=True)
        counts.append(torch.stack([mask.sum((0, 2)) for mask in output.routing]))
    return prompt_selected, torch.stack(counts, dim=2).double()


def _llama_flops(model: ModelConfig, num_layers: int, num_keys: float) -> float:
    """FLOPs of one token of a LLaMA; `num_keys`: keys per query."""
    per_layer = 2 * layer_parameters(model).matrices + 4 * model.hidden_size * num_keys
    return num_layers * per_layer + 2 * model.hidden_size * model.vocab_size


def _flops_ratio(model: ModelConfig, shares: Tensor, num_keys: float) -> float:
    """FLOPs per token over LLaMA's. shares [layer, step] of selected tokens."""
    layer, attention, extra = layer_parameters(model), 4 * model.hidden_size * num_keys, 0.0
    for steps in shares.tolist():
        extra += 2 * layer.key_value + 2 * model.hidden_size * len(steps)
        extra += sum(steps) * (2 * (layer.matrices - layer.key_value) + attention)
        extra += sum(steps[:-1]) * 2 * layer.key_value
    return 1 + extra / _llama_flops(model, model.num_layers, num_keys)


def _weight_bytes_ratio(model: ModelConfig, selected: Tensor) -> float:
    """Weights read per call over LLaMA's; a routed step reads its matrices once if it selects any row."""
    layer = layer_parameters(model)
    plain = model.num_layers * layer.matrices + model.hidden_size * model.vocab_size
    taken = (selected > 0).double().mean(2)
    extra = (selected.shape[0] + float(taken[:, :-1].sum())) * layer.key_value
    return 1 + (extra + float(taken.sum()) * (layer.matrices - layer.key_value)) / plain

"""Cached decoding of the export, beside transformers' LLaMA and a LLaMA of equal FLOPs per token.

The models share random weights; the logit quantiles are fitted to the random routers, so that about the requested
share of tokens is selected. Repetitions of the models alternate, and times are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.benchmark.results import Section, markdown_table
from megatron_itt.benchmark.shapes import Shape
from megatron_itt.benchmark.timing import synchronized_time
from megatron_itt.errors import ConfigError, ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

CALIBRATION_TOKENS = (2, 192)  # batch, length


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """Shape of the models (every other layer is a thinking layer), and what is decoded."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 2560
    num_layers: int = 8
    num_heads: int = 32
    num_kv_heads: int = 32
    vocab_size: int = 32000
    capacity: tuple[float, ...] = (0.5, 0.5, 0.5)
    batch_size: int = 1
    num_prompt_tokens: int = 32
    num_new_tokens: int = 128
    num_repeats: int = 5
    device: str = "cpu"
    dtype: str = "fp32"  # or bf16


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """Seconds per decoded token (of the whole batch) and for the prompt; FLOPs ratios count the selected tokens.

    `equal_*`: the LLaMA of equal FLOPs, with `equal_layers` layers and `equal_flops_ratio` times LLaMA's FLOPs.
    `mean_share`: of the tokens that a routed step selects. `weight_bytes_ratio`: weights read per call, over LLaMA's.
    """

    llama_s: float
    itt_s: float
    equal_s: float
    llama_prompt_s: float
    itt_prompt_s: float
    equal_layers: int
    equal_flops_ratio: float
    flops_ratio: float
    prompt_flops_ratio: float
    mean_share: float
    weight_bytes_ratio: float

    @property
    def time_over_equal(self) -> float:
        """ITT's time over that of the LLaMA of equal FLOPs, corrected for the FLOPs that whole layers cannot match."""
        return self.itt_s / self.equal_s / (self.flops_ratio / self.equal_flops_ratio)

    @property
    def prompt_time_per_flops(self) -> float:
        """Time ratio of the prompt over its FLOPs ratio."""
        return self.itt_prompt_s / self.llama_prompt_s / self.prompt_flops_ratio


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
    """Measure one row per batch size, with the layers and the vocabulary of the shape."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"--batches {','.join(map(str, batch_sizes))}: give sizes of at least 1, such as 1,8,32")
    model = shape.config.model
    rows = []
    for batch_size in batch_sizes:
        case = DecodeCase(
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_layers=model.num_layers,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_key_value_heads,
            vocab_size=model.vocab_size,
            capacity=shape.config.thinking.nominal_capacity,
            batch_size=batch_size,
            num_prompt_tokens=num_prompt_tokens,
            num_new_tokens=num_new_tokens,
            num_repeats=num_repeats,
            device=device,
            dtype=dtype,
        )
        times = measure_decode_speed(case)
        rows.append({"batch": batch_size, **asdict(times), "time_over_equal": times.time_over_equal})
        rows[-1]["prompt_time_per_flops"] = times.prompt_time_per_flops
    return Section(
        title=f"Cached decoding, {num_new_tokens} tokens after {num_prompt_tokens}, {dtype}: hidden "
        f"{model.hidden_size}, {model.num_layers} layers, vocabulary {model.vocab_size}",
        rows=rows,
        table=_format_table(rows),
    )


def _format_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "batch": lambda row: row["batch"],
        "LLaMA ms/token": lambda row: f"{1e3 * row['llama_s']:.2f}",
        "ITT ms/token": lambda row: f"{1e3 * row['itt_s']:.2f}",
        "LLaMA of equal FLOPs": lambda row: f"{1e3 * row['equal_s']:.2f}",
        "its layers": lambda row: row["equal_layers"],
        "ITT / equal FLOPs": lambda row: f"{row['time_over_equal']:.3f}",
        "ITT / LLaMA": lambda row: f"{row['itt_s'] / row['llama_s']:.3f}",
        "FLOPs": lambda row: f"{row['flops_ratio']:.3f}",
        "weights read": lambda row: f"{row['weight_bytes_ratio']:.3f}",
        "selected": lambda row: f"{row['mean_share']:.2f}",
        "LLaMA prompt ms": lambda row: f"{1e3 * row['llama_prompt_s']:.1f}",
        "ITT prompt ms": lambda row: f"{1e3 * row['itt_prompt_s']:.1f}",
        "prompt time/FLOPs": lambda row: f"{row['prompt_time_per_flops']:.3f}",
    }
    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def measure_decode_speed(case: DecodeCase) -> DecodeTimes:
    """Decode greedily with all models. ExportError for sizes below 1."""
    problems = [f"{key} is {value}" for key, value in asdict(case).items() if isinstance(value, int) and value < 1]
    if problems or not case.capacity:
        raise ExportError(f"{problems[0] if problems else 'capacity is empty'}; give at least 1.")
    torch.manual_seed(0)
    itt, llama = _build(case)
    prompt = torch.randint(0, case.vocab_size, (case.batch_size, case.num_prompt_tokens), device=case.device)
    average = case.num_prompt_tokens + (case.num_new_tokens + 1) / 2
    with torch.inference_mode():
        _calibrate(itt, case)
        prompt_selected, selected = _count_selected(itt, prompt, case.num_new_tokens)
        flops_ratio = _flops_ratio(case, selected.sum(2) / (case.batch_size * case.num_new_tokens), average)
        equal_layers, equal_ratio = _equal_depth(case, flops_ratio, average)
        models = {"llama": llama, "itt": itt, "equal": _build_llama(case, _shape(case, equal_layers))}
        for model in models.values():
            _decode(model, prompt, min(case.num_new_tokens, 2))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for turn in range(case.num_repeats):
            for name in list(models) if turn % 2 == 0 else reversed(list(models)):
                times[name].append(_decode(models[name], prompt, case.num_new_tokens))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    return DecodeTimes(
        llama_s=middle["llama"][1],
        itt_s=middle["itt"][1],
        equal_s=middle["equal"][1],
        llama_prompt_s=middle["llama"][0],
        itt_prompt_s=middle["itt"][0],
        equal_layers=equal_layers,
        equal_flops_ratio=equal_ratio,
        flops_ratio=flops_ratio,
        prompt_flops_ratio=_flops_ratio(case, prompt_selected.double().mean((2, 3)), (case.num_prompt_tokens + 1) / 2),
        mean_share=float(selected.mean() / case.batch_size),
        weight_bytes_ratio=_weight_bytes_ratio(case, selected),
    )


def _build(case: DecodeCase) -> tuple[ITTForCausalLM, LlamaForCausalLM]:
    shape = _shape(case, case.num_layers)
    layers = list(range(1, case.num_layers, 2))
    thinking = {"kind": "itt", "layers": layers, "capacity": list(case.capacity)}
    itt = _place(ITTForCausalLM(ITTConfig(**shape, thinking=thinking)), case)
    llama = _build_llama(case, shape)
    llama.load_state_dict({name: value for name, value in itt.state_dict().items() if ".thinking." not in name})
    return itt, llama


def _build_llama(case: DecodeCase, shape: dict[str, Any]) -> LlamaForCausalLM:
    return _place(LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, tie_word_embeddings=False)), case)


def _place(model: Any, case: DecodeCase) -> Any:
    return model.eval().to(case.device, torch.bfloat16 if case.dtype == "bf16" else torch.float32)


def _shape(case: DecodeCase, num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": case.vocab_size,
        "hidden_size": case.hidden_size,
        "intermediate_size": case.ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": case.num_heads,
        "num_key_value_heads": case.num_kv_heads,
        "max_position_embeddings": case.num_prompt_tokens + case.num_new_tokens + CALIBRATION_TOKENS[1],
    }


def _calibrate(itt: ITTForCausalLM, case: DecodeCase) -> None:
    """Fit the logit quantiles of each layer and step to random tokens, in the order in which they are computed."""
    tokens = torch.randint(0, case.vocab_size, CALIBRATION_TOKENS, device=case.device)
    routers = [itt.model.layers[layer_idx].thinking for layer_idx in itt.config.thinking["layers"]]
    for thinking in routers:
        thinking.router.normal_(std=1.0)
        thinking.logit_quantiles.copy_(torch.linspace(-1, 1, thinking.logit_quantiles.shape[1], device=case.device))
    for idx, thinking in enumerate(routers):
        for step, table in enumerate(thinking.logit_quantiles):
            output = itt(tokens, routing="threshold", use_cache=False, output_router_logits=True)
            logits = output.router_logits[idx][:, step].flatten().float()
            table.copy_(torch.quantile(logits, torch.linspace(0, 1, table.shape[0], device=logits.device)))


def _decode(model: Any, prompt: Tensor, num_new_tokens: int) -> tuple[float, float]:
    """Return the seconds for the prompt, and per greedy token after it."""
    started = synchronized_time(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    between = synchronized_time(prompt.device)
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return between - started, (synchronized_time(prompt.device) - between) / num_new_tokens


def _count_selected(itt: ITTForCausalLM, prompt: Tensor, num_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the prompt's selected tokens [layer, step, b, c], and their number in decoding [layer, step, call]."""
    output = itt(prompt, use_cache=True, logits_to_keep=1, output_routing=True)
    prompt_selected = torch.stack([mask.transpose(0, 1) for mask in output.routing])
    counts = []
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = itt(token, past_key_values=output.past_key_values, use_cache=True, output_routing=True)
        counts.append(torch.stack([mask.sum((0, 2)) for mask in output.routing]))
    return prompt_selected, torch.stack(counts, dim=2).double()


def _sizes(case: DecodeCase) -> tuple[float, float, float]:
    """Return the weights of a layer's key and value projections, of its other matrices, and of the head."""
    key_value = 2 * case.hidden_size**2 * case.num_kv_heads / case.num_heads
    return (
        key_value,
        2 * case.hidden_size**2 + 3 * case.hidden_size * case.ffn_hidden_size,
        float(case.hidden_size * case.vocab_size),
    )


def _flops_ratio(case: DecodeCase, shares: Tensor, num_keys: float) -> float:
    """Return FLOPs per token over LLaMA's. shares [layer, step] of selected tokens; num_keys: keys per query."""
    key_value, other, _ = _sizes(case)
    attention = 4 * case.hidden_size * num_keys
    plain = _llama_flops(case, case.num_layers, num_keys)
    extra = 0.0
    for steps in shares.tolist():
        extra += 2 * key_value + 2 * case.hidden_size * len(steps)
        extra += sum(steps) * (2 * other + attention) + sum(steps[:-1]) * 2 * key_value
    return 1 + extra / plain


def _llama_flops(case: DecodeCase, num_layers: int, num_keys: float) -> float:
    key_value, other, head = _sizes(case)
    return num_layers * (2 * (key_value + other) + 4 * case.hidden_size * num_keys) + 2 * head


def _equal_depth(case: DecodeCase, flops_ratio: float, num_keys: float) -> tuple[int, float]:
    """Return the number of layers whose FLOPs are closest to `flops_ratio` times LLaMA's, and their own ratio."""
    plain = _llama_flops(case, case.num_layers, num_keys)
    ratios = {
        depth: _llama_flops(case, depth, num_keys) / plain
        for depth in range(1, case.num_layers * (2 + len(case.capacity)))
    }
    return min(ratios.items(), key=lambda entry: abs(entry[1] - flops_ratio))


def _weight_bytes_ratio(case: DecodeCase, selected: Tensor) -> float:
    """Return weights read per call over LLaMA's; a routed step reads its matrices once if it selects any row."""
    key_value, other, head = _sizes(case)
    plain = case.num_layers * (key_value + other) + head
    taken = (selected > 0).double().mean(2)
    extra = selected.shape[0] * key_value + float(taken.sum()) * other + float(taken[:, :-1].sum()) * key_value
    return 1 + extra / plain

"""How long cached decoding takes beside transformers' own LLaMA, and beside the FLOPs that it needs. No megatron.

Both models share their weights, which are random; the tables of thresholds are fitted to the random routers, so that
about the asked shares of tokens think. A second LLaMA has more layers, as many as bring its FLOPs per token closest to
the ITT's. Times are medians over repetitions that alternate between the models.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_itt.errors import ExportError
from megatron_itt.hf.remote_code.configuration_itt import ITTConfig
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

CALIBRATION_TOKENS = (2, 192)


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """Shape of the models (every other layer thinks), and what is decoded."""

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
    """Seconds per decoded token (of the whole batch) and for the prompt; FLOPs ratios count the picks made.

    `equal_*` are of the deeper LLaMA, with `equal_layers` layers and `equal_flops_ratio` times the plain one's FLOPs.
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
    def time_per_flops(self) -> float:
        """ITT's time over LLaMA's, over the FLOPs ratio: 1 means that thinking costs exactly its FLOPs."""
        return self.itt_s / self.llama_s / self.flops_ratio

    @property
    def time_over_equal(self) -> float:
        """ITT's time over that of the LLaMA of equal FLOPs, corrected for what whole layers cannot match."""
        return self.itt_s / self.equal_s / (self.flops_ratio / self.equal_flops_ratio)

    @property
    def prompt_time_per_flops(self) -> float:
        """The same for the pass over the prompt."""
        return self.itt_prompt_s / self.llama_prompt_s / self.prompt_flops_ratio


def measure_decode_speed(case: DecodeCase) -> DecodeTimes:
    """Decode greedily with both models. ExportError for a case that cannot work."""
    problems = [f"{key} is {value}" for key, value in asdict(case).items() if isinstance(value, int) and value < 1]
    if problems or not case.capacity:
        raise ExportError(f"{problems[0] if problems else 'capacity is empty'}; give at least 1.")
    torch.manual_seed(0)
    itt, llama = _build(case)
    prompt = torch.randint(0, case.vocab_size, (case.batch_size, case.num_prompt_tokens), device=case.device)
    average = case.num_prompt_tokens + (case.num_new_tokens + 1) / 2
    with torch.inference_mode():
        _calibrate(itt, case)
        prompt_picks, picks = _count_picks(itt, prompt, case.num_new_tokens)
        flops_ratio = _flops_ratio(case, picks.sum(2) / (case.batch_size * case.num_new_tokens), average)
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
        prompt_flops_ratio=_flops_ratio(case, prompt_picks.double().mean((2, 3)), (case.num_prompt_tokens + 1) / 2),
        mean_share=float(picks.mean() / case.batch_size),
        weight_bytes_ratio=_weight_bytes_ratio(case, picks),
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
    """Fit each table of thresholds to the logits that its router gives to random tokens, layer after layer."""
    tokens = torch.randint(0, case.vocab_size, CALIBRATION_TOKENS, device=case.device)
    parts = [itt.model.layers[layer_idx].thinking for layer_idx in itt.config.thinking["layers"]]
    for thinking in parts:
        thinking.router.normal_(std=1.0)
        thinking.logit_quantiles.copy_(torch.linspace(-1, 1, thinking.logit_quantiles.shape[1], device=case.device))
    for thinking in parts:
        select = thinking.select

        def fit(hidden: Tensor, step: int, *rest: Any, thinking: Any = thinking, select: Any = select) -> Any:
            logits = select(hidden, step, *rest)[1].flatten().float()
            table = thinking.logit_quantiles[step - 1]
            table.copy_(torch.quantile(logits, torch.linspace(0, 1, table.shape[0], device=logits.device)))
            call = rest[0]
            return select(hidden, step, call, thinking.limits(call))

        thinking.select = fit
        itt(tokens, routing="threshold", use_cache=False)
        del thinking.select


def _decode(model: Any, prompt: Tensor, num_new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and per greedy token after it."""
    started = _now(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    between = _now(prompt.device)
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return between - started, (_now(prompt.device) - between) / num_new_tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _count_picks(itt: ITTForCausalLM, prompt: Tensor, num_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Who thought: [layer, step, b, c] over the prompt, and the number of rows [layer, step, call] at decoding."""
    output = itt(prompt, use_cache=True, logits_to_keep=1, output_routing=True)
    prompt_picks = torch.stack([picked.transpose(0, 1) for picked in output.routing])
    counts = []
    for _ in range(num_new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = itt(token, past_key_values=output.past_key_values, use_cache=True, output_routing=True)
        counts.append(torch.stack([picked.sum((0, 2)) for picked in output.routing]))
    return prompt_picks, torch.stack(counts, dim=2).double()


def _sizes(case: DecodeCase) -> tuple[float, float, float]:
    """Weights of one layer's key and value projections, of its other matrices, and of the head."""
    key_value = 2 * case.hidden_size**2 * case.num_kv_heads / case.num_heads
    return (
        key_value,
        2 * case.hidden_size**2 + 3 * case.hidden_size * case.ffn_hidden_size,
        float(case.hidden_size * case.vocab_size),
    )


def _flops_ratio(case: DecodeCase, shares: Tensor, num_keys: float) -> float:
    """FLOPs of a token over LLaMA's. shares [layer, step] of tokens that thought; num_keys: what a query sees."""
    key_value, other, _ = _sizes(case)
    attention = 4 * case.hidden_size * num_keys
    plain = _llama_flops(case, case.num_layers, num_keys)
    extra = 0.0
    for picked in shares.tolist():
        extra += 2 * key_value + 2 * case.hidden_size * len(picked)
        extra += sum(picked) * (2 * other + attention) + sum(picked[:-1]) * 2 * key_value
    return 1 + extra / plain


def _llama_flops(case: DecodeCase, num_layers: int, num_keys: float) -> float:
    """FLOPs of a plain model's token."""
    key_value, other, head = _sizes(case)
    return num_layers * (2 * (key_value + other) + 4 * case.hidden_size * num_keys) + 2 * head


def _equal_depth(case: DecodeCase, flops_ratio: float, num_keys: float) -> tuple[int, float]:
    """Layers of the LLaMA whose FLOPs come closest to `flops_ratio` times the plain one's, and its own ratio."""
    plain = _llama_flops(case, case.num_layers, num_keys)
    ratios = {
        depth: _llama_flops(case, depth, num_keys) / plain
        for depth in range(1, case.num_layers * (2 + len(case.capacity)))
    }
    return min(ratios.items(), key=lambda entry: abs(entry[1] - flops_ratio))


def _weight_bytes_ratio(case: DecodeCase, picks: Tensor) -> float:
    """Weights read per call over LLaMA's: a step reads its matrices once, however many rows (at least one) take it."""
    key_value, other, head = _sizes(case)
    plain = case.num_layers * (key_value + other) + head
    taken = (picks > 0).double().mean(2)
    extra = picks.shape[0] * key_value + float(taken.sum()) * other + float(taken[:, :-1].sum()) * key_value
    return 1 + extra / plain

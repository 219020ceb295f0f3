"""The model as transformers uses it: generation, gradients, saving, loading without megatron, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, pipeline

from megatron_itt.hf.folder import AUTO_MAP, REMOTE_CODE_FILES
from megatron_itt.hf.remote_code import modeling_itt
from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM
from megatron_itt.hf.remote_code.routing_itt import thresholds

BUDGETS = [None, [0.3, 0.9, 0.0], [[0.2, 0.5, 0.9], [1.0, 0.0, 0.4], [0.7, 0.7, 0.7]]]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask(tokens: torch.Tensor) -> torch.Tensor:
    result = torch.ones_like(tokens)
    result[1, :4] = 0
    result[2, :11] = 0
    return result


GREEDY = [(pattern, budget) for pattern in ({}, {"attend": "selected"}) for budget in BUDGETS]


@pytest.mark.parametrize(("pattern", "budget"), [*GREEDY, ({"kind": "loop"}, None)], ids=str)
def test_greedy_decoding_with_the_cache_gives_the_tokens_of_the_full_forward_pass(
    pattern: dict, budget: Any, build: Callable, tokens: torch.Tensor, mask: torch.Tensor
) -> None:
    model = build(dtype=torch.float32, **pattern)
    keys = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, thinking_budget=budget, **keys)
    assert torch.equal(cached, model.generate(tokens, thinking_budget=budget, use_cache=False, **keys))
    assert cached.shape == (3, 41)


def test_beam_search_reorders_the_cache(build: Callable, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    model = build()
    keys = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    budget = BUDGETS[2]
    cached = model.generate(tokens, thinking_budget=budget, **keys)
    assert torch.equal(cached, model.generate(tokens, thinking_budget=budget, use_cache=False, **keys))


def test_assisted_decoding_crops_the_cache(build: Callable) -> None:
    model = build()
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    keys = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 60}
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **keys), model.generate(prompt, **keys))


def test_sampling_follows_the_seed(build: Callable, tokens: torch.Tensor) -> None:
    model = build()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(model.generate(tokens, max_new_tokens=8, do_sample=True, pad_token_id=0))
    assert torch.equal(*results)


def test_the_text_generation_pipeline_takes_the_model(build: Callable, tokenizer_dir: Path) -> None:
    model = build(vocab_size=257)
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer_dir))
    keys = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, "pad_token_id": 0}
    results = generator(["abc", "a longer prompt"], batch_size=2, thinking_budget=[0.5, 1.0, 0.0], **keys)
    alone = generator("abc", thinking_budget=[0.5, 1.0, 0.0], **keys)
    assert results[0][0]["generated_text"] == alone[0]["generated_text"]


def test_rows_of_a_batch_do_not_touch_each_other(build: Callable, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    model = build()
    with torch.no_grad():
        together = model(tokens, attention_mask=mask, thinking_budget=BUDGETS[2]).logits
        for row in range(3):
            start = int((mask[row] == 0).sum())
            alone = model(tokens[row : row + 1, start:], thinking_budget=BUDGETS[2][row]).logits
            assert torch.allclose(together[row, start:], alone[0], rtol=0, atol=1e-10)


def test_the_budget_decides_how_many_tokens_are_selected(build: Callable) -> None:
    model = build()
    tokens = torch.randint(0, 61, (4, 100))
    with torch.no_grad():
        selected = model(tokens, thinking_budget=[0.0, 1.0, 0.3], routing="topk", output_routing=True).routing[0]
        model.config.thinking_budget = [0.0, 0.0, 0.0]
        default = model(tokens, output_routing=True).routing
    assert selected.float().mean(dim=(0, 2)).tolist() == pytest.approx([0.0, 1.0, 0.3])
    assert not any(bool(selected.any()) for selected in default)


def test_router_logits_are_those_that_select(build: Callable, tokens: torch.Tensor) -> None:
    model = build()
    with torch.no_grad():
        output = model(tokens, output_routing=True, output_router_logits=True)
        assert model(tokens).router_logits is None
    assert len(output.router_logits) == 2
    for layer_idx, logits, selected in zip((0, 2), output.router_logits, output.routing, strict=True):
        quantiles = model.model.layers[layer_idx].thinking.logit_quantiles
        limits = thresholds(quantiles, torch.tensor([[0.6, 0.5, 0.4]]))
        assert logits.shape == (3, 3, 17)
        assert torch.equal(selected, logits > limits[..., None].to(logits.dtype))


def test_hidden_states_and_kept_logits(build: Callable, tokens: torch.Tensor) -> None:
    model = build()
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True, logits_to_keep=2)
        full = model(tokens, return_dict=False)[0]
    assert len(output.hidden_states) == 4
    assert torch.allclose(output.logits, full[:, -2:], rtol=0, atol=1e-12)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(embedded, full)


@pytest.mark.parametrize("pattern", [{}, {"attend": "selected"}, {"routing": "topp"}, {"gate": "tanh"}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(pattern: dict, checkpointing: bool, build: Callable) -> None:
    model = build(**pattern).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 61, (2, 24))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_gradient_checkpointing_keeps_the_gradients(build: Callable) -> None:
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


def test_gradients_are_right_with_padding_in_the_batch(build: Callable) -> None:
    model = build(attend="selected").train()
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    weights = torch.randn(2, 16, 61, dtype=torch.float64) * mask[..., None]

    def measure() -> torch.Tensor:
        return (model(tokens, attention_mask=mask).logits * weights).sum()

    measure().backward()
    parameter = model.model.layers[0].self_attn.k_proj.weight
    step, index = 1e-6, (3, 5)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[index] += sign * step
            values.append(float(measure()))
            parameter[index] -= sign * step
    # Central difference in float64: its own error is of the order of step squared.
    assert float(parameter.grad[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_few_steps_of_training_lower_the_loss(build: Callable) -> None:
    model = build(dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(15):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_quantiles_stay_float32_whatever_the_model_is_cast_to(build: Callable) -> None:
    model = build(dtype=torch.float32)
    before = model.model.layers[0].thinking.logit_quantiles.clone()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        thinking = model.model.layers[0].thinking
        assert thinking.router.dtype == dtype
        assert torch.equal(thinking.logit_quantiles, before)


def test_a_new_model_starts_as_the_method_says() -> None:
    thinking = {"kind": "itt", "layers": [0], "capacity": [0.5, 0.5]}
    keys = {"vocab_size": 11, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ITTForCausalLM(modeling_itt.ITTConfig(intermediate_size=16, thinking=thinking, **keys))
    step_encoding = model.model.layers[0].thinking.step_encoding
    assert torch.equal(step_encoding, torch.ones(3, 64))
    assert model.model.layers[0].thinking.router.std().item() == pytest.approx(0.02, rel=0.3)


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"thinking_budget": [0.5, 0.5]}, "thinking_budget has shape"),
    ({"thinking_budget": [[0.5, 0.5, 0.5]] * 2}, "thinking_budget has shape"),
    ({"thinking_budget": [0.5, 0.5, 1.5]}, "must be in"),
    ({"thinking_budget": [0.5, 0.5, float("nan")]}, "must be in"),
    ({"routing": "random"}, "use one of"),
    ({"attention_mask": torch.ones(3, 5)}, "attention_mask has shape"),
    ({"past_key_values": DynamicCache()}, "needs its own ITTCache"),
    ({"inputs_embeds": torch.zeros(3, 17, 32)}, "exactly one of"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_CALLS, ids=lambda value: str(value)[:40])
def test_a_bad_call_says_what_is_wrong(keys: dict, message: str, build: Callable, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        build()(tokens, **keys)


def test_a_budget_for_a_model_without_router_is_refused(build: Callable, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no router"):
        build(kind="loop")(tokens, thinking_budget=[0.5, 0.5, 0.5])


def test_threshold_without_quantiles_is_refused_but_topk_works(build: Callable, tokens: torch.Tensor) -> None:
    model = build()
    model.model.layers[2].thinking.logit_quantiles.zero_()
    with pytest.raises(ValueError, match=r"layers\.2\.thinking\.logit_quantiles is empty"):
        model(tokens)
    assert model(tokens, routing="topk").logits.isfinite().all()
    assert model(tokens, thinking_budget=[1.0, 0.0, 1.0]).logits.isfinite().all()


def test_topk_cannot_continue_from_a_cache(build: Callable, tokens: torch.Tensor) -> None:
    model = build()
    cache = model(tokens, use_cache=True, routing="topk").past_key_values
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        model(tokens[:, :1], past_key_values=cache, routing="topk")


def test_a_sequence_beyond_the_trained_length_is_refused(build: Callable) -> None:
    with pytest.raises(ValueError, match="trained for 160 positions"):
        build()(torch.zeros(1, 161, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "relu"}, "thinking.gate"),
        ({"capacity": [0.5, 0.0, 0.5]}, "thinking.capacity"),
        ({"alpha": [1.0]}, "thinking.alpha"),
        ({"layers": [3]}, "thinking.layers"),
        ({"skip": "literal", "reweight": "symmetric"}, "exclude each other"),
        ({"colour": "red"}, "unknown keys"),
        ({"num_key_value_heads": 3}, "must divide"),
    ],
    ids=str,
)
def test_a_bad_configuration_says_what_is_wrong(change: dict, message: str, build: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_a_switch_changed_after_the_configuration_was_made_is_checked_again(build: Callable) -> None:
    for switch in ("gate", "residual", "routing", "reweight", "attend", "update", "reuse", "skip", "kind"):
        config = build().config
        config.thinking[switch] = "relu"
        with pytest.raises(ValueError, match=f"thinking.{switch} is 'relu'; use one of"):
            ITTForCausalLM(config)
    model = build()
    model.config.thinking["gate"] = "relu"
    with pytest.raises(ValueError, match=r"thinking\.gate is 'relu'"):
        model(torch.zeros(1, 4, dtype=torch.long))


LOADER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_itt"):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
tokens = torch.load(folder + "/tokens.pt")
with torch.no_grad():
    output = model(tokens, output_routing=True)
again = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
thinking = model.model.layers[0].thinking
model.save_pretrained(folder + "/again")
reloaded = AutoModelForCausalLM.from_pretrained(folder + "/again", dtype=dtype, trust_remote_code=True)
weights = reloaded.state_dict()
same = all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
torch.save({"logits": output.logits, "generated": again, "quantiles": thinking.logit_quantiles, "same": same,
            "module": type(model).__module__}, folder + "/result.pt")
"""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_saved_folder_loads_in_a_process_without_megatron(
    dtype: str, build: Callable, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = build(dtype=getattr(torch, dtype))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    for name in REMOTE_CODE_FILES:
        (folder / name).write_text((Path(modeling_itt.__file__).parent / name).read_text())
    torch.save(tokens, folder / "tokens.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER, str(folder), dtype]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(folder / "result.pt")
    with torch.no_grad():
        logits = model(tokens).logits
    # Another process has its weights at other addresses, which may choose another order of sums.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert (result["logits"] - logits).abs().max() <= tolerance * logits.abs().max()
    assert torch.equal(result["quantiles"], model.model.layers[0].thinking.logit_quantiles)
    assert result["quantiles"].dtype == torch.float32
    assert result["generated"].shape == (3, 11)
    assert result["same"]
    assert result["module"].startswith("transformers_modules")

"""Arguments of a call: defaults as in transformers' LLaMA, and errors for what the model cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from megatron_itt.hf.folder import AUTO_MAP, REMOTE_CODE_FILES
from megatron_itt.hf.remote_code import modeling_itt
from megatron_itt.hf.remote_code.cache_itt import ITTCache
from megatron_itt.hf.remote_code.modeling_itt import ITTModel

PATTERNS: list[dict[str, Any]] = [{}, {"attend": "selected"}, {"skip": "literal"}, {"kind": "loop"}, {"kind": "none"}]
# Float64: the cached pass sums in another order than the full one; a wrong entry would show at 1e-3 and above.
ATOL = 1e-9
TOKENS = torch.randint(0, 61, (2, 18), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 18, [7, 1, 1, 9]], ids=["one by one", "in pieces"])
def test_a_plain_decoding_loop_continues_what_it_returned(
    sizes: list[int], pattern: dict[str, Any], build: Callable
) -> None:
    model = build(**pattern)
    past, parts = None, []
    with torch.no_grad():
        for piece in TOKENS.split(sizes, dim=1):
            output = model(piece, past_key_values=past)
            past = output.past_key_values
            parts.append(output.logits)
        full = model(TOKENS, use_cache=False).logits
    assert float((torch.cat(parts, 1) - full).abs().max()) <= ATOL


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_a_cache_is_returned_when_llama_returns_one(
    use_cache: bool | None, in_config: bool, training: bool, build: Callable, llama_like: Callable
) -> None:
    returned = []
    for model in (build(kind="none"), llama_like(build(kind="none"))):
        model.train(training).config.use_cache = in_config
        returned.append(model(TOKENS, use_cache=use_cache).past_key_values is not None)
    assert returned[0] == returned[1]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_a_cache_that_is_given_is_read_and_extended(use_cache: bool | None, name: str, build: Callable) -> None:
    model = build()
    with torch.no_grad():
        past = model(TOKENS[:, :10])[modeling_itt.CACHE_NAME]
        rest = model(TOKENS[:, 10:], use_cache=use_cache, **{name: past}).logits
        full = model(TOKENS).logits[:, 10:]
    assert float((rest - full).abs().max()) <= ATOL
    assert past.get_seq_length() == 18


def test_logits_do_not_depend_on_whether_a_cache_is_made(build: Callable) -> None:
    model = build(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, model(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("argument", [None, True, False])
def test_tuples_and_hidden_states_follow_call_and_config(
    argument: bool | None, in_config: bool, build: Callable
) -> None:
    model = build()
    model.config.return_dict = model.config.output_hidden_states = in_config
    expected = in_config if argument is None else argument
    keys = {} if argument is None else {"return_dict": argument}
    for module in (model, model.model):
        assert isinstance(module(TOKENS, **keys), tuple) is not expected
        output = module(TOKENS, output_hidden_states=argument, return_dict=True)
        assert (output.hidden_states is not None) is expected


def test_a_tuple_holds_what_llama_has_in_it(build: Callable, llama_like: Callable) -> None:
    model = build(kind="none", dtype=torch.float32)
    keys: dict[str, Any] = {"labels": TOKENS, "return_dict": False, "output_hidden_states": True}
    found, expected = model(TOKENS, **keys), llama_like(model)(TOKENS, **keys)
    assert len(found) == len(expected)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert all(torch.equal(*pair) for pair in zip(found[3], expected[3], strict=True))


def test_loss_arguments_reach_the_loss(build: Callable, llama_like: Callable) -> None:
    model = build(kind="none")
    keys: dict[str, Any] = {"labels": TOKENS, "num_items_in_batch": torch.tensor(7), "ignore_index": 3}
    assert torch.equal(model(TOKENS, **keys).loss, llama_like(model)(TOKENS, **keys).loss)


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"thinking_budgets": [0.5, 0.5, 0.5]}, "takes no thinking_budgets"),
    ({"output_attentions": True}, "output_attentions"),
    ({"output_hidden_states": [1]}, "output_hidden_states"),
    ({"is_causal": False}, "takes no is_causal"),
    ({"cu_seq_lens_q": torch.tensor([0, 3, 18])}, "takes no cu_seq_lens_q"),
    ({"token_type_ids": torch.zeros_like(TOKENS)}, "takes no token_type_ids"),
    ({"cache_position": torch.arange(1, 19)}, "cache_position must be"),
    ({"past_key_values": ITTCache(4), "cache": ITTCache(4)}, "two names of one argument"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_CALLS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("kind", ["itt", "none"])
def test_unsupported_arguments_are_refused_by_name(kind: str, keys: dict, message: str, build: Callable) -> None:
    model = build(kind=kind)
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(TOKENS, **keys)


def test_arguments_that_ask_for_nothing_are_taken(build: Callable) -> None:
    model = build()
    keys = {"output_attentions": False, "cu_seq_lens_q": None, "cache_position": torch.arange(18)}
    assert torch.equal(model(TOKENS, **keys).logits, model(TOKENS).logits)


def test_generate_refuses_what_it_does_not_know(build: Callable) -> None:
    for keys in ({"thinking_budgets": [0.5, 0.5, 0.5]}, {"output_attentions": True, "return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=r"thinking_budgets|output_attentions"):
            build().generate(TOKENS, max_new_tokens=3, **keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[0] * 4 + [1] * 15] * 2)}, "calls other tokens padding"),
        ({"input_ids": TOKENS[:1, :1]}, "holds 2 rows"),
    ],
    ids=["another mask", "other rows"],
)
def test_a_cache_is_not_continued_by_another_batch(change: dict, message: str, build: Callable) -> None:
    model = build()
    past = model(TOKENS).past_key_values
    keys = {"input_ids": TOKENS[:, :1], **change}
    with pytest.raises(ValueError, match=message):
        model(**keys, past_key_values=past)


def test_gradient_checkpointing_returns_no_cache_and_continues_none(build: Callable) -> None:
    model = build()
    past = model(TOKENS).past_key_values
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert model(TOKENS).past_key_values is None
    assert model(TOKENS, past_key_values=ITTCache(3)).past_key_values is None
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(TOKENS, past_key_values=past, routing="threshold")


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_that_cannot_fit_is_refused_before_it_starts(use_cache: bool, build: Callable) -> None:
    model = build(dtype=torch.float32)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randint(1, 61, (2, 100))  # token 0 pads
    mask = torch.ones_like(tokens)
    mask[:, :30] = 0
    keys: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    for inputs, fitting in (({}, 61), ({"attention_mask": mask}, 91)):
        with pytest.raises(ValueError, match=r"trained for 160; lower max_new_tokens .* by 1,"):
            model.generate(tokens, max_new_tokens=fitting + 1, **inputs, **keys)
        assert not calls
        assert model.generate(tokens, max_new_tokens=fitting, **inputs, **keys).shape == (2, 100 + fitting)
        calls.clear()
    embedded = model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match="by 1,"):
        model.generate(inputs_embeds=embedded, max_new_tokens=62, **keys)
    assert not calls


def test_auto_model_loads_the_model_without_its_head(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = build(dtype=torch.float32)
    model.config.auto_map = AUTO_MAP
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for name in REMOTE_CODE_FILES:
        (folder / name).write_text((Path(modeling_itt.__file__).parent / name).read_text())
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        expected = model.model(TOKENS, thinking_budget=[0.3, 0.9, 0.0]).last_hidden_state
        assert torch.equal(base(TOKENS, thinking_budget=[0.3, 0.9, 0.0]).last_hidden_state, expected)
    assert type(base).__name__ == ITTModel.__name__
    whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(whole(TOKENS).logits, model(TOKENS).logits)


OTHER_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 2, "layers": [0]}, "num_hidden_layers is 2"),
    ({"num_hidden_layers": 4}, "num_hidden_layers is 4"),
    ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_key_value_heads is 4"),
    ({"layers": [1]}, "thinking is"),
    ({"capacity": [0.5] * 4, "alpha": 1.0}, "thinking is"),
    ({"attend": "selected"}, "thinking is"),
    ({"dtype": torch.float32}, "dtype is torch.float32"),
]


@pytest.mark.parametrize(("keys", "message"), OTHER_MODELS, ids=lambda value: str(value)[:30])
def test_the_cache_of_another_model_is_refused(keys: dict, message: str, build: Callable) -> None:
    model, past = build(), build(**keys)(TOKENS[:, :5]).past_key_values
    with pytest.raises(ValueError, match=message):
        model(TOKENS[:, 5:], past_key_values=past)
    past.reset()
    with pytest.raises(ValueError, match="layers") if "num_hidden_layers" in keys else nullcontext():
        model(TOKENS, past_key_values=past)  # an empty cache belongs to no model


def test_cache_implementations_of_transformers_are_refused_before_generation(build: Callable) -> None:
    model = build()
    for name in ("sliding_window", "quantized", "paged"):
        with pytest.raises(ValueError, match=f"cache_implementation is '{name}'"):
            model.generate(TOKENS, max_new_tokens=3, cache_implementation=name)
        with pytest.raises(ValueError, match=f"cache_implementation is '{name}'"):
            model.generate(TOKENS, generation_config=GenerationConfig(cache_implementation=name))
    if hasattr(model, "generate_batch"):  # transformers 5
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    pairs = ((torch.zeros(2, 2, 3, 8),) * 2,) * 3
    for past in (DynamicCache(), pairs):
        with pytest.raises(ValueError, match="needs its own ITTCache"):
            model.generate(TOKENS, max_new_tokens=3, past_key_values=past)


BAD_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"position_ids": torch.arange(17)[None]}, "position_ids has shape"),
    ({"position_ids": torch.arange(18.0)[None]}, "position_ids has shape"),
    ({"attention_mask": [[1] * 18] * 2}, "attention_mask is a list"),
    ({"attention_mask": torch.ones(2, 1, 18, 18)}, "attention_mask has shape"),
    ({"input_ids": TOKENS[0]}, "the input has shape"),
    ({"input_ids": TOKENS[:0]}, "the input has shape"),
    ({"thinking_budget": "0.5,0.5,0.5"}, "thinking_budget is '0.5"),
    ({"thinking_budget": 0.5}, "thinking_budget is 0.5"),
    ({"thinking_budget": [[0.5] * 3, [0.5] * 2]}, "thinking_budget is"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_INPUTS, ids=lambda value: str(value)[:30])
def test_inputs_of_a_wrong_shape_are_refused_by_name(keys: dict, message: str, build: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        build()(**{"input_ids": TOKENS, **keys})


def test_an_early_exit_of_the_model_assists_it_and_changes_no_token(build: Callable) -> None:
    model = build()
    expected = model.generate(TOKENS[:1], max_new_tokens=9)
    assert torch.equal(model.generate(TOKENS[:1], max_new_tokens=9, assistant_early_exit=2), expected)


@pytest.mark.parametrize(
    "key", ["residual", "routing", "gate", "reweight", "attend", "update", "reuse", "skip", "kind"]
)
def test_a_switch_that_is_changed_under_a_model_is_checked_at_its_next_call(key: str, build: Callable) -> None:
    model = build()
    model.config.thinking[key] = "unknown"
    with pytest.raises(ValueError, match=rf"thinking\.{key} is 'unknown'"):
        model(TOKENS)

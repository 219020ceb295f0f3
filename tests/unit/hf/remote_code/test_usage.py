"""The model in transformers' own tools: Trainer, streamers, assisted decoding, attention backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    TextIteratorStreamer,
    TextStreamer,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_itt.hf.remote_code.modeling_itt import ITTForCausalLM

TEXT = "the quick brown fox jumps over the lazy dog; "


class Sentences(torch.utils.data.Dataset):
    """The same few sentences over and over: a model that learns soon knows them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = torch.tensor(tokenizer(TEXT * 4)["input_ids"])

    def __len__(self) -> int:
        return 32

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        piece = self.tokens[idx % 8 : idx % 8 + 48]
        return {"input_ids": piece, "labels": piece}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_fine_tunes_an_export_and_saves_one_that_decodes(
    checkpointing: bool, build: Callable, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = build(dtype=torch.float32, vocab_size=257)
    model.init_weights()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(tokenizer), processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = ITTForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    tokens = torch.tensor([tokenizer("the quick")["input_ids"]])
    keys = {"max_new_tokens": 6, "do_sample": False, "thinking_budget": [1.0, 0.0, 1.0]}
    assert torch.equal(tuned.generate(tokens, **keys), model.eval().generate(tokens, **keys))


def test_streamers_receive_the_text_piece_by_piece(
    build: Callable, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(dtype=torch.float32, vocab_size=257)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    inputs = tokenizer("abc", return_tensors="pt", return_token_type_ids=False)
    keys = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "thinking_budget": [0.5, 0.5, 1.0]}
    expected = tokenizer.decode(model.generate(**inputs, **keys)[0, inputs["input_ids"].shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    worker = Thread(target=model.generate, kwargs={**inputs, **keys, "streamer": streamer})
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert "".join(pieces) == expected
    model.generate(**inputs, **keys, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_an_assistant_with_a_smaller_budget_changes_no_token(build: Callable) -> None:
    model, assistant = build(), build()
    assistant.config.thinking_budget = [0.0, 0.0, 0.0]
    prompt = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(1))
    keys = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **keys), model.generate(prompt, **keys))


def test_integers_are_budgets_too_one_row_per_sequence(build: Callable) -> None:
    model = build()
    tokens = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(2))
    keys = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    together = model.generate(tokens, thinking_budget=[[1, 0, 1], [0, 1, 1]], **keys)
    keys["attention_mask"] = keys["attention_mask"][:1]
    for row, budget in enumerate(([1, 0, 1], [0, 1, 1])):
        assert torch.equal(model.generate(tokens[row : row + 1], thinking_budget=budget, **keys)[0], together[row])


@pytest.mark.parametrize("sampling", [{"num_beams": 1}, {"num_beams": 2}], ids=str)
def test_sampling_with_the_cache_draws_what_it_draws_without(sampling: dict[str, Any], build: Callable) -> None:
    model = build()
    tokens = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    keys = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": True, "top_k": 20, "pad_token_id": 0, **sampling}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(model.generate(tokens, use_cache=use_cache, thinking_budget=[0.4, 0.6, 0.8], **keys))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("groups", [2, 4])
def test_passes_over_all_tokens_use_the_chosen_attention_backend(groups: int, build: Callable) -> None:
    """The way that flash_attention_2 takes, with a backend that any machine has."""
    calls = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **keys: Any) -> Any:
        calls.append((query.shape[2], keys["is_causal"]))
        return sdpa_attention_forward(module, query, key, value, mask, **keys)

    AttentionInterface.register("counted", attend)
    model = build(num_key_value_heads=groups)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation("counted")
        assert torch.allclose(model(tokens).logits, expected, rtol=0, atol=1e-10)
    assert calls == [(20, True)] * 3


def test_flash_attention_without_its_package_is_refused_by_name(build: Callable) -> None:
    pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the package may be there")
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        build().set_attn_implementation("flash_attention_2")

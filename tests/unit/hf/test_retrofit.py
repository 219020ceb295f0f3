"""A pretrained model after import and export: what its folder held is still there, and its users' tools work on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, pipeline

from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.hf.import_weights import ImportOptions, import_model
from tests.unit.evaluation.exports import MAX_LENGTH, VOCAB_SIZE, make_llama_export

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7], "bos_token_id": 3}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
PROMPT = "def main(argument):"
CPU = ["precision.dtype=fp32", "runtime.device=cpu"]
THINK = ImportOptions(think="1", steps=3, capacity=(0.5,))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 LLaMA with a chat template, a generation config and several end tokens."""
    folder = make_llama_export(tmp_path_factory.mktemp("models") / "source")
    LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    GenerationConfig(**GENERATION).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 7], "bos_token_id": 3}))
    return folder


@pytest.fixture(scope="module")
def retrofitted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with thinking steps, prepared for shorter sequences, and exported."""
    root = tmp_path_factory.mktemp("retrofit")
    report = import_model(source, root / "run", overrides=[*CPU, "model.seq_length=32"], options=THINK)
    exported = export_checkpoint(report.checkpoint, root / "hf", ExportOptions())
    assert exported.dtype == "bfloat16"
    return root / "hf"


def _open(folder: Path, **keys: Any) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keys)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_what_the_folder_held_is_kept(source: Path, retrofitted: Path) -> None:
    (before, old), (after, new) = _open(source, dtype="auto"), _open(retrofitted, dtype="auto")
    assert after.dtype == before.dtype == torch.bfloat16
    assert after.config.max_position_embeddings == MAX_LENGTH
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after.config, key) == getattr(before.config, key), key
        assert getattr(after.generation_config, key) == getattr(before.generation_config, key), key
    assert {key: getattr(after.generation_config, key) for key in GENERATION} == GENERATION
    messages = [{"role": "user", "content": PROMPT}]
    assert new.apply_chat_template(messages, tokenize=False) == old.apply_chat_template(messages, tokenize=False)
    assert (new(PROMPT)["input_ids"], new.padding_side) == (old(PROMPT)["input_ids"], "left")
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_another_end_of_documents_in_the_data_ends_generation(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, eos_token="!")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = [*CPU, f"data.tokenizer={tmp_path / 'tokenizer'}"]
    report = import_model(source, tmp_path / "run", overrides=overrides, options=THINK)
    export_checkpoint(report.checkpoint, tmp_path / "hf", ExportOptions(check=False, dtype="float32"))
    model, _ = _open(tmp_path / "hf")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id not in (0, 7)
    assert (model.dtype, model.generation_config.temperature) == (torch.float32, 0.6)


def test_a_generation_config_that_cannot_be_read_is_refused(source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(Exception, match=r"generation_config\.json cannot be read .*correct it, or remove it"):
        import_model(tmp_path, tmp_path / "run", overrides=CPU, options=THINK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_and_pipeline_give_the_text_of_the_source(sampled: bool, source: Path, retrofitted: Path) -> None:
    """Sampled by each folder's own generation config, beyond the sequences of its training."""
    keys: dict[str, Any] = {"max_new_tokens": 40, **({} if sampled else {"do_sample": False})}
    texts, tokens = [], []
    for folder in (source, retrofitted):
        model, tokenizer = _open(folder, dtype=torch.float32)
        inputs = tokenizer([PROMPT, "x"], return_tensors="pt", padding=True, return_token_type_ids=False)
        torch.manual_seed(0)
        tokens.append(model.generate(**inputs, **keys))
        torch.manual_seed(0)
        texts.append(pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, **keys)[0]["generated_text"])
    assert torch.equal(*tokens)
    assert texts[0] == texts[1]


def test_lora_trains_an_adapter_that_is_saved_and_merged(retrofitted: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    model, _ = _open(retrofitted, dtype=torch.float32)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, settings)
    tokens = torch.randint(0, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_open(retrofitted, dtype=torch.float32)[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        assert torch.equal(again(input_ids=tokens).logits, expected)
        merged = again.merge_and_unload()(input_ids=tokens).logits
    assert float((merged - expected).abs().max() / expected.abs().max()) < 1e-5


def test_lm_eval_scores_it_like_the_source(source: Path, retrofitted: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [(PROMPT, " return"), ("for name in", " names:\n"), ("x" * 200, "y")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(asked)]
    found = []
    for folder in (source, retrofitted):
        model = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=2)
        assert model.max_length == MAX_LENGTH
        found.append([score for answer in model.loglikelihood(requests, disable_tqdm=True) for score in answer])
    assert found[0] == pytest.approx(found[1], rel=1e-5)

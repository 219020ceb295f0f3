"""The commands of docs/retrofit.md, in their order, on a tiny pretrained model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_itt.cli import main
from tests.unit.evaluation.exports import MAX_LENGTH, VOCAB_SIZE, make_llama_export, standard_library_texts, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"
SMALLER = {"batch": "{global: 2, micro: 1}", "schedule": "{steps: 4, warmup_steps: 1}", "precision": "{dtype: fp32}"}
SMALLER |= {"validation": "{tokens: 512, interval_steps: 4}", "runtime": "{device: cpu}"}
STAND_INS = {"--tasks paper": "--task-dir tasks --heldout text=text/part.jsonl --heldout-records 6 --device cpu"}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the text, the model in place of the download, and a recipe of the same name for its shape."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "part.jsonl", standard_library_texts())
    make_llama_export(tmp_path / "models" / "SmolLM2-135M", num_hidden_layers=11, tie_word_embeddings=True)
    recipe = tmp_path / "recipes" / "retrofit" / "smollm2_135m.yaml"
    recipe.parent.mkdir(parents=True)
    shipped = (PAGE.parents[1] / "recipes" / "retrofit" / recipe.name).read_text(encoding="utf-8")
    shape = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 11, "num_attention_heads": 4}
    shape |= {"num_query_groups": 2, "vocab_size": VOCAB_SIZE, "norm_eps": 1e-6, "seq_length": MAX_LENGTH}
    text = re.sub(r"model:\n(  .*\n)+", f"model: {json.dumps(shape | {'tie_embeddings': True})}\n", shipped)
    text = text.replace("layers: [9, 12, 15, 18, 21]", "layers: [9], ramp_steps: 2")
    text = text.replace("base: ..", f"base: {PAGE.parents[1]}/recipes")
    text = re.sub(r".*decoder.layers.(1|2).*\n", "", text).replace("    # - {match", "    - {match")
    recipe.write_text(text + "".join(f"{section}: {keys}\n" for section, keys in SMALLER.items()), encoding="utf-8")
    return tmp_path


def test_the_page_goes_from_a_model_to_an_evaluated_thinking_model(workplace: Path) -> None:
    [block] = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    download, *commands = block.splitlines()
    assert download.startswith("hf download ")
    for command in commands:
        for shown, stand_in in STAND_INS.items():
            command = command.replace(shown, stand_in)
        program, *words = shlex.split(command)
        assert (program, main(words)) == ("itt", 0), command
    results = json.loads((workplace / "runs/retrofit/evaluation/results.json").read_text(encoding="utf-8"))
    assert [run["thinking_budget"] for run in results["runs"]] == [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    check_frozen(workplace)


def check_frozen(workplace: Path) -> None:
    """The layers of the frozen group are the source's to the bit after training; others have moved."""
    from megatron_itt.hf.load import read_weights

    before = read_weights(workplace / "models" / "SmolLM2-135M")
    after = read_weights(workplace / "models" / "SmolLM2-135M-thinking")
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    frozen = {name for name in before if re.search(r"layers\.[0-8]\.", name)}
    assert frozen and not frozen & moved
    assert {"model.layers.9.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight"} <= moved

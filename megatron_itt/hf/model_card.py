"""Model card (README.md) of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_itt import __version__

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

{description}

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40{budget})
print(tokenizer.decode(output[0]))
```
{budgets}
Exported by megatron_itt {version}.
"""
BUDGETS = """
`thinking_budget` is the fraction of tokens that each routed step processes, from 0 (skip the step) to 1 (all). Pass it
to `forward` and `generate`, as one list or one per row of the batch, or set `model.config.thinking_budget`.
A token is selected if its router logit exceeds a threshold, a quantile of the training logits (`logit_quantiles`). The
rule looks at one token only, so decoding with the KV cache gives the logits of the full forward pass, up to rounding.
In bf16 a logit near its threshold may fall on the other side; use float32 where that matters.
`routing="topk"` selects as in training, over the whole sequence; it depends on later tokens and has no cache.
`output_routing=True` returns the selected tokens of each thinking layer, [batch, routed step, token];
`output_router_logits=True` returns their router logits.
"""


def render_card(settings: Mapping[str, Any], num_parameters: int, facts: Mapping[str, str]) -> str:
    """Return the card as Markdown with the front matter that the hub reads.

    settings: of config.json; facts: rows of the table about the training and the export.
    """
    thinking = settings.get("thinking")
    title, description = _describe(thinking)
    rows = {
        "parameters": f"{num_parameters:,}",
        "shape": f"{settings['num_hidden_layers']} layers, hidden {settings['hidden_size']}, "
        f"feed-forward {settings['intermediate_size']}, {settings['num_attention_heads']} heads, "
        f"{settings['num_key_value_heads']} key/value heads, vocabulary {settings['vocab_size']}",
        "context": f"{settings['max_position_embeddings']} tokens",
        **facts,
    }
    routed = False
    if thinking is not None:
        routed = thinking["kind"] == "itt" and thinking["routing"] != "none"
        rows["thinking layers"] = ", ".join(str(layer_idx) for layer_idx in thinking["layers"])
        rows["training capacity per routed step"] = ", ".join(f"{capacity:g}" for capacity in thinking["capacity"])
    return CARD.format(
        title=title,
        description=description,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        trust="" if thinking is None else ", trust_remote_code=True",
        budget=f", thinking_budget={thinking['capacity']}" if routed and thinking else "",
        budgets=BUDGETS if routed else "",
        version=__version__,
    )


def _describe(thinking: dict[str, Any] | None) -> tuple[str, str]:
    if thinking is None:
        return "LLaMA baseline", "A LLaMA-shaped language model, baseline of an Inner Thinking Transformer."
    steps = len(thinking["capacity"]) + 1
    if thinking["kind"] == "loop":
        return f"Looped transformer x{steps}", f"A LLaMA-shaped language model that applies some layers {steps} times."
    return f"Inner Thinking Transformer x{steps}", (
        f"A LLaMA-shaped language model whose thinking layers process selected tokens up to {steps} times "
        "(Chen et al., Inner Thinking Transformer, arXiv 2502.13842)."
    )

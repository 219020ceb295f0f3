"""The README.md of an exported folder: what the model is, how it was trained, how to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_itt import __version__

USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40{budget})
print(tokenizer.decode(output[0]))
```
"""
BUDGETS = """
`thinking_budget` is the share of tokens that think again at each routed step, from 0 (skip the step) to 1 (all).
It can be given to `forward` and `generate`, as one list or one per row of the batch, or set as
`model.config.thinking_budget`. A token thinks when its router logit exceeds a threshold read from a table of quantiles
(`logit_quantiles`): the rule looks at one token only, so decoding with the cache gives the logits of the full pass, up
to rounding. In bf16 a logit near its threshold may fall on the other side; use float32 where that matters.
`routing="topk"` picks as in training, over the whole sequence; it looks at later tokens and cannot be cached.
`output_routing=True` returns who thought, for each thinking layer [batch, routed step, token].
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card states beyond config.json."""

    recipe: str
    step: int
    consumed_tokens: int
    data_fingerprint: str | None
    num_parameters: int
    dtype: str
    parity: str


def render_card(settings: dict[str, Any], facts: CardFacts) -> str:
    """The card as Markdown with the front matter that the hub reads."""
    thinking = settings.get("thinking")
    title, description = _describe(thinking)
    rows = {
        "parameters": f"{facts.num_parameters:,}",
        "shape": f"{settings['num_hidden_layers']} layers, hidden {settings['hidden_size']}, "
        f"feed-forward {settings['intermediate_size']}, {settings['num_attention_heads']} heads, "
        f"{settings['num_key_value_heads']} key/value heads, vocabulary {settings['vocab_size']}",
        "context": f"{settings['max_position_embeddings']} tokens",
        "recipe": f"`{facts.recipe}`",
        "training": f"{facts.step:,} steps, {facts.consumed_tokens:,} tokens",
        "data fingerprint": f"`{facts.data_fingerprint}`" if facts.data_fingerprint else "not recorded",
        "weights": f"{facts.dtype}, safetensors",
        "parity with the training model": facts.parity,
    }
    if thinking is not None:
        rows["thinking layers"] = ", ".join(str(layer_idx) for layer_idx in thinking["layers"])
        rows["trained shares per routed step"] = ", ".join(f"{share:g}" for share in thinking["capacity"])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    routed = thinking is not None and thinking["kind"] == "itt" and thinking["routing"] != "none"
    budget = f", thinking_budget={thinking['capacity']}" if routed and thinking else ""
    use = USE.format(trust=", trust_remote_code=True" if thinking is not None else "", budget=budget)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {title}\n\n{description}\n\n| | |\n|---|---|\n{table}\n\n{use}{BUDGETS if routed else ''}\n"
        f"Exported by megatron_itt {__version__}.\n"
    )


def _describe(thinking: dict[str, Any] | None) -> tuple[str, str]:
    if thinking is None:
        return "LLaMA baseline", "A LLaMA-shaped language model, baseline of an Inner Thinking Transformer."
    steps = len(thinking["capacity"]) + 1
    if thinking["kind"] == "loop":
        return f"Looped transformer x{steps}", f"Its thinking layers pass every token {steps} times."
    description = (
        f"A LLaMA-shaped language model whose thinking layers pass chosen tokens up to {steps} times "
        "(Chen et al., Inner Thinking Transformer, arXiv 2502.13842)."
    )
    return f"Inner Thinking Transformer x{steps}", description

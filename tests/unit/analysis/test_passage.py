"""Who thinks in a passage, checked against the model's own rule."""

from __future__ import annotations

import pytest
import torch

from megatron_itt.analysis.passage import continue_text, first_words, trace_passage
from megatron_itt.errors import DataError
from megatron_itt.evaluation.exported_model import ExportedModel
from tests.unit.evaluation.exports import MAX_LENGTH, THINKING_LAYERS, TRAINED_BUDGET

TEXT = 'def f(x):\n    """Caf\u00e9 \u65e5\u672c."""\n    return [x, 1]\n'


def test_a_token_thinks_where_its_score_exceeds_the_threshold(itt: ExportedModel) -> None:
    passage = trace_passage(itt, TEXT, [TRAINED_BUDGET, (0.1, 1.0), (1.0, 0.0)])
    assert [trace.budget for trace in passage.traces] == [TRAINED_BUDGET, (0.1, 1.0), (1.0, 0.0)]
    for trace in passage.traces:
        assert trace.layers == list(THINKING_LAYERS)
        for layer, scores, thresholds in zip(trace.selected, trace.weights, trace.thresholds, strict=True):
            for picked, score, threshold in zip(layer, scores, thresholds, strict=True):
                assert picked == [value > threshold for value in score]
    assert any(any(step) and not all(step) for layer in passage.traces[0].selected for step in layer)


def test_shares_and_steps_count_the_picks(itt: ExportedModel) -> None:
    (trace,) = trace_passage(itt, TEXT, [(1.0, 0.0)]).traces
    num_tokens = len(trace.selected[0][0])
    assert trace.capacity() == [[1.0, 0.0]] * len(THINKING_LAYERS)
    assert trace.steps_per_token() == [len(THINKING_LAYERS)] * num_tokens
    assert trace.steps_per_token(0) == [1] * num_tokens


def test_the_pieces_of_the_tokens_join_to_the_text(itt: ExportedModel) -> None:
    passage = trace_passage(itt, TEXT, [TRAINED_BUDGET])
    assert "".join(passage.tokens) == TEXT
    assert len(passage.tokens) == len(itt.tokenizer.encode(TEXT)) == len(passage.traces[0].weights[0][0])
    assert passage.num_tokens_left_out == 0


def test_a_text_beyond_the_context_is_read_in_windows_and_it_is_said(itt: ExportedModel) -> None:
    text = TEXT * 40
    ids = itt.tokenizer.encode(text)
    passage = trace_passage(itt, text, [TRAINED_BUDGET], max_tokens=300)
    assert len(passage.tokens) == 300 > MAX_LENGTH
    assert passage.num_tokens_left_out == len(ids) - 300
    assert passage.num_windows > 1
    windows, rest = passage.notes()
    assert f"{passage.num_windows} windows of at most {MAX_LENGTH} tokens" in windows
    assert f"{len(ids) - 300:,} more tokens that are not shown" in rest
    assert all(len(step) == 300 for layer in passage.traces[0].weights for step in layer)
    # The first window is what a text that fits gives.
    short = trace_passage(itt, text, [TRAINED_BUDGET], max_tokens=MAX_LENGTH - 1)
    assert short.num_windows == 1
    assert passage.traces[0].selected[0][0][: MAX_LENGTH - 1] == short.traces[0].selected[0][0]
    # Tokens of the last window are routed as the model routes them when it sees that window alone.
    with torch.inference_mode():
        window = torch.tensor([ids[300 - MAX_LENGTH : 300]])
        routing = itt.model(window, thinking_budget=list(TRAINED_BUDGET), output_routing=True).routing
    assert passage.traces[0].selected[1][0][-10:] == routing[1][0, 0, -10:].tolist()


def test_tracing_leaves_the_model_as_it_was(itt: ExportedModel) -> None:
    tokens = torch.arange(1, 30)[None]
    with torch.inference_mode():
        before = itt.model(tokens).logits
        trace_passage(itt, TEXT, [(1.0, 1.0)])
        assert torch.equal(itt.model(tokens).logits, before)


def test_empty_text_is_refused(itt: ExportedModel) -> None:
    with pytest.raises(DataError, match="empty"):
        trace_passage(itt, " \n", [TRAINED_BUDGET])


def test_the_continuation_is_greedy_and_follows_the_budget(itt: ExportedModel) -> None:
    sample = continue_text(itt, "import os", (1.0, 1.0), num_tokens=5)
    ids = [itt.prefix_token_id, *itt.tokenizer.encode("import os")]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(5):
            logits = itt.model(torch.tensor([ids]), thinking_budget=[1.0, 1.0], use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == itt.tokenizer.eos_token_id:
                break
    assert sample.text == itt.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_prompt_that_fills_the_context_is_refused(itt: ExportedModel) -> None:
    with pytest.raises(DataError, match="give a shorter one"):
        continue_text(itt, TEXT * 40, None)


def test_a_prompt_is_cut_between_words() -> None:
    assert first_words("  one two three  ", 9) == "one two"
    assert first_words("one two") == "one two"
    assert first_words("x" * 50, 10) == "x" * 10

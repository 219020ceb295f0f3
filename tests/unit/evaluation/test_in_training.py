"""Evaluation tasks scored by the training model: lm-eval's own numbers on the export of its checkpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.checkpoint.save import save_checkpoint
from megatron_itt.checkpoint.state import new_run_state, sharded_model_state
from megatron_itt.config import RunConfig
from megatron_itt.data.text.tokenizer import load_tokenizer
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import load_export, thinking_at
from megatron_itt.evaluation.harness import TaskPlan, data_access
from megatron_itt.evaluation.heldout import HELDOUT_TASKS, HeldoutSettings, write_heldout_tasks
from megatron_itt.evaluation.in_training import TrainingTasks, bits_per_byte
from megatron_itt.hf.export import ExportOptions, export_checkpoint
from megatron_itt.training.guards import StepGuard
from megatron_itt.training.scoring import TaskEvaluation
from megatron_itt.training.signals import StopRequest
from megatron_itt.training.step import Watch
from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.random_weights import make_weights
from tests.unit.evaluation.exports import MAX_LENGTH, VOCAB_SIZE, make_tokenizer

BUDGETS = ((0.5, 0.25), (0.1, 0.9))
METRICS = {"heldout_last_word": {"acc", "perplexity"}, "heldout_continuation": {"acc", "acc_norm"}}
LIMIT = 10


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory, documents: dict[str, list[str]]) -> Path:
    """Last-word and multiple-choice tasks, some of whose texts are longer than the context."""
    folder = tmp_path_factory.mktemp("tasks") / "heldout"
    settings = HeldoutSettings(
        num_last_word=24, num_continuation=12, num_context_characters=250, num_continuation_characters=24
    )
    write_heldout_tasks(documents, folder, settings)
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def _recipe(tokenizer_dir: Path, tasks: dict[str, Any]) -> RunConfig:
    return tiny_recipe(
        model={"vocab_size": VOCAB_SIZE, "seq_length": MAX_LENGTH},
        thinking={"capacity": [0.5, 0.25]},
        data={"tokenizer": str(tokenizer_dir)},
        validation={"tasks": tasks},
    )


def _fill(trainer: Any, config: RunConfig) -> None:
    weights = make_weights(config.model, config.thinking, seed=3)
    state = {name: torch.as_tensor(value) for name, value in weights.items()}
    trainer.built.chunks[0].load_state_dict(state, strict=False)


def _lm_eval_on_export(folder: Path, task_dir: Path, budget: Sequence[float]) -> dict[str, Any]:
    """Metrics by task, of lm-eval's own model class; and bits per byte from the samples that it logs."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with data_access(HELDOUT_TASKS, [task_dir], None):
        plan = TaskPlan(HELDOUT_TASKS, task_dirs=[task_dir])
    export = load_export(folder, device="cpu")
    with thinking_at(export.model, budget) as model:
        wrapped = HFLM(pretrained=model, tokenizer=export.tokenizer, batch_size=4)
        found = lm_eval.simple_evaluate(wrapped, tasks=plan.loaded, limit=LIMIT, task_manager=plan.manager)
    assert found is not None
    return {
        task: {**{name: values[f"{name},none"] for name in METRICS[task]}, **bits_per_byte(found["samples"][task])}
        for task, values in found["results"].items()
    }


def test_tasks_score_as_lm_eval_scores_the_export(tokenizer_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    settings = {"names": list(HELDOUT_TASKS), "limit": LIMIT, "budgets": BUDGETS, "task_dir": str(task_dir)}
    config, tokenizer = _recipe(tokenizer_dir, settings), load_tokenizer(tokenizer_dir)
    evaluation = TaskEvaluation(config, tokenizer, TrainingTasks)
    watch = Watch(guard=StepGuard(config.runtime), stop=StopRequest())
    with opened(config) as trainer:
        _fill(trainer, config)
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        entries = evaluation.run(trainer, 4, watch=watch)
        assert (random.getstate(), str(np.random.get_state())) == before[:2]
        assert torch.equal(torch.get_rng_state(), before[2])
        state = new_run_state(config, step=4, tokenizer_sha256=tokenizer.sha256)
        save_checkpoint(sharded_model_state(trainer.built.chunks), state, tmp_path / "run" / "checkpoints", keep_last=1)
        watch.stop.received = 15
        assert evaluation.run(trainer, 4, watch=watch) is None
    watch.stop.restore()
    export_checkpoint(tmp_path / "run", tmp_path / "hf", ExportOptions(check=False))
    assert entries is not None
    assert [(entry["budget"], entry["task"]) for entry in entries] == [
        (list(budget), task) for budget in BUDGETS for task in HELDOUT_TASKS
    ]
    for budget in BUDGETS:
        expected = _lm_eval_on_export(tmp_path / "hf", task_dir, budget)
        for entry in entries:
            if entry["budget"] == list(budget):
                own = {name: value for name, value in entry.items() if name not in ("task", "budget", "num_samples")}
                assert entry["num_samples"] == LIMIT
                assert own == pytest.approx(expected[entry["task"]], rel=1e-5)  # float32, batches of other shapes
    assert len({entry["bits_per_byte"] for entry in entries}) == len(entries)


def test_bits_per_byte_are_those_of_the_right_continuations() -> None:
    def sample(target: Any, *scores: float) -> dict[str, Any]:
        arguments = [("context", text) for text in (" four", " \u00e9", " x")[: len(scores)]]
        return {"target": target, "arguments": arguments, "filtered_resps": [(score, False) for score in scores]}

    bit = -float(np.log(2))
    assert bits_per_byte([sample("four", 5 * bit)]) == pytest.approx({"bits_per_byte": 1.0})
    choices = [sample(1, 9 * bit, 6 * bit), sample("x", 0.0, 0.0, 4 * bit), sample([0], 5 * bit, 0.0)]
    assert bits_per_byte(choices) == pytest.approx({"bits_per_byte": 15 / 10})
    assert bits_per_byte([sample("none of them", bit, bit)]) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_dir": "nowhere"}, r"task folder .*nowhere does not exist"),
        ({"data_root": "nowhere"}, r"data root .*nowhere does not exist"),
        (
            {"names": ["hub"], "data_root": "."},
            r"validation\.tasks: task 'hub' .*no/such does not exist.* leave validation\.tasks\.data_root out",
        ),
        ({"names": ["lost"]}, r"task 'lost' reads .*lost\.jsonl, which does not exist"),
        ({"names": ["story"]}, r"story is of type generate_until; .*itt evaluate"),
    ],
    ids=["folder", "root", "data set", "data", "generation"],
)
def test_tasks_that_cannot_be_scored_are_refused_in_one_line(
    tokenizer_dir: Path, task_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for name, kind, file in (("lost", "loglikelihood", "lost"), ("story", "generate_until", "heldout_last_word")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\noutput_type: {kind}\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {task_dir / file}.jsonl}}}}\n"
            "doc_to_text: '{{context}}'\ndoc_to_target: '{{word}}'\n"
        )
    (tmp_path / "hub.yaml").write_text("task: hub\ndataset_path: no/such\noutput_type: loglikelihood\n")
    config = _recipe(tokenizer_dir, {"names": ["lost"], "task_dir": str(tmp_path), **change})
    with pytest.raises(EvaluationError, match=message) as caught:
        TrainingTasks(config, load_tokenizer(tokenizer_dir))
    assert "\n" not in str(caught.value)

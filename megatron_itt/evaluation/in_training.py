"""Evaluation tasks in the training loop: lm-eval builds the requests once, and computes metrics from their scores."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from megatron_itt.config.run import RunConfig
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.data.text.tokenizer_folder import load_with_transformers, write_tokenizer_folder
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.harness import TaskPlan, data_access, quiet_harness
from megatron_itt.evaluation.results import scores_of
from megatron_itt.training.scoring import Continuation, Score

_SCORED = ("loglikelihood", "multiple_choice")
_FEWSHOT_SEED = 1234  # lm-eval's default


class TrainingTasks:
    """The tasks of `validation.tasks` with their data; source of requests, and of metrics (`training.scoring.Tasks`).

    EvaluationError for a task that is unknown, lacks its data, or generates text.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        settings = config.validation.tasks
        assert settings is not None, "the recipe has no tasks"
        names, self._limit = list(dict.fromkeys(settings.names)), settings.limit
        folders = [] if settings.task_dir is None else [Path(settings.task_dir).resolve()]
        root = None if settings.data_root is None else Path(settings.data_root).resolve()
        try:
            with data_access(names, folders, root):
                setting = "validation.tasks.data_root"
                plan = TaskPlan(names, task_dirs=folders, data_root=root, data_root_setting=setting)
        except EvaluationError as error:
            raise EvaluationError(f"validation.tasks: {error}") from error
        self._tasks = plan.manager.load(plan.loaded)
        for name, task in self._tasks["tasks"].items():
            if task.OUTPUT_TYPE not in _SCORED:
                raise EvaluationError(
                    f"validation.tasks.names: {name} is of type {task.OUTPUT_TYPE}; training scores "
                    f"{' and '.join(_SCORED)} tasks, evaluate others on an export with itt evaluate"
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        self._model = _ScoredModel(tokenizer, config.model.seq_length)
        self._evaluate([])
        self.requests = self._model.requests
        for task in self._tasks["tasks"].values():
            task.build_all_requests = lambda **_: None  # it has them from now on

    def metrics(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        """Return {task, num_samples, metrics of lm-eval by name, bits_per_byte} per task or group of tasks."""
        for task in self._tasks["tasks"].values():
            for instance in task.instances:  # lm-eval appends answers
                instance.resps, instance.filtered_resps = [], {}
        outcome = self._evaluate(scores)
        entries: dict[str, dict[str, Any]] = {}
        for row in scores_of(outcome):
            name = row["task"]
            samples = [sample for leaf in _leaves(outcome, name) for sample in outcome["samples"][leaf]]
            entry = entries.setdefault(name, {"task": name, "num_samples": len(samples), **bits_per_byte(samples)})
            entry[row["metric"]] = row["value"]
        return list(entries.values())

    def _evaluate(self, scores: Sequence[Score]) -> dict[str, Any]:
        self._model.scores = scores
        with quiet_harness():
            outcome = lm_eval.evaluate(self._model, self._tasks, limit=self._limit, bootstrap_iters=0)
        assert outcome is not None, "lm-eval returns results on rank 0"
        return dict(outcome)


class _ScoredModel(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of the model in training: notes what it is asked, and answers with `scores`, if there are any."""

    tok_encode = HFLM.tok_encode  # as for the exported model
    prefix_token_id = HFLM.prefix_token_id
    add_bos_token = custom_prefix_token_id = None

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
            write_tokenizer_folder(tokenizer, Path(folder))
            self.tokenizer = load_with_transformers(Path(folder))
        self.max_length = max_length
        self.requests: list[Continuation] = []
        self.scores: Sequence[Score] = ()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        if self.scores:
            return [(score.log_likelihood, score.is_greedy) for score in self.scores]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        self.requests = [Continuation((context + text)[-longest:], len(text)) for _, context, text in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


def _leaves(outcome: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a group, however deep; of a task itself."""
    members = outcome.get("group_subtasks", {}).get(name)
    if not members:
        yield name
    for member in members or ():
        yield from _leaves(outcome, member)


def bits_per_byte(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return {bits_per_byte}: bits of the right continuations over their UTF-8 bytes; {} where lm-eval names none.

    `samples`: those that lm-eval logs.
    """
    nats, num_bytes = 0.0, 0
    for sample in samples:
        texts, target = [arguments[1] for arguments in sample["arguments"]], sample["target"]
        target = target[0] if isinstance(target, list) and target else target
        right = target if isinstance(target, int) else 0
        if not isinstance(target, int) and len(texts) > 1:
            right = next((idx for idx, text in enumerate(texts) if text.strip() == str(target).strip()), len(texts))
        if 0 <= right < len(texts):
            nats -= float(sample["filtered_resps"][right][0])
            num_bytes += len(texts[right].encode("utf-8"))
    return {"bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}

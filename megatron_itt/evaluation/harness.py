"""Running lm-eval on an export at any number of thinking budgets, offline where the data is local.

The model is loaded once and handed to the harness' own `hf` model; a budget is set around its calls. What is run is in
`tasks.py` and `paper_tasks.py`, what comes out in `results.py`.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_itt.config.environment import set_offline, working_directory
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import (
    Budget,
    ExportedModel,
    check_budget,
    format_budget,
    load_export,
    read_export_config,
    thinking_at,
    trained_budget,
)
from megatron_itt.evaluation.options import EvaluationRequest
from megatron_itt.evaluation.paper_tasks import PAPER_TASKS, num_fewshot_of
from megatron_itt.evaluation.perplexity import measure_perplexity
from megatron_itt.evaluation.results import publish_folder, write_results
from megatron_itt.log import get_logger

_BOOTSTRAP_ITERATIONS = 1000
_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")
_PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")


def evaluate_export(request: EvaluationRequest) -> dict[str, Any]:
    """Measure an export and write its results folder in one step (nothing is left there after a failure)."""
    name = str(request.model)
    request = _with_absolute_paths(request)
    output = request.output
    if output.exists() and not request.overwrite:
        raise EvaluationError(f"output {output} exists; choose another folder or give --overwrite")
    if not request.tasks and not request.perplexity_texts:
        raise EvaluationError("nothing to evaluate: give --tasks, --task-dir or --heldout")
    config = read_export_config(request.model)
    budgets = [check_budget(budget, trained_budget(config)) for budget in request.budgets]
    with _data_access(request):
        plan = TaskPlan(request) if request.tasks else None
        export = load_export(request.model, device=request.device, dtype=request.dtype)
        measured = _measure(export, plan, list(dict.fromkeys(budgets)) or [export.trained_budget], request)
    results = {"model": name, **measured}
    publish_folder(output, lambda folder: write_results(results, folder))
    return results


def _measure(
    export: ExportedModel, plan: TaskPlan | None, budgets: Sequence[Budget | None], request: EvaluationRequest
) -> dict[str, Any]:
    logger = get_logger()
    runs, perplexity = [], []
    for budget in budgets:
        label = "" if budget is None else f" at thinking budget {format_budget(budget)}"
        if plan is not None:
            logger.info(f"evaluating {', '.join(request.tasks)}{label}")
            runs.append(run_harness(export, plan, budget=budget, limit=request.limit, batch_size=request.batch_size))
        for domain, texts in request.perplexity_texts.items():
            logger.info(f"perplexity on {domain}{label}")
            measured = measure_perplexity(
                export,
                texts,
                budget=budget,
                domain=domain,
                batch_size=request.batch_size,
                max_tokens=request.perplexity_max_tokens,
            )
            perplexity.append(measured.as_dict())
    own = export.trained_budget
    return {
        "trained_budget": None if own is None else list(own),
        "limit": request.limit,
        "versions": {name: _version(name) for name in _PACKAGES},
        "runs": runs,
        "perplexity": perplexity,
    }


def run_harness(
    export: ExportedModel, plan: TaskPlan, *, budget: Budget | None, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """One pass of the harness over the planned tasks; returns its results object, with two entries of ours in front."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet_harness(), _counted_truncations() as counter, thinking_at(export.model, budget) as model:
        wrapped = HFLM(pretrained=model, tokenizer=export.tokenizer, batch_size=batch_size)
        outcome = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=plan.loaded,
            batch_size=batch_size,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            task_manager=plan.manager,
        )
    assert outcome is not None, "lm-eval returns results on rank 0, and there is only one rank"
    plain = json.loads(json.dumps(outcome, default=str))
    own = {"thinking_budget": None if budget is None else list(budget), "num_truncated_requests": counter.count}
    return {**own, **plain}


class TaskPlan:
    """The tasks of a request, found, checked for their data and loaded once for all budgets."""

    def __init__(self, request: EvaluationRequest) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EvaluationError(f"lm-eval is not installed ({error}); pip install 'megatron-itt[eval]'") from error
        folders = [_existing_folder(folder) for folder in request.task_dirs]
        with _quiet_harness():
            self.manager = TaskManager(include_path=folders, include_defaults=False)
            if any(name not in self.manager.task_index for name in request.tasks):
                self.manager = TaskManager(include_path=folders)  # reads lm-eval's own 14 000 files: seconds
        self._check_names(request.tasks)
        for name in request.tasks:
            self._check_data(name, request.data_root)
        self.loaded = [task for name in request.tasks for task in self._load(name)]

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.manager.task_index:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=1)
                hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists the tasks of lm-eval"
                raise EvaluationError(f"task {name!r} is unknown; {hint}")

    def _leaves(self, name: str) -> Iterator[tuple[dict[str, Any], Path]]:
        """Configurations of the single tasks under a task, group or tag, and the folders of their files."""
        entry = self.manager.task_index[name]
        if entry.kind.name == "TASK":
            yield entry.cfg or {}, Path.cwd() if entry.yaml_path is None else entry.yaml_path.parent
            return
        inside = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else sorted(entry.tags)
        for member in inside if isinstance(inside, list) else [inside]:
            child = member.get("task") if isinstance(member, dict) else member
            if isinstance(child, str) and child in self.manager.task_index and child != name:
                yield from self._leaves(child)

    def _check_data(self, name: str, data_root: Path | None) -> None:
        """Refuse before anything is loaded, and name the missing file. Hub data sets are not looked up here."""
        for leaf, folder in self._leaves(name):
            for file in _data_files(leaf):
                if "://" not in file and not (folder / file).is_file():
                    raise EvaluationError(f"task {name!r} reads {folder / file}, which does not exist")
            source = leaf.get("dataset_path")
            if data_root is None or not isinstance(source, str) or "/" not in source:
                continue
            folder = data_root / source
            if not folder.is_dir() or not any(folder.iterdir()):
                raise EvaluationError(
                    f"task {name!r} reads the data set {source}, but {folder} does not exist or is empty; copy the "
                    "data set there, or leave --data-root out to fetch it from the hub"
                )

    def _load(self, name: str) -> list[Any]:
        leaves = list(self._leaves(name))
        # Files named without a folder lie beside the task's own; lm-eval would look in the working folder.
        beside = next((folder for leaf, folder in leaves if _data_files(leaf)), None)
        try:
            with _quiet_harness(), working_directory(beside or Path.cwd()):
                found = self.manager.load([name])
        except (OSError, ValueError) as error:
            sources = sorted({str(leaf.get("dataset_path")) for leaf, _ in leaves})
            reason = " ".join(str(error).split())[:300]
            raise EvaluationError(
                f"task {name!r} cannot read its data set {', '.join(sources)}: {reason}; give a local copy: --data-root"
            ) from error
        num_fewshot = num_fewshot_of(name)
        if num_fewshot is not None:
            for task in found["tasks"].values():
                task.set_config(key="num_fewshot", value=num_fewshot)
        group = found.get("groups", {}).get(name)
        return [group] if group is not None else list(found["tasks"].values())


def paper_task_names() -> list[str]:
    """The lm-eval names of the paper's ten tasks, in the order of its Table 1."""
    return [task.task for task in PAPER_TASKS]


def task_names_in(folder: Path) -> list[str]:
    """Names of the tasks that the YAML files of a folder define."""
    from lm_eval.tasks import TaskManager

    names = list(TaskManager(include_path=str(_existing_folder(folder)), include_defaults=False).all_subtasks)
    if not names:
        raise EvaluationError(f"task folder {folder} defines no task; it needs lm-eval YAML files")
    return names


def _existing_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise EvaluationError(f"task folder {folder} does not exist; give the folder with the lm-eval YAML files")
    return folder.resolve()


def _data_files(leaf: Mapping[str, Any]) -> list[str]:
    """Local files that a task configuration names in `dataset_kwargs.data_files`; those of a hub data set are there."""
    if leaf.get("dataset_path") not in _FILE_READERS:
        return []
    files = (leaf.get("dataset_kwargs") or {}).get("data_files") or []
    groups = files.values() if isinstance(files, dict) else [files]
    return [str(file) for group in groups for file in (group if isinstance(group, list) else [group])]


@contextmanager
def _data_access(request: EvaluationRequest) -> Iterator[None]:
    """Work where the stock tasks find their data; no network if everything is local."""
    local_only = request.data_root is not None or set(request.tasks) <= _local_names(request.task_dirs)
    with ExitStack() as stack:
        if request.data_root is not None:
            if not request.data_root.is_dir():
                raise EvaluationError(
                    f"data root {request.data_root} does not exist; give the folder of offline copies"
                )
            stack.enter_context(working_directory(request.data_root))
        if local_only:
            stack.enter_context(offline_hub())
        yield


def _with_absolute_paths(request: EvaluationRequest) -> EvaluationRequest:
    """Resolve every path now: the working folder changes while the data is read."""
    return replace(
        request,
        model=request.model.resolve(),
        output=request.output.resolve(),
        task_dirs=[folder.resolve() for folder in request.task_dirs],
        data_root=None if request.data_root is None else request.data_root.resolve(),
    )


def _local_names(folders: Sequence[Path]) -> set[str]:
    return {name for folder in folders for name in task_names_in(folder)}


@contextmanager
def offline_hub() -> Iterator[None]:
    """Within the block the Hugging Face libraries use local files only, whether they are imported already or not."""
    names = ("huggingface_hub.constants", "datasets.config")
    online = [sys.modules[name] for name in names if name in sys.modules and not sys.modules[name].HF_HUB_OFFLINE]
    if not online:  # switched off by the user: leave it so
        yield
        return
    set_offline(True)
    for module in online:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        set_offline(False)
        for module in online:
            vars(module)["HF_HUB_OFFLINE"] = False


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep lm-eval's own messages to errors: it warns about things that are meant here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _TruncationCounter(logging.Filter):
    """Counts the harness' messages about cut prompts instead of showing thousands of them."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "Truncating" in record.getMessage()
        return record.levelno >= logging.ERROR


@contextmanager
def _counted_truncations() -> Iterator[_TruncationCounter]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    level, counter = logger.level, _TruncationCounter()
    logger.setLevel(logging.WARNING)
    logger.addFilter(counter)
    try:
        yield counter
    finally:
        logger.removeFilter(counter)
        logger.setLevel(level)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

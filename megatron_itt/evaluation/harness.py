"""lm-eval on an export at any number of thinking budgets, offline where the data is local.

The model is loaded once and wrapped in lm-eval's own `hf` model; a budget is set around its calls.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_itt.config.environment import set_offline, working_directory
from megatron_itt.config.optional_packages import find_version
from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel, load_export, thinking_at
from megatron_itt.evaluation.options import Budget, EvaluationRequest, check_budget, format_budget
from megatron_itt.evaluation.perplexity import measure_perplexity
from megatron_itt.evaluation.results import PAPER_TASKS, write_results
from megatron_itt.files import publishing
from megatron_itt.log import get_logger

_BOOTSTRAP_ITERATIONS = 1000
_FILE_READERS = ("arrow", "csv", "json", "parquet", "text")
_PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")


def evaluate_export(request: EvaluationRequest) -> dict[str, Any]:
    """Evaluate an export and write its results folder atomically; return the results."""
    name = str(request.model)
    request = replace(  # the working folder changes while the data is read
        request,
        model=request.model.resolve(),
        output=request.output.resolve(),
        task_dirs=[folder.resolve() for folder in request.task_dirs],
        data_root=None if request.data_root is None else request.data_root.resolve(),
    )
    output = request.output
    if output.exists() and not request.overwrite:
        raise EvaluationError(f"output {output} exists; choose another folder or give --overwrite")
    if not request.tasks and not request.perplexity_texts:
        raise EvaluationError("nothing to evaluate: give --tasks, --task-dir or --heldout")
    tasks, folders, root = request.tasks, request.task_dirs, request.data_root
    with data_access(tasks, folders, root):
        export = load_export(request.model, device=request.device, dtype=request.dtype)
        budgets = [check_budget(budget, export.trained_budget) for budget in request.budgets]
        plan = TaskPlan(tasks, task_dirs=folders, data_root=root) if tasks else None
        measured = _measure(export, plan, list(dict.fromkeys(budgets)) or [export.trained_budget], request)
    results = {"model": name, **measured}
    with publishing(output, overwrite=True) as folder:
        write_results(results, folder)
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
            run = run_harness(
                export,
                plan,
                budget=budget,
                limit=request.limit,
                batch_size=request.batch_size,
                log_samples=request.log_samples,
            )
            runs.append(run)
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
    return {
        "trained_budget": None if export.trained_budget is None else list(export.trained_budget),
        "limit": request.limit,
        "versions": {name: find_version(name) or "not installed" for name in _PACKAGES},
        "runs": runs,
        "perplexity": perplexity,
    }


def run_harness(
    export: ExportedModel,
    plan: TaskPlan,
    *,
    budget: Budget | None,
    limit: int | None = None,
    batch_size: int = 8,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Run lm-eval on the planned tasks; return its results object with two keys of ours."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with (
        quiet_harness(),
        _harness_log("lm_eval.models.huggingface", logging.WARNING) as counter,
        thinking_at(export.model, budget) as model,
    ):
        wrapped = HFLM(pretrained=model, tokenizer=export.tokenizer, batch_size=batch_size)
        outcome = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=plan.loaded,
            batch_size=batch_size,
            limit=limit,
            log_samples=log_samples,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            task_manager=plan.manager,
        )
    assert outcome is not None, "lm-eval returns results on rank 0"
    plain = json.loads(json.dumps(outcome, default=str))
    own = {"thinking_budget": None if budget is None else list(budget), "num_truncated_requests": counter.count}
    return {**own, **plain}


class TaskPlan:
    """Tasks of lm-eval and of `task_dirs`, checked for their data and loaded once for all budgets.

    EvaluationError for one that is unknown or whose data is not there, which names `data_root` by the setting that it
    came from. Needs `data_access`.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        task_dirs: Sequence[Path] = (),
        data_root: Path | None = None,
        data_root_setting: str = "--data-root",
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EvaluationError(f"lm-eval is not installed ({error}); pip install 'megatron-itt[eval]'") from error
        folders = [_existing_folder(folder) for folder in task_dirs]
        self._data_root_setting = data_root_setting
        with quiet_harness():
            self.manager = TaskManager(include_path=folders, include_defaults=False)
            if any(name not in self.manager.task_index for name in names):
                self.manager = TaskManager(include_path=folders)  # reads lm-eval's own 14,000 files: seconds
        for name in names:
            if name not in self.manager.task_index:
                near = difflib.get_close_matches(name, self.manager.all_tasks, n=1)
                hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists the tasks of lm-eval"
                raise EvaluationError(f"task {name!r} is unknown; {hint}")
        for name in names:
            self._check_data(name, data_root)
        self.loaded = [task for name in names for task in self._load(name)]

    def _leaves(self, name: str) -> Iterator[tuple[dict[str, Any], Path]]:
        """Configurations of the tasks in a task, group or tag, and the folders of their files."""
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
        """Raise EvaluationError for missing local data before anything is loaded. The hub is not asked."""
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
                    f"data set there, or leave {self._data_root_setting} out to fetch it from the hub"
                )

    def _load(self, name: str) -> list[Any]:
        leaves = list(self._leaves(name))
        # Data files without a folder are beside the YAML; lm-eval reads them from the working folder.
        beside = next((folder for leaf, folder in leaves if _data_files(leaf)), None)
        try:
            with quiet_harness(), working_directory(beside or Path.cwd()):
                found = self.manager.load([name])
        except (OSError, ValueError) as error:
            sources = sorted({str(leaf.get("dataset_path")) for leaf, _ in leaves})
            reason = " ".join(str(error).split())[:300]
            raise EvaluationError(
                f"task {name!r} cannot read its data set {', '.join(sources)}: {reason}; give a local copy: "
                f"{self._data_root_setting}"
            ) from error
        num_fewshot = next((task.num_fewshot for task in PAPER_TASKS if task.task == name), None)
        if num_fewshot is not None:
            for task in found["tasks"].values():
                task.set_config(key="num_fewshot", value=num_fewshot)
        group = found.get("groups", {}).get(name)
        return [group] if group is not None else list(found["tasks"].values())


def choose_tasks(names: str | None, task_dir: Path | None) -> list[str]:
    """Return the tasks of `names` ("a,b", or "paper" for those of Table 1), by default all of the folder `task_dir`."""
    if names is None:
        return [] if task_dir is None else task_names_in(task_dir)
    return [task.task for task in PAPER_TASKS] if names == "paper" else [name for name in names.split(",") if name]


def task_names_in(folder: Path) -> list[str]:
    """Return the names of the tasks in the YAML files of a folder."""
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
    """Local files in `dataset_kwargs.data_files` of a task configuration."""
    if leaf.get("dataset_path") not in _FILE_READERS:
        return []
    files = (leaf.get("dataset_kwargs") or {}).get("data_files") or []
    groups = files.values() if isinstance(files, dict) else [files]
    return [str(file) for group in groups for file in (group if isinstance(group, list) else [group])]


@contextmanager
def data_access(tasks: Sequence[str], task_dirs: Sequence[Path], data_root: Path | None) -> Iterator[None]:
    """Set the working folder to the data root, and forbid the network if all data is local."""
    local = {name for folder in task_dirs for name in task_names_in(folder)}
    with ExitStack() as stack:
        if data_root is not None:
            if not data_root.is_dir():
                raise EvaluationError(f"data root {data_root} does not exist; give the folder of offline copies")
            stack.enter_context(working_directory(data_root))
        if data_root is not None or set(tasks) <= local:
            stack.enter_context(offline_hub())
        yield


@contextmanager
def offline_hub() -> Iterator[None]:
    """Forbid the Hugging Face libraries the network within the block, whether they are imported already or not."""
    names = ("huggingface_hub.constants", "datasets.config")
    online = [sys.modules[name] for name in names if name in sys.modules and not sys.modules[name].HF_HUB_OFFLINE]
    if not online:  # offline already
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
def _harness_log(name: str, level: int) -> Iterator[_TruncationCounter]:
    """Show errors of an lm-eval logger only, and count its messages about truncated prompts instead of showing them.

    lm-eval warns about settings that are intended here. `level`: of the messages that are counted or shown.
    """
    logger, counter = logging.getLogger(name), _TruncationCounter()
    before = logger.level
    logger.setLevel(level)
    logger.addFilter(counter)
    try:
        yield counter
    finally:
        logger.removeFilter(counter)
        logger.setLevel(before)


def quiet_harness() -> AbstractContextManager[Any]:
    return _harness_log("lm_eval", logging.ERROR)


class _TruncationCounter(logging.Filter):
    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "Truncating" in record.getMessage()
        return record.levelno >= logging.ERROR

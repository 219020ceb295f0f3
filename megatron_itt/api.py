"""Public functions of the package. `import megatron_itt` exposes them lazily, and each imports only what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_itt.config import RunConfig, load_config
from megatron_itt.config.backends import use_backend
from megatron_itt.config.environment import process_info
from megatron_itt.config.versions import check_megatron_core
from megatron_itt.errors import EvaluationError
from megatron_itt.parallel.megatron_compat.eager_import import import_megatron_core

if TYPE_CHECKING:
    from megatron_itt.data.text.preprocess import Outcome
    from megatron_itt.data.text.tokenizer import Tokenizer
    from megatron_itt.evaluation.in_training import TrainingTasks
    from megatron_itt.hf.export import ExportReport
    from megatron_itt.hf.import_weights import ImportReport

Recipe = str | Path | RunConfig


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check a recipe: a YAML file, or the name of a shipped one such as "466m/itt_x4". No torch."""
    return load_config(recipe, overrides)


def load_for_this_job(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """As `load_recipe`, including the layout rules for the processes of this job."""
    process = process_info()
    return load_config(recipe, overrides, world_size=process.world_size, world_size_from=process.world_size_from)


def train(recipe: Recipe, overrides: Iterable[str] = (), *, allow_changed: Sequence[str] = ()) -> bool:
    """Train in this process of the job, resuming from the newest checkpoint of the run folder.

    Return whether the run is finished; after a signal it is not, and a checkpoint was saved.
    """
    if not isinstance(recipe, RunConfig):
        recipe = load_for_this_job(recipe, overrides)
    backend = use_backend(recipe.precision.parts, device=recipe.runtime.device)
    import_megatron_core()
    from megatron_itt.training.loop import Hooks, train

    hooks = Hooks(open_tasks=open_tasks, export=export_hf)
    return train(recipe, backend=backend, allow_changed=allow_changed, hooks=hooks)


def open_tasks(config: RunConfig, tokenizer: Tokenizer) -> TrainingTasks:
    """Open the evaluation tasks of a recipe; EvaluationError for a task whose data is not there."""
    try:
        from megatron_itt.evaluation.in_training import TrainingTasks
    except ImportError as error:
        raise EvaluationError(
            f"validation.tasks needs lm-eval, which cannot be imported ({error}); pip install 'megatron-itt[eval]', or "
            "remove validation.tasks"
        ) from error
    return TrainingTasks(config, tokenizer)


def preprocess(**options: Any) -> Outcome:
    """Tokenize text into indexed data; the options are the fields of `data.text.preprocess.PreprocessOptions`."""
    from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess

    return preprocess(PreprocessOptions(**options))


def export_hf(checkpoint: str | Path, output: str | Path, **options: Any) -> ExportReport:
    """Export a checkpoint, or the newest of a run folder; the options are the fields of `hf.options.ExportOptions`."""
    check_megatron_core()
    import_megatron_core()
    from megatron_itt.hf.export import ExportOptions, export_checkpoint

    return export_checkpoint(checkpoint, output, ExportOptions(**options))


def import_hf(
    model: str | Path, recipe: Recipe | None, output: str | Path, overrides: Iterable[str] = (), **options: Any
) -> ImportReport:
    """Write a checkpoint with the weights of a Hugging Face folder into the run folder `output`.

    Without a recipe the shape is the folder's; the options are the fields of `hf.options.ImportOptions`.
    """
    check_megatron_core()
    import_megatron_core()
    from megatron_itt.hf.import_weights import ImportOptions, import_folder, import_model

    if isinstance(recipe, RunConfig):
        return import_folder(model, recipe, output, options=ImportOptions(**options))
    return import_model(model, output, recipe=recipe, overrides=overrides, options=ImportOptions(**options))


def average_checkpoints(run: str | Path, output: str | Path, **options: Any) -> Path:
    """Write the mean of a run's last checkpoints into the run folder `output`; options: `last`, or `steps`."""
    check_megatron_core()
    import_megatron_core()
    from megatron_itt.checkpoint.average import average_checkpoints

    return average_checkpoints(run, output, **options)


def evaluate(model: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Evaluate an exported folder; the options are the fields of `evaluation.options.EvaluationRequest`."""
    from megatron_itt.evaluation.harness import EvaluationRequest, evaluate_export

    return evaluate_export(EvaluationRequest(model=Path(model), output=Path(output), **options))

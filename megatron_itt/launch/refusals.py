"""Checks of a job before it is submitted: run folder, room, weights, tokenizer and data. No torch; writes nothing.

They spare a job that would end at once the hours in a queue.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from megatron_itt.accounting.memory import rank_memory
from megatron_itt.checkpoint.store import checkpoint_root, list_checkpoints, resolve_checkpoint
from megatron_itt.config import RunConfig
from megatron_itt.errors import ConfigError, IttError
from megatron_itt.launch.run_lock import LOCK_FILE, describe_use, is_alive
from megatron_itt.launch.snapshot import check_snapshot
from megatron_itt.locks import read_owner
from megatron_itt.log import get_logger

FINISHED_FILE = "finished"
_DATA_ENDS = (".bin", ".idx")


def find_folder_refusals(
    config: RunConfig, *, allow_changed: Iterable[str] = (), ended_owner: str | None = None
) -> list[str]:
    """Return why the run folder would refuse the job: a changed recipe, a damaged snapshot, a living owner.

    `ended_owner` is the text of a claim whose job has ended, which only the scheduler can say.
    """

    def check_owner() -> None:
        run_dir = Path(config.logging.run_dir)
        owner = read_owner(run_dir / LOCK_FILE)
        if owner is not None and owner != ended_owner and is_alive(owner):
            raise ConfigError(describe_use(run_dir, owner))

    return _messages(lambda: check_snapshot(config, allow_changed=allow_changed), check_owner)


def find_input_refusals(config: RunConfig) -> list[str]:
    """Return why training would refuse its weights, tokenizer or data, or run out of room."""
    try:
        return _messages(
            *(partial(check, config) for check in (_check_room, _check_initial_weights, _check_tokenizer, _check_data))
        )
    except ImportError as error:  # a login node may have no more than recipes need
        get_logger().warning("tokenizer and data are not checked here: %s", error)
        return []


def is_finished(config: RunConfig) -> bool:
    """Whether the run has completed the steps of the recipe."""
    done = finished_step(Path(config.logging.run_dir))
    return done is not None and done >= config.schedule.steps


def finished_step(run_dir: Path) -> int | None:
    """Return the last step of a finished run, by its marker; None if it is not finished."""
    try:
        return int((run_dir / FINISHED_FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return sys.maxsize  # made by hand: finished, whatever the recipe says


def reopen_if_longer(config: RunConfig) -> None:
    """Remove the marker of a run that finished with fewer steps than the recipe has. Only for the folder's owner."""
    if not is_finished(config):
        (Path(config.logging.run_dir) / FINISHED_FILE).unlink(missing_ok=True)


def _messages(*checks: Callable[[], object]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except IttError as error:
            found.append(str(error))
    return found


def _check_room(config: RunConfig) -> None:
    """Raise ConfigError if the disk has no room for the checkpoints that the run is to keep, and one being written."""
    run_dir, parallel, keep_last = Path(config.logging.run_dir), config.parallel, config.checkpoint.keep_last
    stages = rank_memory(config, parallel.tensor * parallel.pipeline)
    size = parallel.tensor * sum(stage.weights + stage.optimizer for stage in stages)
    number = max(1, keep_last + 1 - len(list_checkpoints(checkpoint_root(run_dir))))
    folder = next(folder for folder in (run_dir.resolve(), *run_dir.resolve().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < number * size:
        raise ConfigError(
            f"logging.run_dir is {run_dir}, whose disk has {free / 1e9:,.0f} GB left; {number} more checkpoints "
            f"(checkpoint.keep_last is {keep_last}) need {number * size / 1e9:,.0f} GB: free room, or keep fewer"
        )


def _check_initial_weights(config: RunConfig) -> None:
    if config.checkpoint.initial_weights is not None:
        resolve_checkpoint(config.checkpoint.initial_weights)


def _check_tokenizer(config: RunConfig) -> None:
    name = config.data.tokenizer
    if name is not None and name.startswith("data/") and not Path(name).exists():  # no name on the hub
        raise ConfigError(f"data.tokenizer is {name}, which does not exist here; name a tokenizer folder")
    from megatron_itt.data.text.tokenizer import check_vocabulary, recipe_tokenizer

    check_vocabulary(recipe_tokenizer(config), config.model.vocab_size)


def _check_data(config: RunConfig) -> None:
    missing = [
        f"data.blend.{name}.path is {domain.path}"
        for name, domain in config.data.used_domains().items()
        if not all(Path(f"{domain.path}{end}").is_file() for end in _DATA_ENDS)
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}, without .bin and .idx; write them with tools/preprocess.py, or correct the path"
        )
    from megatron_itt.data.batches.blend import resolve_blend

    resolve_blend(config)

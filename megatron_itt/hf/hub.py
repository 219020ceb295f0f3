"""Upload of an exported folder to the Hugging Face hub, in one commit: a repository has all of its files or none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from megatron_itt.data.text.http_file import TEMPORARY_STATUSES, RetryPolicy
from megatron_itt.errors import ExportError
from megatron_itt.log import get_logger

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier export, perhaps in other shards
_POLICY = RetryPolicy(attempts=4)  # huggingface_hub repeats most requests itself as well
Result = TypeVar("Result")


def check_hub(name: str, policy: RetryPolicy = _POLICY) -> None:
    """Raise ExportError for a bad name, or if the hub does not answer or does not know the user: before an export."""
    problem = f"nothing can be uploaded to {name}"
    _call(lambda: validate_repo_id(name), problem, policy)
    _call(HfApi().whoami, problem, policy)


def push_folder(folder: Path, name: str, *, public: bool = False, policy: RetryPolicy = _POLICY) -> str:
    """Upload a complete export as the next commit of a model repository; return the address of the repository.

    A new repository is private, and stays so without `public`; weights of earlier commits go in the same commit.
    ExportError if the hub refuses, or still fails after retries: then no file of the folder is in the repository.
    """
    api = HfApi()
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no config.json, so it is no export that could be uploaded; use itt export")
    by_hand = f"itt export --output {folder} --push-to-hub {name}{' --public' * public} continues"
    problem = f"{folder} is complete but was not uploaded to {name}, which has none of its files; {by_hand}"
    repository = _call(lambda: api.create_repo(name, private=True, exist_ok=True), problem, policy)
    message = f"Upload {folder.name}"
    _call(
        lambda: api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message=message, delete_patterns=_WEIGHTS
        ),
        problem,
        policy,
    )
    if public:
        problem = f"{name} is uploaded but not public; {by_hand}"
        _call(lambda: api.update_repo_settings(repository.repo_id, private=False), problem, policy)
    return str(repository)


def _call(act: Callable[[], Result], problem: str, policy: RetryPolicy) -> Result:
    """Call the hub, again after a failure that may pass. ExportError with `problem` and the reason."""
    for attempt in range(policy.attempts):
        try:
            return act()
        except (httpx2.HTTPError, OSError, HFValidationError, RuntimeError) as error:  # RuntimeError: of hf_xet
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, LocalTokenNotFoundError):
                reason = "no token; run `hf auth login`, or set HF_TOKEN"
            status = getattr(getattr(error, "response", None), "status_code", None)
            passes = isinstance(error, httpx2.RequestError) or status in TEMPORARY_STATUSES
            if not passes or attempt + 1 == policy.attempts:
                raise ExportError(f"{problem} ({reason})") from error
            wait_s = policy.wait_s(attempt + 1)
            get_logger().warning("the hub failed (%s); trying again in %.0f s", reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")

"""Task files of SkyPilot and of the Kubeflow training operator: by their schemas, and what a task then runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from megatron_itt.cli import run
from megatron_itt.config import parse_config
from megatron_itt.errors import ConfigError
from megatron_itt.launch.task_files import FOLDERS, load_for_cluster


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Camel(_Schema):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


# The keys of the two formats that we use, as their schemas have them: SkyPilot 0.14, training operator 1.9.
class _Recovery(_Schema):
    max_restarts_on_errors: Annotated[int, Field(ge=0)]


class _SkyResources(_Schema):
    accelerators: Annotated[str, Field(pattern=r"^(A100|A100-80GB|H100|H200|B200):\d+$")]
    image_id: Annotated[str, Field(pattern="^docker:.")] | None = None
    job_recovery: _Recovery


class _Mount(_Schema):
    source: str
    mode: Literal["MOUNT", "COPY", "MOUNT_CACHED"]


class _SkyTask(_Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")]
    num_nodes: Annotated[int, Field(ge=1)]
    resources: _SkyResources
    workdir: str | None = None
    setup: str | None = None
    run: str
    file_mounts: dict[str, _Mount] = Field(default_factory=dict)
    volumes: dict[str, str]


class _Limits(_Camel):
    limits: dict[str, int]


class _VolumeMount(_Camel):
    name: str
    mount_path: str


class _Container(_Camel):
    name: Literal["pytorch"]  # the operator looks for this name
    image: str
    command: list[str]
    resources: _Limits
    volume_mounts: list[_VolumeMount]


class _Volume(_Camel):
    name: str
    config_map: dict[Literal["name"], str] | None = None
    persistent_volume_claim: dict[Literal["claimName"], str] | None = None
    empty_dir: dict[Literal["medium"], Literal["Memory"]] | None = None


class _PodSpec(_Camel):
    termination_grace_period_seconds: int
    containers: list[_Container]
    volumes: list[_Volume]


class _Replicas(_Camel):
    replicas: Annotated[int, Field(ge=1)]
    restart_policy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: dict[Literal["spec"], _PodSpec]


class _RunPolicy(_Camel):
    backoff_limit: int
    clean_pod_policy: Literal["All", "Running", "None"]


class _JobSpec(_Camel):
    nproc_per_node: str
    run_policy: _RunPolicy
    pytorch_replica_specs: dict[Literal["Master", "Worker"], _Replicas]


class _Metadata(_Camel):
    name: Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class _PyTorchJob(_Camel):
    api_version: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: _Metadata
    spec: _JobSpec


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    assert run(["recipe", "plan", *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


IMAGE = ("--image", "registry/itt:1")


@pytest.mark.parametrize("options", [(), IMAGE, ("--data", "s3://bucket/data")])
def test_a_skypilot_task_follows_its_schema(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (content,) = _printed(capsys, "466m/itt_x4", "--nodes", "2", "--gpu", "h100", "--format", "skypilot", *options)
    task = _SkyTask.model_validate(content)
    assert (task.num_nodes, task.resources.accelerators, task.name) == (2, "H100:8", "itt-466m-itt-x4")
    assert task.volumes["/runs"] == "itt-runs"
    assert ("/data" in task.file_mounts) == ("s3://bucket/data" in options) != ("/data" in task.volumes)
    assert (task.setup is None) == (task.workdir is None) == (options == IMAGE)


def test_the_run_script_writes_the_recipe_and_starts_torchrun_on_the_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (task,) = _printed(capsys, "466m/itt_x4", "--nodes", "2", "--format", "skypilot", *IMAGE, "schedule.steps=7000")
    (tmp_path / "python3").write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$ITT_CLAIM"\n')
    (tmp_path / "python3").chmod(0o755)
    script = task["run"].replace("/tmp/recipe.yaml", f"{tmp_path}/recipe.yaml")
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {**node, "SKYPILOT_TASK_ID": "sky-1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    *words, claim = done.stdout.splitlines()
    options = dict(zip(words[2:-3:2], words[3:-3:2], strict=True))
    assert options["--node-rank"] == "1" and options["--master-addr"] == "10.0.0.1"
    assert options["--nproc-per-node"] == "8" and options["--nnodes"] == "2"
    assert claim.startswith("job sky-1 start ") and claim.rpartition(" ")[2].isdigit()
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert parse_config(written) == load_for_cluster("466m/itt_x4", ["schedule.steps=7000"], FOLDERS)


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_pytorch_job_follows_its_schema_and_brings_the_recipe(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, content = _printed(capsys, "466m/itt_x4", "--nodes", str(nodes), "--format", "k8s", *IMAGE)
    job = _PyTorchJob.model_validate(content)
    replicas = job.spec.pytorch_replica_specs
    assert {role: spec.replicas for role, spec in replicas.items()} == {
        "Master": 1,
        **({"Worker": nodes - 1} if nodes > 1 else {}),
    }
    assert job.spec.nproc_per_node == "8"
    pod = replicas["Master"].template["spec"]
    assert {mount.name for mount in pod.containers[0].volume_mounts} == {volume.name for volume in pod.volumes}
    assert pod.volumes[0].config_map == {"name": recipe["metadata"]["name"]}
    assert yaml.safe_load(recipe["data"]["recipe.yaml"])["logging"]["run_dir"] == "/runs/466m_itt_x4"


def test_the_plan_in_words_has_days_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "plan", "466m/itt_x4", "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "2 x 8 tasks = 16 ranks" in text and "GPU-hours" in text and "GiB per GPU" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "k8s"], "needs --image"),
        (["--format", "k8s", *IMAGE, "--data", "s3://bucket"], "PersistentVolumeClaim, such as itt-data"),
        (["--format", "skypilot", "--runs", "s3://bucket"], "file system with locks"),
        (["--format", "skypilot", "logging.run_dir=/tmp/x"], "give runs/NAME"),
        (["--format", "skypilot", "--nodes", "3"], "do not fit the recipe"),
    ],
)
def test_what_no_task_could_do_is_refused_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        run(["recipe", "plan", "466m/itt_x4", *options])
    assert "\n" not in str(refused.value)


def test_names_are_those_that_schedulers_allow(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("runs/Tiny_Run.v2", f"runs/{'long_' * 30}", "runs/deep/er"):
        (task,) = _printed(capsys, "466m/itt_x4", "--format", "skypilot", "--nodes", "2", f"logging.run_dir={folder}")
        _Metadata(name=task["name"])
        assert json.dumps(task["name"]).isascii() and len(task["name"]) <= 40

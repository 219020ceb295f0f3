"""Task files of other schedulers: a SkyPilot task, and a PyTorchJob of the Kubeflow training operator. No torch.

Both carry the resolved recipe, start torchrun on every node, and export ITT_CLAIM, so that a restart of the same job
takes the run folder over. Sources: SkyPilot's YAML reference; the operator's CustomResourceDefinition, version 1.9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_itt.config import RunConfig
from megatron_itt.config.load import config_to_yaml
from megatron_itt.errors import ConfigError
from megatron_itt.launch.folders import ClusterFolders, load_for_cluster
from megatron_itt.launch.plan import JobShape, check_shape

DATA_ROOT, RUN_ROOT = "/data", "/runs"  # where tasks see data/... and runs/... of a recipe
FOLDERS = ClusterFolders(data_root=DATA_ROOT, run_root=RUN_ROOT)
SKYPILOT_GPUS = {"a100-40gb": "A100", "a100-80gb": "A100-80GB", "h100": "H100", "h200": "H200", "b200": "B200"}
RESTARTS = 3
GRACE_S = 300  # to save a checkpoint after SIGTERM
_RENDEZVOUS_PORT = 29500
_NAME_LENGTH = 40  # Kubernetes allows 63 with what the operator appends


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """What a task file has beside the recipe."""

    shape: JobShape
    gpu: str = "h100"
    image: str | None = None  # container image with this package; SkyPilot can do without and runs tools/install.sh
    data: str = "itt-data"  # volume of the data, a PersistentVolumeClaim in Kubernetes; SkyPilot: or a bucket, s3://...
    runs: str = "itt-runs"  # volume of the run folders


def load_for_tasks(recipe: str, overrides: tuple[str, ...], shape: JobShape) -> RunConfig:
    """Read a recipe with its folders as the tasks see them. ConfigError if it does not fit, or is on no volume."""
    config = load_for_cluster(recipe, overrides, FOLDERS)
    check_shape(config, shape)
    if not config.logging.run_dir.startswith(f"{RUN_ROOT}/"):
        raise ConfigError(
            f"logging.run_dir is {config.logging.run_dir}, which no other node would see; give runs/NAME, which is on "
            "the volume of --runs"
        )
    return config


def skypilot_task(config: RunConfig, options: TaskOptions) -> str:
    """Return a SkyPilot task as YAML, for `sky launch` or, restarted after preemption, `sky jobs launch`."""
    if "://" in options.runs:
        raise ConfigError(
            f"--runs is {options.runs}; a run folder needs a file system with locks and renames, so name a volume"
        )
    shape, python = options.shape, "python3" if options.image else ".venv/bin/python"
    task: dict[str, Any] = {
        "name": job_name(config),
        "num_nodes": shape.num_nodes,
        "resources": {
            "accelerators": f"{SKYPILOT_GPUS[options.gpu]}:{shape.tasks_per_node}",
            "job_recovery": {"max_restarts_on_errors": RESTARTS},
        },
        "volumes": {RUN_ROOT: options.runs},
    }
    if options.image:
        task["resources"]["image_id"] = f"docker:{options.image}"
    else:
        task |= {"workdir": ".", "setup": "EXTRAS=data,eval,analysis bash tools/install.sh"}
    if "://" in options.data:
        task["file_mounts"] = {DATA_ROOT: {"source": options.data, "mode": "MOUNT"}}
    else:
        task["volumes"][DATA_ROOT] = options.data
    task["run"] = "\n".join(
        [
            "set -euo pipefail",
            f"cat >/tmp/recipe.yaml <<'END_OF_RECIPE'\n{config_to_yaml(config).rstrip()}\nEND_OF_RECIPE",
            'export ITT_CLAIM="job $SKYPILOT_TASK_ID start $(date +%s)"',
            f"exec {python} -m torch.distributed.run --nnodes $SKYPILOT_NUM_NODES --node-rank $SKYPILOT_NODE_RANK \\",
            f"  --nproc-per-node {shape.tasks_per_node} --master-port {_RENDEZVOUS_PORT} \\",
            '  --master-addr "$(head -n1 <<<"$SKYPILOT_NODE_IPS")" -m megatron_itt.train /tmp/recipe.yaml',
            "",
        ]
    )
    return _as_yaml(task)


def pytorch_job(config: RunConfig, options: TaskOptions) -> str:
    """Return a ConfigMap with the recipe and a PyTorchJob as YAML, for `kubectl apply`."""
    if not options.image:
        raise ConfigError("--format k8s needs --image: a container image with this package, see docker/Dockerfile")
    for name, value in (("data", options.data), ("runs", options.runs)):
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", value):
            raise ConfigError(f"--{name} is {value}; Kubernetes mounts a PersistentVolumeClaim, such as itt-{name}")
    name, shape = job_name(config), options.shape
    # The operator sets torchrun's variables: PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and _PORT.
    command = (
        f'export ITT_CLAIM="job {name} start $(date +%s)"; exec torchrun -m megatron_itt.train /etc/itt/recipe.yaml'
    )
    mounts = {"recipe": "/etc/itt", "data": DATA_ROOT, "runs": RUN_ROOT, "shm": "/dev/shm"}
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [
            {
                "name": "pytorch",
                "image": options.image,
                "command": ["bash", "-c", command],
                "resources": {"limits": {"nvidia.com/gpu": shape.tasks_per_node}},
                "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
            }
        ],
        "volumes": [
            {"name": "recipe", "configMap": {"name": f"{name}-recipe"}},
            {"name": "data", "persistentVolumeClaim": {"claimName": options.data}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": options.runs}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    replicas = {"Master": 1, "Worker": shape.num_nodes - 1}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "nprocPerNode": str(shape.tasks_per_node),
            "runPolicy": {"backoffLimit": RESTARTS, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                role: {"replicas": number, "restartPolicy": "OnFailure", "template": {"spec": pod}}
                for role, number in replicas.items()
                if number
            },
        },
    }
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe"},
        "data": {"recipe.yaml": config_to_yaml(config)},
    }
    return "---\n".join(map(_as_yaml, (recipe, job)))


FORMATS = {"skypilot": skypilot_task, "k8s": pytorch_job}


def job_name(config: RunConfig) -> str:
    """Return the run's name as both schedulers allow it: lower case, digits and dashes, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", config.logging.run_dir.removeprefix(f"{RUN_ROOT}/").lower()).strip("-")
    return (words if words[:1].isalpha() else f"itt-{words}")[:_NAME_LENGTH].rstrip("-")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _as_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)

"""A cluster and a tiny recipe, each made once per session."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import yaml

from megatron_itt.config import dump_config
from megatron_itt.data.text.documents import sample_texts
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import train_tokenizer
from tests.helpers.one_rank import tiny_recipe
from tests.slurm.cluster import Cluster, find_missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes; skips where they cannot be had."""
    yield from _running(2)


@pytest.fixture(scope="session")
def cluster_of_four() -> Iterator[Cluster]:
    """Four idle nodes."""
    yield from _running(4)


def _running(num_nodes: int) -> Iterator[Cluster]:
    missing = find_missing()
    if missing:
        pytest.skip(missing)
    started = Cluster(num_nodes)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and code.bin/.idx/.json, from sources of the standard library."""
    root = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [part for name in ("ast", "shutil") for part in (library / f"{name}.py").read_text("utf-8").split("\n\n\n")]
    (root / "code.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    train_tokenizer(sample_texts([str(root)]), root / "tokenizer", vocab_size=512)
    preprocess(
        PreprocessOptions(
            inputs=(str(root / "code.jsonl"),),
            tokenizer=str(root / "tokenizer"),
            output_prefix=str(root / "code"),
        )
    )
    return root


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    """A tiny ITT recipe on that data; its run folder is runs/tiny, under the cluster's run root."""
    config = tiny_recipe(
        model={"vocab_size": 512, "seq_length": 32},
        data={
            "tokenizer": str(data / "tokenizer"),
            "blend": {"code": {"path": str(data / "code"), "weight": 1.0}},
            "cache_dir": str(tmp_path / "cache"),
            "max_epochs": 1.0e6,
        },
        validation={"tokens": 1024, "interval_steps": 50},
        checkpoint={"save_interval_steps": 1000, "keep_last": 2},
        logging={"run_dir": "runs/tiny", "interval_steps": 1, "tensorboard": False},
        runtime={"device": "cpu"},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dump_config(config)), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Environment that names a cluster.env with this interpreter and a run root in the test's folder."""
    (tmp_path / "runs").mkdir()
    file = tmp_path / "cluster.env"
    file.write_text(f"ITT_PYTHON={sys.executable}\nITT_RUN_ROOT={tmp_path}/runs\nITT_PREFLIGHT=no\n")
    return {"ITT_CLUSTER_ENV": str(file), "OMP_NUM_THREADS": "1"}

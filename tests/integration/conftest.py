"""A small indexed data set from real text, made once per session: tests of whole commands read it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import orjson
import pytest
import yaml

from megatron_itt.config import dump_config
from megatron_itt.data.text.documents import sample_texts
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.data.text.tokenizer import train_tokenizer
from tests.helpers.one_rank import tiny_recipe

MODULES = {"code": ["ast", "shutil", "tarfile", "ftplib"], "docs": ["inspect", "typing", "argparse", "optparse"]}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/, code.bin/.idx/.json and docs.bin/.idx/.json, from sources of the standard library."""
    root = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    for domain, names in MODULES.items():
        texts = [part for name in names for part in (library / f"{name}.py").read_text("utf-8").split("\n\n\n")]
        (root / f"{domain}.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    train_tokenizer(sample_texts([str(root)]), root / "tokenizer", vocab_size=512)
    for domain in MODULES:
        preprocess(
            PreprocessOptions(
                inputs=(str(root / f"{domain}.jsonl"),),
                tokenizer=str(root / "tokenizer"),
                output_prefix=str(root / domain),
            )
        )
    return root


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    """A tiny ITT recipe on that data, with its run folder in the test's own folder."""
    config = tiny_recipe(
        model={"vocab_size": 512, "seq_length": 32},
        data={
            "tokenizer": str(tiny_data / "tokenizer"),
            "blend": {
                "code": {"path": str(tiny_data / "code"), "weight": 0.7},
                "docs": {"path": str(tiny_data / "docs"), "weight": 0.3},
            },
            "cache_dir": str(tmp_path / "cache"),
        },
        validation={"tokens": 512, "interval_steps": 2, "budgets": [[0.25, 0.25, 0.25], [1.0, 1.0, 1.0]]},
        checkpoint={"save_interval_steps": 2, "keep_last": 2},
        logging={"run_dir": str(tmp_path / "run"), "interval_steps": 1},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dump_config(config)), encoding="utf-8")
    return path

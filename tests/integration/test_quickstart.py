"""The quickstart and the documented commands, run for real in a copy of the checkout, with a smaller model."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_itt.config import load_config
from megatron_itt.config.check import find_layout_problems

ROOT = Path(__file__).parents[2]
SMALLER = {
    "model": {"hidden_size": 48, "ffn_hidden_size": 64, "num_layers": 4, "seq_length": 128},
    "batch": {"global": 8, "micro": 4},
    "schedule": {"steps": 6, "warmup_steps": 2},
    "validation": {"tokens": 12000, "interval_steps": 6},
    "checkpoint": {"save_interval_steps": 2},
}
# Pages whose shell blocks are run, and what replaces the paths of a cluster, and what takes minutes, in them.
PAGES = ("README.md", "docs/training.md", "docs/exports.md", "docs/launching.md")
STAND_INS = {
    "/data/redpajama/arxiv/*.jsonl.zst": "runs/quickstart/corpus/code",
    "/data/tokenizer": "runs/quickstart/tokenizer",
    "runs/466m_itt_x4": "runs/quickstart",
    "benchmark --repeats 3": "benchmark --repeats 1 --parts steps,memory --models 'ITT x4'",
    "decode --repeats 1": "decode --repeats 1 --batches 1 --new-tokens 4",
    "--tasks paper": "--task-dir runs/quickstart/tasks --limit 2",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy in which the tiny recipe is tinier still."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "megatron_itt", "slurm"):
        (copy / name).symlink_to(ROOT / name)
    for path in (ROOT / "recipes").rglob("*.yaml"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text("utf-8"), encoding="utf-8")
    tiny = copy / "recipes/debug/itt_tiny.yaml"
    data = yaml.safe_load(tiny.read_text("utf-8"))
    for section, values in SMALLER.items():
        data[section].update(values)
    tiny.write_text(yaml.safe_dump(data), encoding="utf-8")
    return copy


def environment(checkout: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
    return {**os.environ, "PATH": path, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def finished(checkout: Path) -> str:
    """Runs the quickstart, killed once while it trains; returns what the second start printed."""
    command = [sys.executable, "tools/quickstart.py"]
    first = subprocess.Popen(
        command, cwd=checkout, env=environment(checkout), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not (checkout / "runs/quickstart/checkpoints/step_0000002/run_state.json").exists():
        assert first.poll() is None, "the quickstart ended before it had trained"
        assert time.monotonic() < deadline, "no checkpoint within ten minutes"
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    return run(checkout, *command).stdout


def test_an_interrupted_quickstart_continues_where_it_was(finished: str, checkout: Path) -> None:
    assert "[1/10] sample corpus: done" in finished
    assert "resumed from" in finished
    lines = [json.loads(line) for line in (checkout / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert len({tuple(entry["budget"]) for line in lines for entry in line.get("validation", ())}) == 4


def test_a_second_quickstart_does_nothing_again(finished: str, checkout: Path) -> None:
    page = checkout / "runs/quickstart/report.html"
    before = page.stat().st_mtime_ns
    again = run(checkout, sys.executable, "tools/quickstart.py").stdout
    assert again.count(": done") == 9  # all but the generated continuation
    assert page.stat().st_mtime_ns == before


def test_the_results_are_all_there(finished: str, checkout: Path) -> None:
    root = checkout / "runs/quickstart"
    results = json.loads((root / "evaluation/results.json").read_text())
    assert "heldout_last_word" in json.dumps(results)
    page = (root / "report.html").read_text()
    for part in ("heldout_continuation", "perplexity", "megatron-core"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def documented_commands() -> list[str]:
    """Every command in the shell blocks of the pages, once, without comments."""
    texts = [(ROOT / page).read_text("utf-8") for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_works(command: str, finished: str, checkout: Path) -> None:
    if command.startswith("make "):
        done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0
        return
    for shown, stand_in in STAND_INS.items():
        command = command.replace(shown, stand_in)
    words = shlex.split(command)
    if "megatron_itt.train" in words and "--check" not in words and "--print-config" not in words:
        check_training_command(words, checkout)
        return
    if words[0] == "sbatch":
        words = ["bash", *words[1:], "--dry-run"]
    starts = {"python": [sys.executable], "itt": [sys.executable, "-m", "megatron_itt.cli"]}
    run(checkout, *starts.get(words[0], [words[0]]), *words[1:])


def check_training_command(words: list[str], checkout: Path) -> None:
    """A run that would take long: its recipe, overrides and layout are checked instead."""
    position = words.index("megatron_itt.train")
    world_size = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    config = load_config(checkout / words[position + 1], words[position + 2 :])
    assert find_layout_problems(config, world_size) == []


def test_the_python_example_of_the_readme_works(finished: str, checkout: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [example] = [text for text in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "generate" in text]
    assert "class Router:" in run(checkout, sys.executable, "-c", example).stdout


def test_the_python_example_of_the_readme_runs(finished: str, checkout: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [example] = [text for text in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "load_recipe" in text]
    assert len(example.splitlines()) <= 10
    done = run(checkout, sys.executable, "-c", example)
    assert "TFLOPs 8 layers" in done.stdout
    assert (checkout / "runs/again/hf/model.safetensors").is_file()

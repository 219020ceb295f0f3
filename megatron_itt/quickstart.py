"""Quickstart: text, data, training, export, evaluation and report on one machine, by the commands of a user.

Each stage is one command. A finished stage is skipped; one whose command, recipe or inputs changed runs again with all
that follow; an interrupted one resumes. Run it with `make quickstart`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("runs/quickstart")
RECIPE = "recipes/debug/quickstart.yaml"
DOMAINS = ("code", "docs")
BUDGETS = ("0.1,0.1,0.1", "0.5,0.5,0.5", "0.7,0.7,0.7", "1.0,1.0,1.0")
_STATE_FILE = "stages.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A command, the path that exists when it is done (None: run every time), and all paths that it writes."""

    name: str
    command: tuple[str, ...]
    done: Path | None
    writes: tuple[Path, ...]
    reads: tuple[str, ...] = ()  # small files whose text is part of the command


def stages(root: Path = ROOT, recipe: str = RECIPE) -> list[Stage]:
    """Return the stages in order. Paths are relative to the repository's root."""
    return [*_data_stages(root), _training_stage(root, recipe), *_result_stages(root, recipe)]


def _data_stages(root: Path) -> list[Stage]:
    """Text, tokenizer, and one indexed dataset per domain."""
    corpus, tokenizer, data = root / "corpus", root / "tokenizer", root / "data"
    return [
        _itt("sample corpus", "download sample", "--output", corpus, writes=[corpus], done=corpus / "docs"),
        _itt(
            *("tokenizer", "tokenizer", "--input", corpus, "--vocab-size", 4096, "--output", tokenizer),
            writes=[tokenizer],
            done=tokenizer / "tokenizer.json",
        ),
        *[
            _itt(
                *(f"index {domain}", "preprocess", "--input", corpus / domain, "--tokenizer", tokenizer),
                *("--output-prefix", data / domain, "--workers", 2),
                writes=[data / f"{domain}{suffix}" for suffix in (".bin", ".idx", ".json")],
                done=data / f"{domain}.json",
            )
            for domain in DOMAINS
        ],
    ]


def _training_stage(root: Path, recipe: str) -> Stage:
    run_files = [
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        "finished",
        "recipe.yaml",
        "environment.json",
        "log.txt",
    ]
    return Stage(
        name="train",
        command=(
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "megatron_itt.train", recipe),
        ),
        done=root / "finished",
        writes=tuple(root / name for name in run_files),
        reads=(recipe, "recipes/debug/itt_tiny.yaml"),
    )


def _result_stages(root: Path, recipe: str) -> list[Stage]:
    """Export, evaluation on held-out text, report page and a continuation."""
    heldout, export, evaluation = root / "heldout", root / "hf", root / "evaluation"
    texts = [f"{domain}={heldout / domain}.jsonl.zst" for domain in DOMAINS]
    report = root / "report.html"
    return [
        _itt("export", "export", "--checkpoint", root, "--output", export, writes=[export], done=export),
        _itt(
            *("held-out text", "recipe heldout", recipe, "--output", heldout),
            writes=[heldout],
            done=heldout / f"{DOMAINS[-1]}.jsonl.zst",
        ),
        _itt(
            *("evaluate", "evaluate", "--model", export, "--task-dir", root / "tasks", "--heldout-records", 60),
            *(part for text in texts for part in ("--heldout", text)),
            *(part for budget in BUDGETS for part in ("--budget", budget)),
            *("--perplexity-max-tokens", 4096, "--output", evaluation),
            writes=[evaluation, root / "tasks"],
            done=evaluation / "results.json",
        ),
        _itt(
            *("report", "report", "--run", root, "--export", export, "--evaluation", evaluation / "results.json"),
            *("--text", heldout / "docs.jsonl.zst", "--output", report),
            writes=[report],
            done=report,
        ),
        _itt(
            *("generate", "generate", "--model", export, "--prompt", "def main(", "--max-new-tokens", 40),
            writes=[],
            done=None,
        ),
    ]


def run_stages(todo: Sequence[Stage], root: Path = ROOT) -> int:
    """Run the unfinished stages; return the exit code of the first command that fails, else 0."""
    root.mkdir(parents=True, exist_ok=True)
    state_file = root / _STATE_FILE
    state: dict[str, str] = json.loads(state_file.read_text("utf-8")) if state_file.exists() else {}
    chain = ""
    for position, stage in enumerate(todo, start=1):
        chain = _fingerprint(stage, chain)
        heading = f"[{position}/{len(todo)}] {stage.name}"
        if state.get(stage.name) != chain:
            _remove(stage.writes)
            state[stage.name] = chain
            state_file.write_text(json.dumps(state, indent=2), encoding="utf-8")
        elif stage.done is not None and stage.done.exists():
            print(f"{heading}: done", flush=True)
            continue
        print(f"{heading}: {_shown(stage.command)}", flush=True)
        started = time.monotonic()
        code = subprocess.run(stage.command, check=False).returncode
        if code != 0:
            print(f"{heading}: failed with exit code {code}; make quickstart continues from here", file=sys.stderr)
            return code
        print(f"{heading}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _itt(name: str, words: str, *arguments: object, writes: list[Path], done: Path | None) -> Stage:
    command = (sys.executable, "-m", "megatron_itt.cli", *words.split(), *(str(argument) for argument in arguments))
    return Stage(name=name, command=command, done=done, writes=tuple(writes))


def _fingerprint(stage: Stage, before: str) -> str:
    texts = [Path(path).read_text("utf-8") for path in stage.reads]
    return hashlib.sha256(json.dumps([before, stage.command[1:], texts]).encode()).hexdigest()


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _shown(command: Sequence[str]) -> str:
    return (
        shlex.join(["python", *command[1:]])
        .replace("python -m megatron_itt.cli", "itt")
        .replace("python -m torch.distributed.run", "torchrun")
    )

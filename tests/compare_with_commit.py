"""Compare this tree with another commit, bit for bit: preprocessed files, losses, checkpoints' exports.

Run `python tests/compare_with_commit.py COMMIT [--keep DIR]` before a change that claims to keep the numbers is merged.
Both trees run the same commands on the same text; the exit code is 1 where any digest or loss differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = Path("runs/quickstart")
# Recipe, processes and overrides of each short training run.
RUNS = {
    "itt_tiny": ("itt_tiny", 1, []),
    "itt_tiny_accumulation_bf16": ("itt_tiny", 1, ["batch.micro=4", "precision.dtype=bf16"]),
    "itt_tiny_top_p": (
        "itt_tiny",
        1,
        ["thinking.routing=topp", "thinking.capacity=[0.3,0.3]", "validation.budgets=[]"],
    ),
    "itt_tiny_switches": (
        "itt_tiny",
        1,
        ["thinking.attend=selected", "thinking.update=delta", "thinking.skip=literal"],
    ),
    "itt_tiny_pipeline": ("itt_tiny", 2, ["parallel.pipeline=2"]),
    "llama_tiny": ("llama_tiny", 1, []),
    "loop_tiny": ("loop_tiny", 1, []),
    "quickstart": ("quickstart", 2, []),
}
STEPS = ("schedule.steps=6", "schedule.warmup_steps=2", "validation.interval_steps=3", "validation.tokens=8192")
EXACT_METRICS = ("step", "loss", "grad_norm", "learning_rate", "validation", "router", "routing")


def run_tree(tree: Path, folder: Path) -> dict[str, object]:
    """Preprocess, train and export with the code of `tree`; return every digest and exact metric by name."""
    itt = (sys.executable, "-m", "megatron_itt.cli")

    def run(*command: object) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, text=True, capture_output=True
        )
        if done.returncode != 0:
            raise SystemExit(
                f"{tree}: {' '.join(str(part) for part in command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )

    results: dict[str, object] = {}
    run(*itt, "download", "sample", "--output", LINE / "corpus")
    run(*itt, "tokenizer", "--input", LINE / "corpus", "--vocab-size", 4096, "--output", LINE / "tokenizer")
    results["tokenizer.json"] = digest(folder / LINE / "tokenizer" / "tokenizer.json")
    for domain in ("code", "docs"):
        prefix = LINE / "data" / domain
        arguments = ("--input", LINE / "corpus" / domain, "--tokenizer", LINE / "tokenizer", "--output-prefix", prefix)
        run(*itt, "preprocess", *arguments, "--workers", 2)
        for suffix in (".bin", ".idx"):
            results[f"{domain}{suffix}"] = digest(folder / f"{prefix}{suffix}")
    for name, (recipe, num_processes, overrides) in RUNS.items():
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes)
        command = (sys.executable, *(launcher if num_processes > 1 else ()), "-m", "megatron_itt.train")
        run(*command, tree / f"recipes/debug/{recipe}.yaml", *STEPS, *overrides, f"logging.run_dir=runs/{name}/run")
        lines = (folder / f"runs/{name}/run/metrics.jsonl").read_text("utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        results[f"{name}: metrics"] = [{key: entry[key] for key in EXACT_METRICS if key in entry} for entry in entries]
        run(*itt, "export", "--checkpoint", f"runs/{name}/run", "--output", f"runs/{name}/hf")
        results[f"{name}: model.safetensors"] = digest(folder / f"runs/{name}/hf/model.safetensors")
        results[f"{name}: config.json"] = json.loads((folder / f"runs/{name}/hf/config.json").read_text("utf-8"))
    return results


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with, such as HEAD~1 or a tag")
    parser.add_argument("--keep", type=Path, help="keep the results of COMMIT here, and use them if they are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tree, folders = Path(scratch) / "tree", (Path(scratch) / "before", Path(scratch) / "after")
        kept = arguments.keep and arguments.keep / "results.json"
        if kept and kept.is_file():
            before = json.loads(kept.read_text("utf-8"))
        else:
            subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, arguments.commit], cwd=ROOT, check=True)
            try:
                folders[0].mkdir()
                before = json.loads(json.dumps(run_tree(tree, folders[0])))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(before, indent=1), encoding="utf-8")
        folders[1].mkdir()
        after = json.loads(json.dumps(run_tree(ROOT, folders[1])))
    for name in sorted({*before, *after}):
        print(f"{'same' if before.get(name) == after.get(name) else 'DIFFERS':8}{name}")
        if before.get(name) != after.get(name):
            print(f"  before: {str(before.get(name))[:2000]}\n  after:  {str(after.get(name))[:2000]}")
    return 0 if before == after else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The launcher without a cluster: dry runs, runs on this machine, bad input, and the decision after a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT
from tests.helpers.small_disk import small_disk

JOB_FILES = sorted((ROOT / "slurm").rglob("*.sbatch"))
SIZES = {"162m": 1, "230m": 1, "466m": 2}  # nodes
NODES = {f"{size}/{kind}": SIZES[size] for size in SIZES for kind in ("llama", "loop_x4", "itt_x4")}
NODES |= {f"scale/{size}_{kind}": nodes for size, nodes in (("1b3", 4), ("7b", 8)) for kind in ("llama", "itt_x4")}


def launch(job_file: str, *arguments: str, settings: dict[str, str], cwd: Path = ROOT) -> tuple[int, str, str]:
    """Run a job file under bash, outside of any job."""
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / job_file), *arguments],
        env=outside_a_job(settings),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def outside_a_job(settings: dict[str, str]) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}, **settings}


@pytest.mark.parametrize("name", [*NODES, None])
def test_every_training_job_shows_what_it_will_do(name: str | None, settings: dict[str, str]) -> None:
    job = ("itt_466m_x4.sbatch",) if name is None else ("train.sbatch", f"recipes/{name}.yaml")
    code, text, error = launch(*job, "--dry-run", settings=settings)
    assert code == 0, error
    for line in ("run folder", "nodes", "layout", "model", "training", "memory", "speed", "time", "job", "software"):
        assert re.search(rf"^{line} +\S", text, flags=re.MULTILINE), f"{line} is missing from\n{text}"
    nodes = NODES[name or "466m/itt_x4"]
    assert f"{nodes} x 8 tasks = {8 * nodes} ranks" in text
    assert "days" in text
    assert "GPU-hours" in text


def test_the_nodes_of_a_command_line_come_before_those_of_the_recipe(settings: dict[str, str]) -> None:
    code, text, error = launch("train.sbatch", "466m/itt_x4", "--dry-run", settings=settings)
    assert code == 0 and "2 x 8 tasks" in text, error
    code, text, error = launch("train.sbatch", "466m/itt_x4", "--dry-run", "--nodes=4", settings=settings)
    assert code == 0 and "4 x 8 tasks" in text, error


@pytest.mark.parametrize("job_file", JOB_FILES, ids=[path.stem for path in JOB_FILES])
def test_a_job_file_is_short_and_asks_for_what_the_life_cycle_needs(job_file: Path) -> None:
    text = job_file.read_text()
    assert len(text.splitlines()) <= 18
    for line in ("--open-mode=append", "--signal=B:USR1@", "--requeue"):
        assert f"#SBATCH {line}" in text


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    scripts = [
        str(path.relative_to(ROOT)) for folder in ("slurm", "docker", "tools") for path in (ROOT / folder).glob("*.sh")
    ]
    scripts += [str(path.relative_to(ROOT)) for path in JOB_FILES]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_takes_nodes_and_overrides(settings: dict[str, str]) -> None:
    code, text, error = launch("itt_466m_x4.sbatch", "--dry-run", "--nodes=4", "batch.micro=2", settings=settings)
    assert code == 0, error
    assert "4 x 8 tasks = 32 ranks" in text
    assert "1 tensor x 1 pipeline x 32 data, 4 micro-batches of 2" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dry-run", "schedule.stepz=3"], "did you mean schedule.steps?"),
        (["--dry-run", "--nodes=3"], "3 node(s) x 8 task(s) = 24 processes do not fit the recipe"),
        (["--dryrun"], "unknown option --dryrun"),
        (["steps"], "argument steps must look like section.key=value"),
        (["--nodes=2"], "--nodes and --gpus-per-node are for --dry-run"),
        (["--dry-run", "--nodes=two"], "--nodes is two"),
        (["--chain=0"], "--chain is 0"),
        (["--submit"], "cluster.env is missing"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], expected: str, tmp_path: Path, settings: dict[str, str]
) -> None:
    if arguments == ["--submit"]:
        settings["ITT_CLUSTER_ENV"] = str(tmp_path / "absent" / "cluster.env")
    code, _, error = launch("itt_466m_x4.sbatch", *arguments, settings=settings)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ITT_CONTIANER_IMAGE=/a.sqsh", "ITT_CONTIANER_IMAGE, which is no setting"),
        ("ITT_PYTHON=/absent/python", "ITT_PYTHON is /absent/python, which does not run here"),
        ("ITT_DATA_ROOT=/absent", "ITT_DATA_ROOT is /absent, which is not a folder here"),
        ("ITT_MODULES=absent/1", "ITT_MODULES is absent/1, but this host has no module command"),
        ("ITT_MAX_RESTARTS=many", "ITT_MAX_RESTARTS is many"),
        ("ITT_STRAGGLER_S=0", "ITT_STRAGGLER_S is 0"),
        ("ITT_ASSUMED_MFU=35", "the assumed MFU is 35"),
    ],
)
def test_a_stale_cluster_file_is_refused(line: str, expected: str, settings: dict[str, str]) -> None:
    if "MODULES" in line and shutil.which("modulecmd"):
        pytest.skip("this machine has environment modules")
    with Path(settings["ITT_CLUSTER_ENV"]).open("a") as file:
        file.write(line + "\n")
    code, _, error = launch("itt_466m_x4.sbatch", "--dry-run", settings=settings)
    assert code == 2
    assert error.count("\n") == 1
    assert expected in error


def test_the_example_of_a_cluster_file_names_every_setting() -> None:
    known = set(re.findall(r"ITT_[A-Z_0-9]+", (ROOT / "slurm" / "cluster.sh").read_text().split('"')[1]))
    example = (ROOT / "slurm" / "cluster.env.example").read_text()
    assert known == set(re.findall(r"^#(ITT_[A-Z_0-9]+)=", example, flags=re.MULTILINE))


def test_this_machine_trains_stops_at_a_signal_and_continues(
    recipe: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    command = ["bash", str(ROOT / "slurm" / "train.sbatch"), str(recipe), "schedule.steps=12", "parallel.tensor=2"]
    process = subprocess.Popen(command, env=outside_a_job(settings), stdout=subprocess.PIPE, text=True)
    wait_for_step(run_dir, 4, process)
    assert (run_dir / "in_use").is_file()
    code, _, error = launch(*command[1:], settings=settings)
    assert code == 2
    assert "is in use by process" in error
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the second changes nothing
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "the same command continues" in text
    assert not (run_dir / "finished").exists()
    code, _, error = launch(*command[1:], "optimizer.learning_rate=0.5", settings=settings)
    assert code == 2
    assert "optimizer.learning_rate was 0.01 and is now 0.5" in error
    code, text, error = launch(*command[1:], settings=settings)
    assert code == 0, error
    assert "resumed from" in text
    assert (run_dir / "finished").is_file()
    assert re.search(r"memory: \d+\.\d\d GiB at most on a rank, \d+\.\d\d GiB estimated", text), text
    assert not (run_dir / "in_use").exists()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    last = next(line for line in lines if line["step"] == 12 and "loss" in line)
    assert last["memory_estimate_bytes"] > 2**27  # of so small a model, most is the program, which both count
    assert 0.5 < last["memory_bytes"] / last["memory_estimate_bytes"] < 2.0
    code, text, _ = launch(*command[1:], settings=settings)
    assert code == 0
    assert "is finished already" in text


def test_a_folder_in_use_keeps_the_recipe_of_its_owner(recipe: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0
    (run_dir / "finished").unlink()
    (run_dir / "in_use").write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    longer = ("schedule.steps=3", "--allow-changed=schedule")
    code, _, error = launch("train.sbatch", str(recipe), *longer, settings=settings)
    assert code == 2
    assert "is in use by process" in error
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_change_that_the_training_refuses_is_undone(recipe: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0
    (run_dir / "finished").unlink()
    kept = (run_dir / "code" / "recipe.yaml").read_bytes()
    wider = ("schedule.steps=2", "model.ffn_hidden_size=80", "--allow-changed=model")
    code, text, error = launch("train.sbatch", str(recipe), *wider, settings=settings)
    assert code == 2, text + error
    assert "does not fit this recipe: model.ffn_hidden_size was" in (run_dir / "stopped").read_text()
    assert (run_dir / "code" / "recipe.yaml").read_bytes() == kept
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0
    assert (run_dir / "finished").is_file()


def test_a_finished_run_goes_on_when_more_steps_are_allowed(
    recipe: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0
    code, _, error = launch("train.sbatch", str(recipe), "schedule.steps=3", settings=settings)
    assert code == 2 and "--allow-changed=schedule.steps" in error
    assert (run_dir / "finished").read_text() == "2\n"
    longer = ("schedule.steps=3", "--allow-changed=schedule.steps")
    code, text, error = launch("train.sbatch", str(recipe), *longer, settings=settings)
    assert code == 0, text + error
    assert (run_dir / "finished").read_text() == "3\n"


def test_a_damaged_snapshot_is_not_used(recipe: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0
    (run_dir / "finished").unlink()
    (run_dir / "code" / "megatron_itt" / "errors.py").unlink()
    code, _, error = launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)
    assert code == 2
    assert "code is damaged: megatron_itt/errors.py is missing; remove it" in error
    shutil.rmtree(run_dir / "code")
    assert launch("train.sbatch", str(recipe), "schedule.steps=2", settings=settings)[0] == 0


def test_missing_data_stops_a_run_for_good(recipe: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    lost = "data.blend.code.path=data/lost"
    code, text, error = launch("train.sbatch", str(recipe), lost, "parallel.tensor=2", settings=settings)
    assert code == 2, text + error
    assert "data/lost" in error
    assert "Traceback" not in error
    assert "data/lost" in (tmp_path / "runs" / "tiny" / "stopped").read_text()
    assert "stopped for good" in text


@pytest.mark.slow
def test_a_change_that_is_allowed_reaches_the_training(recipe: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    run_dir, longer = tmp_path / "runs" / "tiny", "schedule.steps=6"
    assert launch("train.sbatch", str(recipe), "schedule.steps=3", settings=settings)[0] == 0
    (run_dir / "finished").unlink()
    code, _, error = launch("train.sbatch", str(recipe), longer, settings=settings)
    assert code == 2
    assert "schedule.steps was 3 and is now 6" in error
    assert "--allow-changed=schedule.steps" in error
    code, text, error = launch("train.sbatch", str(recipe), longer, "--allow-changed=schedule", settings=settings)
    assert code == 0, text + error
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_more_room_continues(
    recipe: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    arguments = [str(recipe), "schedule.steps=60", "checkpoint.save_interval_steps=1", "checkpoint.keep_last=60"]
    with small_disk(tmp_path / "runs", "9m") as disk:
        run_dir = disk.path / "tiny"
        code, text, error = launch("train.sbatch", *arguments, settings=settings)
        assert code == 2, text + error
        assert "no space left" in error
        assert "no space left" in (run_dir / "stopped").read_text()
        disk.resize("99m")
        code, text, error = launch("train.sbatch", *arguments, settings=settings)
        assert code == 0, text + error
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))


@pytest.mark.slow
def test_a_run_is_exported_and_evaluated(recipe: Path, data: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    lengths = ["schedule.steps=2", "checkpoint.save_interval_steps=1"]
    assert launch("train.sbatch", str(recipe), *lengths, settings=settings)[0] == 0
    arguments = ["runs/tiny", "--heldout", f"code={data / 'code.jsonl'}", "--perplexity-max-tokens", "200"]
    code, text, error = launch("evaluate.sbatch", *arguments, settings=settings)
    assert code == 0, text + error
    results = tmp_path / "runs" / "tiny" / "evaluation"
    assert (tmp_path / "runs" / "tiny" / "export" / "step_0000002" / "config.json").is_file()
    assert [path.name for path in results.iterdir()] == ["step_0000002"]
    before = (results / "step_0000002" / "results.json").stat().st_mtime_ns
    code, text, error = launch("evaluate.sbatch", *arguments, "--checkpoints=all", settings=settings)
    assert code == 0, text + error
    assert (results / "step_0000001" / "results.json").is_file()
    assert (results / "step_0000002" / "results.json").stat().st_mtime_ns == before


def test_an_evaluation_without_a_checkpoint_is_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    code, _, error = launch("evaluate.sbatch", str(tmp_path), settings=settings)
    assert code == 2
    assert "has no checkpoint" in error
    named = launch("evaluate.sbatch", str(tmp_path), "--checkpoints=step_7", settings=settings)
    assert named[0] == 2 and "step_7 is no checkpoint" in named[2]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text():
            return
        time.sleep(0.1)
    process.kill()  # its ranks end with it
    raise AssertionError(f"step {step} was not reached")


def test_an_old_start_that_comes_back_leaves_the_run_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "in_use").write_text("job 12 start 1\n")
    (tmp_path / "diverged").write_text("not this start's to act upon\n")
    script = (
        f"source {ROOT}/slurm/launch.sh; run_dir={tmp_path} claim='job 12 start 0' first_checkpoint=none; "
        "SLURM_JOB_ID=12; scontrol() { echo asked >&2; }; trap release_run_folder EXIT; finish_job 1"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has been taken over by job 12 start 1" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "in_use").read_text() == "job 12 start 1\n"
    assert not (tmp_path / "stopped").exists()


def test_only_the_newest_start_of_a_job_queues_it_again() -> None:
    answers = {"0": "scontrol requeue 12", "1": ""}
    for started, expected in answers.items():
        script = (
            f"source {ROOT}/slurm/launch.sh; SLURM_JOB_ID=12 SLURM_RESTART_COUNT={started}; timeout() {{ shift; "
            '"$@"; }; scontrol() { [[ $1 = requeue ]] && echo "scontrol $*" || echo "JobId=12 Restarts=0 x=y"; }; '
            "queue_again"
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == expected
        assert (done.returncode == 0) == bool(expected)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"files": ["finished"]}, "done"),
        ({}, "again"),
        ({"files": ["refused"]}, "stop"),
        ({"files": ["diverged"]}, "stop"),
        ({"stuck": 3}, "stuck"),
        ({"stuck": 3, "latest": "step_0000009"}, "again"),
        ({"cancelled": "yes"}, "cancelled"),
        ({"files": ["diverged"], "cancelled": "yes"}, "stop"),
        ({"files": ["finished"], "cancelled": "yes"}, "done"),
    ],
)
def test_what_follows_a_run_is_decided_by_its_folder(state: dict[str, object], expected: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(f"{state.get('latest', 'step_0000005')}\n")
    for name in state.get("files", ()):  # type: ignore[attr-defined]
        (tmp_path / name).touch()
    script = (
        f"source {ROOT}/slurm/launch.sh; run_dir={tmp_path}; first_checkpoint=step_0000005; ITT_MAX_RESTARTS=3; "
        f"num_stuck={state.get('stuck', 0)}; cancelled={state.get('cancelled', '')}; next_action"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected

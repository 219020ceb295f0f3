"""The ladder's queue: what every run trains, in which order, and how the queue starts, stops and resumes runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.cli import run
from megatron_itt.config import RunConfig, load_config
from megatron_itt.errors import ConfigError
from megatron_itt.study import Job, LadderPlan, run_queue


def configs(plan: LadderPlan) -> dict[str, RunConfig]:
    """Recipes of the queue by run folder, in order."""
    return {
        str(job.run_dir.relative_to(plan.root)): load_config(job.command[3], job.command[4:]) for job in plan.jobs()
    }


def flops_of(config: RunConfig) -> float:
    tokens = config.schedule.steps * config.tokens_per_step
    return tokens * forward_flops(config.model, config.thinking).total / config.model.seq_length


def test_short_horizons_come_first_and_within_them_small_models() -> None:
    order = list(configs(LadderPlan(seeds=2, variants=("llama", "loop_x2", "itt_x4"))))
    main = [name for name in order if "/loop" not in name]
    assert order[: len(main)] == main, "loops come last"
    assert main[0] == "0.02M/itt_x4/seed_1/20"
    places = [
        main.index(f"{size}/llama/seed_{seed}/{hor}")
        for hor in (20, 320)
        for size in ("0.02M", "0.05M")
        for seed in (1, 2)
    ]
    assert places == sorted(places)


def test_every_horizon_branches_from_the_stable_checkpoint_of_the_one_before() -> None:
    plan = LadderPlan(seeds=1, variants=("llama", "itt_x2"), sizes=("0.02M",))
    runs = configs(plan)
    for job in plan.jobs():
        own = runs[str(job.run_dir.relative_to(plan.root))]
        assert own.checkpoint.keep_steps == (own.schedule.steps - (own.schedule.decay_steps or 0),)
        assert (job.after is None) == (own.checkpoint.branch_from is None)
        if job.after is not None and own.checkpoint.branch_from is not None:
            before = runs[str(job.after.relative_to(plan.root))]
            assert (
                Path(own.checkpoint.branch_from)
                == job.after / f"checkpoints/step_{before.checkpoint.keep_steps[0]:07d}"
            )
            assert before.checkpoint.keep_steps < own.checkpoint.keep_steps
    assert len({own.schedule.trunk_steps for own in runs.values()}) == 1, "the text has one order"


def test_baselines_have_equal_flops() -> None:
    runs = configs(LadderPlan(seeds=1, sizes=("0.05M",), horizons=(80,)))
    for thinking in ("itt_x2", "itt_x4"):
        more_tokens = runs[f"0.05M/llama/seed_1/80_as_{thinking}"]
        assert flops_of(more_tokens) == pytest.approx(flops_of(runs[f"0.05M/{thinking}/seed_1/80"]), rel=0.002)
        assert more_tokens.model == runs["0.05M/llama/seed_1/80"].model
    wide, own = runs["0.05M/llama_wide/seed_1/80"], runs["0.05M/itt_x4/seed_1/80"]
    assert wide.schedule.steps == own.schedule.steps
    assert flops_of(wide) == pytest.approx(flops_of(own), rel=0.06)


def test_sizes_and_variants_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"size 1B is not one of the ladder; known: 0\.02M"):
        LadderPlan(sizes=("1B",)).jobs()
    with pytest.raises(ConfigError, match="variant lama is not"):
        LadderPlan(variants=("lama",)).jobs()
    with pytest.raises(ConfigError, match="exclude each other"):
        run(["study", "ladder", "--minutes", "1", "--gpu-minutes", "1"])


def job(folder: Path, script: str, after: Path | None = None) -> Job:
    return Job(variant=folder.name, seed=1, run_dir=folder, command=(sys.executable, "-c", script), after=after)


def finishing(folder: Path) -> str:
    return f"open({str(folder / 'finished')!r}, 'w').write('1')"


def test_a_run_waits_for_the_one_it_branches_from_and_is_left_out_if_that_fails(tmp_path: Path) -> None:
    first, second, failing, behind = (tmp_path / name for name in ("first", "second", "failing", "behind"))
    order = f"import os; assert os.path.exists({str(first / 'finished')!r}); "
    states = run_queue(
        [
            job(second, order + finishing(second), after=first),
            job(first, finishing(first)),
            job(failing, "raise SystemExit(1)"),
            job(behind, finishing(behind), after=failing),
        ],
        num_parallel=4,
    )
    assert states == {"finished": 2, "waiting": 2}
    assert not behind.exists()


def test_at_its_time_limit_the_queue_asks_its_runs_to_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saving = (
        "import os, signal, sys, time; "
        f"save = lambda *_: (os.mkdir({str(folder / 'checkpoints')!r}), sys.exit(0)); "
        "signal.signal(signal.SIGTERM, save); time.sleep(60)"
    )
    assert run_queue([job(folder, saving)], minutes=2.5 / 60) == {"interrupted": 1}


def test_the_listed_commands_are_stock_training_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "ladder", "--sizes", "0.02M", "--seeds", "1", "--horizons", "20", "--list"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    assert all(line[1:3] == ["-m", "megatron_itt.train"] for line in lines)

"""Phases of the data: other weights from some token on, with every domain's position carried across."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_itt.commands.recipe import COMMAND
from megatron_itt.config.load import config_to_yaml
from megatron_itt.data.batches.blend import resolve_blend
from megatron_itt.data.batches.datasets import build_datasets
from megatron_itt.data.batches.loader import TrainLoader
from megatron_itt.data.text.tokenizer import Tokenizer
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe

# Of a run of 20 steps of 8 samples of 32 tokens = 5,120 tokens: phases of 50, 60 and 50 samples.
PHASES: list[dict[str, Any]] = [
    {"until_tokens": 1600, "weights": {"code": 0.9, "docs": 0.1}},
    {"until_tokens": "3.52k", "weights": {"docs": 1.0}},
    {"weights": {"docs": 1, "code": 1, "rare": 2}},
]


@pytest.fixture
def make(write_dataset: Callable[..., str], make_config: Any) -> Callable[..., Any]:
    """A recipe on three domains; `rare` is in the last phase alone."""
    domains = {
        "code": (write_dataset("code", seed=1), 0.75),
        "docs": (write_dataset("docs", seed=2), 0.25),
        "rare": (write_dataset("rare", seed=3, count=40), 0.0),
    }

    def made(phases: Any = PHASES, **changes: Any) -> Any:
        return make_config(domains, **{"steps": 20, "validation_tokens": 100, "phases": phases, **changes})

    return made


def tokens_of(dataset: Any, begin: int = 0, end: int = 160) -> torch.Tensor:
    return torch.stack([dataset[idx]["tokens"] for idx in range(begin, end)])


def test_every_phase_has_its_weights_and_continues_each_domain(make: Any, tokenizer: Tokenizer) -> None:
    train: Any = build_datasets(make(), tokenizer=tokenizer).train
    assert len(train) == 160
    numbers = np.array([train[idx]["dataset_id"] for idx in range(160)])
    counts = [np.bincount(part, minlength=3).tolist() for part in np.split(numbers, [50, 110])]
    assert np.abs(np.array(counts) - [[45, 5, 0], [0, 60, 0], [12.5, 12.5, 25]]).max() <= 0.5
    for number, dataset in enumerate(train.datasets):
        own = np.flatnonzero(numbers == number)
        for position, idx in enumerate(own):  # no sample of a domain is skipped or repeated at a border
            assert torch.equal(train[idx]["tokens"], dataset[position]["tokens"])


def test_one_phase_of_the_blends_weights_is_a_run_without_phases(make: Any, tokenizer: Tokenizer) -> None:
    plain, one = make([]), make([{"until_tokens": 5120}])
    assert resolve_blend(plain).fingerprint == resolve_blend(one).fingerprint
    first, second = (build_datasets(config, tokenizer=tokenizer).train for config in (plain, one))
    assert torch.equal(tokens_of(first), tokens_of(second))


@pytest.mark.parametrize("consumed", [0, 24, 48, 88, 152])
def test_a_resumed_run_reads_the_same_samples_under_any_data_parallel_size(
    make: Any, tokenizer: Tokenizer, consumed: int
) -> None:
    """Steps 7 and 14 read from two phases."""
    train: Any = build_datasets(make(), tokenizer=tokenizer).train
    for size, micro in ((1, 8), (2, 2), (4, 1)):
        step: list[list[torch.Tensor]] = []
        for rank in range(size):
            layout = {"micro_batch_size": micro, "data_parallel_rank": rank, "data_parallel_size": size}
            with TrainLoader(
                train, consumed_samples=consumed, num_microbatches=8 // (micro * size), **layout
            ) as loader:
                step.append([next(loader)["tokens"] for _ in range(8 // (micro * size))])
        found = torch.cat([batch for batches in zip(*step, strict=True) for batch in batches])
        assert torch.equal(found, tokens_of(train, consumed, consumed + 8))


def test_validation_does_not_depend_on_phases(make: Any, tokenizer: Tokenizer) -> None:
    phased, plain = (build_datasets(make(phases), tokenizer=tokenizer).validation for phases in (PHASES, []))
    for name, dataset in plain.items():
        other: Any = phased[name]
        assert torch.equal(tokens_of(dataset, 0, len(other)), tokens_of(other, 0, len(other)))


def test_the_table_shows_tokens_and_epochs_of_every_domain_and_phase(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend = resolve_blend(make())
    rows = [line.split() for line in blend.table().split("\n\n")[1].splitlines()]
    assert rows[0] == ["phase", "until", "tokens", "domain", "weight", "tokens", "epochs"]
    assert len(rows) == 1 + 2 + 1 + 3
    epochs = 13 * 32 / blend.domains[0].training_tokens
    assert rows[4] == ["3", "5,120", "code", "0.2500", "416", f"{epochs:.2f}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_to_yaml(make()))
    COMMAND["show"](recipe=str(recipe)).execute()
    assert "#     3         5,120  code    0.2500     416" in capsys.readouterr().out


def test_max_epochs_holds_over_all_phases(make: Any) -> None:
    phases = [PHASES[0], {"weights": {"docs": 1}}]
    docs = resolve_blend(make(phases)).domains[1]
    assert docs.tokens_needed == (5 + 110) * 32
    resolve_blend(make(phases, max_epochs=docs.epochs + 1e-6))
    with pytest.raises(ConfigError, match=r"domain docs would be read .*\(3,680 tokens needed"):
        resolve_blend(make(phases, max_epochs=docs.epochs - 1e-6))


def test_the_fingerprint_follows_phases_up_to_the_length_of_the_run(make: Any) -> None:
    plain, phased = resolve_blend(make([{"weights": {"code": 1}}])), resolve_blend(make())
    moved = [{**PHASES[0], "until_tokens": 1632}, *PHASES[1:]]
    reweighted = [*PHASES[:2], {"weights": {"docs": 1, "code": 1, "rare": 3}}]
    assert len({each.fingerprint for each in (plain, phased, *map(resolve_blend, map(make, (moved, reweighted))))}) == 4
    longer = resolve_blend(
        make([*PHASES[:2], {**PHASES[2], "until_tokens": 5120}, PHASES[0] | {"until_tokens": None}], steps=25)
    )
    assert longer.fingerprint_at(160) == phased.fingerprint  # a finished run may train on with a phase more


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"until_tokens": 9}, {}], r"phases\[0\]\.until_tokens is 9, but the phase begins at 0; order phases"),
        ([{"until_tokens": 3200}, {"until_tokens": 1600}, {}], r"\[1\]\.until_tokens is 1,600, but .* begins at 3,200"),
        ([{"until_tokens": 5120}, {}], r"phases\[0\]\.until_tokens is 5,120, past the 5,120 tokens of the run"),
        ([{"until_tokens": "1B"}], r"until_tokens is 1,000,000,000, past the 5,120 tokens .*; lower it or lengthen"),
        ([{"until_tokens": 4864}], r"until_tokens is 4,864, before the 5,120 tokens of .*; raise it, or give null"),
        ([{}, {}], r"phases\[0\]\.until_tokens is null, which is for the last phase"),
        ([{"weights": {"code": 1, "cdoe": 1}}], r"phases\[0\]\.weights names cdoe; domains of data\.blend: code, docs"),
        ([{"weights": {"code": 0, "docs": 0}}], r"phases\[0\]\.weights has no positive weight; give one"),
        ([{"weights": {}}], r"phases\[0\]\.weights has no positive weight; give one"),
        ([{"weights": {"code": "much"}}], r'data\.phases\.0\.weights\.code is "much": input should be a valid number'),
        ([{"weights": {"code": -1}}], r"data\.phases\.0\.weights\.code is -1: input should be greater than or"),
        ([{"until_tokens": "40Q"}], r'data\.phases\.0\.until_tokens is "40Q": give a positive number of tokens'),
        ([{"until_token": 40}], r"unknown key data\.phases\.0\.until_token"),
    ],
)  # fmt: skip
def test_phases_that_do_not_divide_the_run_are_named(make: Any, phases: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(phases)
    assert "\n" not in str(caught.value)


def test_a_last_phase_may_end_within_a_step_of_the_run(make: Any) -> None:
    assert [phase.num_samples for phase in resolve_blend(make([{"until_tokens": "5k"}])).phases] == [160]


def test_phases_count_tokens_and_not_steps_of_a_batch_ramp() -> None:
    run = {
        "schedule": {"steps": 8},
        "batch": {"global": 8, "micro": 2, "ramp": {"start": 2, "increment": 2, "samples": 24}},
    }
    phases = [{"until_tokens": 24 * 20, "weights": {"code": 1}}, {"weights": {"docs": 1}}]
    blend = {name: {"path": name, "weight": 1.0} for name in ("code", "docs")}
    config = tiny_recipe(**run, data={"phases": phases, "blend": blend})  # 24 tokens a sample
    assert config.phase_samples() == [20, config.batch.samples_after(8) - 20]
    assert config.num_training_samples < 8 * 8
    with pytest.raises(
        ConfigError, match=r"past the .* tokens of the run \(.*model\.seq_length, less in batch\.ramp\)"
    ):
        tiny_recipe(**run, data={"phases": [{"until_tokens": 24 * 64}], "blend": blend})


def test_a_phase_whose_domains_have_no_data_is_refused(make_config: Any, write_dataset: Any) -> None:
    domains = {"code": (write_dataset("code"), 1.0), "book": (None, 1.0)}
    with pytest.raises(
        ConfigError, match=r"data\.phases\[1\]\.weights has no domain with a path and a positive weight"
    ):
        resolve_blend(make_config(domains, phases=[{"until_tokens": 1280}, {"weights": {"book": 1}}]))

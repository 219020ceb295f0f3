"""List of recipe keys: complete, with the defaults that recipes get."""

from __future__ import annotations

import json

import pytest

from megatron_itt.cli import run
from megatron_itt.config.keys import describe_keys
from megatron_itt.config.load import dump_config
from megatron_itt.errors import ConfigError
from tests.helpers.one_rank import tiny_recipe


def test_every_key_of_a_recipe_is_listed_once_with_its_default() -> None:
    found = {row["key"]: row for row in describe_keys()}
    resolved = {
        f"{section}.{key}": value for section, keys in dump_config(tiny_recipe()).items() for key, value in keys.items()
    }
    assert set(found) == set(resolved)
    assert all(row["type"] for row in found.values())
    assert found["batch.global"]["default"] == "256" and found["schedule.steps"]["default"] == "required"
    assert found["thinking.recompute"]["meaning"] == "activations that the backward pass recomputes"
    assert found["thinking.threshold_phase"]["meaning"].startswith("last part of a run, as a fraction")


def test_keys_are_found_by_name_and_by_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "keys", "Sequence Parallel", "--json"]) == 0
    assert [row["key"] for row in json.loads(capsys.readouterr().out)] == ["parallel.sequence"]
    assert run(["recipe", "keys", "overlap_"]) == 0
    assert "optimizer.overlap_grad_reduce: bool = False  # reduce" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no key or description contains 'lerning'"):
        run(["recipe", "keys", "lerning"])

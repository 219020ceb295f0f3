"""Public API: lazy, complete, and as in the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_itt

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"load_recipe", "train", "preprocess", "export_hf", "import_hf", "evaluate", "ITTConfig", "ITTForCausalLM"}


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_public_name_is_there() -> None:
    assert set(megatron_itt.__all__) == NAMES <= set(dir(megatron_itt))
    assert all(callable(getattr(megatron_itt, name)) for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        megatron_itt.tarin  # noqa: B018


def test_a_recipe_is_costed_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import megatron_itt\n"
        "from megatron_itt.accounting.flops import forward_flops\n"
        "config = megatron_itt.load_recipe('466m/itt_x4', ['schedule.steps=2000'])\n"
        "print(config.schedule.steps, round(forward_flops(config.model, config.thinking).training / 1e12, 2))"
    )
    done = run_code(code)
    assert done.stdout.split() == ["2000", "19.34"], done.stderr


def test_train_is_the_function_also_once_the_command_is_imported() -> None:
    done = run_code(
        "import megatron_itt, megatron_itt.commands.train\n"
        "try: megatron_itt.train('466m/none')\nexcept megatron_itt.errors.ConfigError as error: print(error)"
    )
    assert "recipe 466m/none does not exist" in done.stdout, done.stderr

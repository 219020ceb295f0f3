"""Backend choice: the best usable one, and a clear refusal of an unusable one. The packages are fakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_itt.config.backends import choose_backend
from megatron_itt.config.optional_packages import has_nvidia_gpu
from megatron_itt.errors import ConfigError
from tests.unit.config.test_optional_packages import (
    NVIDIA_APEX,
    PRETEND_GPU,
    WORKING_TRANSFORMER_ENGINE,
    run_python,
)

FUSED_ADAM = "from torch.optim import AdamW\nclass FusedAdam(AdamW): pass\nFusedSGD = None\n"
APEX = {**NVIDIA_APEX, "apex/optimizers/__init__.py": FUSED_ADAM, "amp_C.py": ""}
TRANSFORMER_ENGINE = {**WORKING_TRANSFORMER_ENGINE, "transformer_engine/pytorch/optimizers.py": FUSED_ADAM}


def choose(folder: Path, files: dict[str, str], wanted: str, *, device: str = "auto", has_gpu: bool = True) -> str:
    """What `use_backend` chooses in a fresh interpreter that has these packages, or the error."""
    code = PRETEND_GPU.format(has_gpu=has_gpu) + (
        "from megatron_itt.config.backends import use_backend; from megatron_itt.errors import ConfigError\n"
        f"try:\n    print(use_backend({wanted!r}, device={device!r}))\n"
        "except ConfigError as error:\n    print('refused:', error)"
    )
    folder.mkdir(exist_ok=True)
    done = run_python(folder, files, code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_takes_the_best_that_works_and_says_what_is_missing(tmp_path: Path) -> None:
    both, apex = {**TRANSFORMER_ENGINE, **APEX}, {**APEX}
    assert choose(tmp_path / "both", both, "auto") == "layer and AdamW backend: transformer_engine"
    answer = choose(tmp_path / "apex", apex, "auto")
    assert answer.startswith(
        "layer and AdamW backend: apex; transformer-engine is not used (not installed): layers and "
    )
    answer = choose(tmp_path / "none", {}, "auto")
    assert answer.startswith("layer and AdamW backend: native; transformer-engine is not used (not installed): layers ")
    assert "; apex is not used (not installed): norms, AdamW" in answer


def test_auto_stays_native_on_the_cpu_of_a_gpu_machine(tmp_path: Path) -> None:
    answer = choose(tmp_path, {**TRANSFORMER_ENGINE, **APEX}, "auto", device="cpu")
    assert answer.startswith("layer and AdamW backend: native; transformer-engine is not used (the run is on the CPU)")


@pytest.mark.parametrize(
    ("files", "wanted", "device", "has_gpu", "expected"),
    [
        ({}, "transformer_engine", "auto", True, ["parts is transformer_engine", "not installed", "auto or native"]),
        (TRANSFORMER_ENGINE, "transformer_engine", "auto", False, ["no NVIDIA GPU", "slower on GPUs"]),
        (TRANSFORMER_ENGINE, "transformer_engine", "cpu", True, ["the run is on the CPU", "slower on GPUs"]),
        (NVIDIA_APEX, "apex", "auto", True, ["precision.parts is apex", "import amp_C fails", "which costs: norms"]),
    ],
)
def test_a_required_backend_that_is_unusable_is_refused(
    tmp_path: Path, files: dict[str, str], wanted: str, device: str, has_gpu: bool, expected: list[str]
) -> None:
    answer = choose(tmp_path, files, wanted, device=device, has_gpu=has_gpu)
    assert answer.startswith("refused: precision.parts is ") and "\n" not in answer
    for part in expected:
        assert part in answer


@pytest.mark.parametrize(
    ("wanted", "optimizer"),
    [
        ("transformer_engine", "transformer_engine"),
        ("apex", "apex"),
        ("native", "torch"),
        ("auto", "transformer_engine"),
    ],
)
def test_megatron_core_takes_its_adam_from_the_chosen_package(tmp_path: Path, wanted: str, optimizer: str) -> None:
    amp = "multi_tensor_l2norm = multi_tensor_scale = None\n"
    files = {
        **APEX,
        **TRANSFORMER_ENGINE,
        "amp_C.py": amp,
        "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None\n",
        "transformer_engine/pytorch/optimizers.py": FUSED_ADAM + "multi_tensor_applier = None\n" + amp,
    }
    code = PRETEND_GPU.format(has_gpu=True) + (
        f"from megatron_itt.config.backends import use_backend; use_backend({wanted!r})\n"
        # megatron-core's layers want all of TransformerEngine; its choice of the optimizer is in these lines alone
        "import ast, importlib.util, pathlib\n"
        "place = pathlib.Path(importlib.util.find_spec('megatron.core').origin).parent / 'optimizer/__init__.py'\n"
        "lines = [node for node in ast.parse(place.read_text()).body if isinstance(node, ast.Try)][:1]\n"
        "names = {}\n"
        "exec(compile(ast.Module(lines, []), 'optimizer', 'exec'), {'warnings': __import__('warnings')}, names)\n"
        "print(names['Adam'].__module__.split('.')[0])"
    )
    done = run_python(tmp_path, files, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == optimizer


@pytest.mark.skipif(has_nvidia_gpu(), reason="a backend may be usable here")
def test_a_backend_without_its_package_is_refused() -> None:
    for wanted in ("transformer_engine", "apex"):
        with pytest.raises(ConfigError, match=f"precision.parts is {wanted}"):
            choose_backend(wanted)
    assert choose_backend("auto").name == "native"
    assert choose_backend("native").missing == ()

"""Model, optimizer and states with TransformerEngine's real Python layers on a machine without a GPU.

Its binding to CUDA is replaced, so everything is constructed and nothing is computed. `bash tools/te_on_cpu.sh`
installs what this needs and writes the result.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed.checkpoint as torch_checkpoint

from megatron_itt.config.backends import ChosenBackend
from megatron_itt.config.environment import single_process
from tests.helpers.one_rank import tiny_recipe

BINDING = "transformer_engine_torch"


class _Enumeration(type):
    """Classes whose members are the names that they were asked for, numbered in that order."""

    def __getattr__(cls, name: str) -> Any:
        members = vars(cls)["members"]
        if name == "__members__":
            return members
        if name.startswith("__"):
            raise AttributeError(name)
        return members.setdefault(name, cls(len(members)))


class _Binding(ModuleType):
    """The compiled module: enumerations, which may be inherited from as classes, and functions that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Enumeration(name, (int,), {"members": {}}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, value)
        return value


def import_transformer_engine() -> str:
    """Import TransformerEngine over a binding that computes nothing; return its version."""
    import transformer_engine.common

    def load_binding(*_args: object) -> None:
        sys.modules[BINDING] = _Binding(BINDING)

    transformer_engine.common.load_framework_extension = load_binding
    import transformer_engine.pytorch

    for name, module in list(sys.modules.items()):  # attention asks for cuDNN's version when it is constructed
        if name.startswith("transformer_engine.") and hasattr(module, "get_cudnn_version"):
            module.get_cudnn_version = lambda: (9, 19, 0)  # type: ignore[attr-defined]
    return str(transformer_engine.__version__)


@contextmanager
def gpu_pretended() -> Iterator[None]:
    """TransformerEngine asks for a GPU's capability while it constructs layers."""
    is_available = patch.object(torch.cuda, "is_available", lambda: True)
    capability = patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with is_available, capability:
        yield


def width_of_162m() -> Any:
    """A recipe of the 162m width with two layers and a small vocabulary."""
    shape = {"hidden_size": 1024, "ffn_hidden_size": 2736, "num_layers": 2, "num_attention_heads": 32}
    return tiny_recipe(model={**shape, "num_query_groups": 32}, precision={"dtype": "bf16"})


def build_weights(backend: str) -> dict[str, torch.Tensor]:
    """Initial weights of the model under a backend."""
    from megatron_itt.model import builder

    with patch.object(builder, "choose_backend", lambda *_args, **_kwargs: ChosenBackend(name=backend)):
        built = builder.build_model(width_of_162m(), dtype=torch.bfloat16, device=torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in built.chunks[0].named_parameters()}


def check_trainer(place: Any, folder: Path) -> list[tuple[str, str]]:
    """Build, save and load a trainer with TransformerEngine's layers and optimizer; return what was found."""
    from megatron_itt.checkpoint.save import save_checkpoint
    from megatron_itt.checkpoint.state import new_run_state
    from megatron_itt.model import builder
    from megatron_itt.training.checkpointing import load_trainer, trainer_state
    from megatron_itt.training.trainer import build_trainer

    config = width_of_162m()
    native, ours = build_weights("native"), build_weights("transformer_engine")
    assert {name: weight.shape for name, weight in ours.items()} == {name: w.shape for name, w in native.items()}
    assert all(torch.equal(weight, native[name]) for name, weight in ours.items())
    rows = [("parameters", f"{len(ours)}, with the names, shapes and initial values of the native layers")]
    with patch.object(builder, "choose_backend", lambda *_args, **_kwargs: ChosenBackend(name="transformer_engine")):
        trainer = build_trainer(config, place)
    chunk = trainer.built.chunks[0]
    classes = {base for module in chunk.modules() for base in type(module).__mro__}
    layers = sorted(
        {base.__name__ for base in classes if base.__module__.startswith("transformer_engine.pytorch.module")}
    )
    rows.append(("classes of layers", ", ".join(layers)))
    rows.append(
        ("data parallelism", f"{type(trainer.wrapped[0]).__name__} over {type(trainer.wrapped[0].module).__name__}")
    )
    adam = type(next(iter(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))).optimizer)
    assert adam.__module__.startswith("transformer_engine"), adam
    rows.append(("optimizer", f"{adam.__module__}.{adam.__name__}"))
    extra = [name for name in chunk.state_dict() if name.endswith("_extra_state")]
    trainer_state(trainer, loading=True)  # gives the optimizer its moments, which its first step would
    assert extra
    folder = save_checkpoint(trainer_state(trainer, loading=False), new_run_state(config, step=1), folder, keep_last=1)
    before = {name: weight.clone() for name, weight in chunk.state_dict().items() if isinstance(weight, torch.Tensor)}
    for parameter in chunk.parameters():
        parameter.data.zero_()
    load_trainer(trainer, folder)
    after = chunk.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    stored = torch_checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    moments = [name for name in stored if "exp_avg" in name]
    assert not [name for name in stored if name.endswith("_extra_state")] and len(moments) >= 2 * len(ours)
    rows.append(
        (
            "checkpoint",
            f"{len(stored)} tensors ({len(moments)} moments) saved and loaded, none of {len(extra)} `_extra_state`",
        )
    )
    return rows


def main() -> int:
    """Check the TransformerEngine and megatron-core that are on the path; print the result as rows of a table."""
    import_transformer_engine()
    import megatron.core
    import transformer_engine

    from megatron_itt.parallel.groups import start_parallel, stop_parallel

    place = start_parallel(width_of_162m(), process=single_process())
    try:
        with gpu_pretended(), tempfile.TemporaryDirectory() as folder:
            rows = check_trainer(place, Path(folder))
    finally:
        stop_parallel()
    print(f"## TransformerEngine {transformer_engine.__version__}, megatron-core {megatron.core.__version__}\n")
    print(f"Python {platform.python_version()}, torch {torch.__version__}.\n")
    print("| part | found |\n| --- | --- |")
    print("\n".join(f"| {part} | {found} |" for part, found in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

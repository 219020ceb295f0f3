"""Substitutes for CUDA calls, which let megatron-core run unchanged on CPU tensors and gloo.

megatron-core calls CUDA where no kernel is involved: the current device, streams and events, random states, factory
calls with `device="cuda"`, and tensor type names. `install_host_device` answers those calls on the CPU. No number
changes: the layers, schedules, optimizer and checkpoints that run are megatron-core's own.

Undo: `remove_host_device`. `start_parallel` installs the substitutes for a run on the CPU only, and `stop_parallel`
removes them, so that a process with a GPU may use it afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_itt.parallel.megatron_compat import Replacements

VERSIONS = {"torch": ">=2.6", "megatron-core": ">=0.16,<0.20"}

_REPLACED = Replacements()
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


class _Completed:
    """A stream or an event on the host, where work is complete when a call returns."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait(self, *_args: Any) -> None:
        """Return at once."""

    wait_stream = wait_event = synchronize = record = wait

    def query(self) -> bool:
        """Whether the work is complete."""
        return True


def is_installed() -> bool:
    """Whether the substitutes are installed in this process."""
    current: object = torch.cuda.current_device
    return current is _host_current_device


def install_host_device() -> None:
    """Answer megatron-core's CUDA calls on the CPU in this process. Idempotent; must precede its first use."""
    if is_installed():
        return
    with torch.device("meta"):
        torch.empty(0)  # on first use torch lists its factories to support such blocks: let it list the real ones
    _replace_cuda_module()
    _REPLACED.replace(torch, **{name: _on_host(getattr(torch, name)) for name in _FACTORIES})
    type_of = _type_with_cuda_name(torch.Tensor.type)
    _REPLACED.replace(torch.Tensor, cuda=lambda self, *_args, **_kwargs: self, type=type_of)
    from megatron.core.tensor_parallel import random as megatron_random

    _REPLACED.replace(
        megatron_random,
        _get_cuda_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    )


def remove_host_device() -> None:
    """Restore everything that `install_host_device` has replaced. Idempotent."""
    _REPLACED.close()


def _replace_cuda_module() -> None:
    stream = _Completed()
    _REPLACED.replace(
        torch.cuda,
        current_device=_host_current_device,
        synchronize=lambda *_args, **_kwargs: None,
        Stream=_Completed,
        Event=_Completed,
        current_stream=lambda *_args, **_kwargs: stream,
        default_stream=lambda *_args, **_kwargs: stream,
        stream=contextlib.nullcontext,
        get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.manual_seed(seed),
        device_count=lambda: 1,
    )


def _host_current_device() -> torch.device:
    return torch.device("cpu")


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that it allocates host memory for CUDA devices."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _type_with_cuda_name(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizers tell float32 from bfloat16 parameters by names such as torch.cuda.FloatTensor."""

    @functools.wraps(tensor_type)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_of

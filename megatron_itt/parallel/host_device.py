"""Stand-in for the missing GPU: lets megatron-core run unchanged on CPU tensors and gloo.

megatron-core names CUDA in places that have nothing to do with kernels: the current device, streams and events, random
states, factory calls with `device="cuda"`, and tensor type names. `install_host_device` answers those on the CPU.
Nothing here changes a number: the layers, schedules, optimizer and checkpoints that run are megatron-core's own.

Installed by `parallel.groups.start_parallel` when the run is on the CPU, and only then; `stop_parallel` removes it, so
that a process that has a GPU may use it afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_REPLACED = contextlib.ExitStack()  # puts back what the stand-in has replaced
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


class _HostStream:
    """A stream with nothing to wait for: work on the host is done when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, _stream: object) -> None:
        """Nothing is pending on another stream."""

    def wait_event(self, _event: object) -> None:
        """Nothing is pending behind an event."""

    def synchronize(self) -> None:
        """All work is done already."""


class _HostEvent:
    """An event that has always happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, *_args: Any) -> None:
        """Nothing to mark."""

    def wait(self, *_args: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether the work before this event is done: always."""
        return True


def is_installed() -> bool:
    """Whether `install_host_device` ran in this process."""
    current: object = torch.cuda.current_device
    return current is _host_current_device


def install_host_device() -> None:
    """Make megatron-core's CUDA calls act on the CPU in this process. Idempotent; must precede its first use."""
    if is_installed():
        return
    with torch.device("meta"):
        torch.empty(
            0
        )  # at its first use torch remembers its factories, to honour such blocks: let it see the real ones
    _patch_cuda_module()
    _replace(torch, **{name: _on_host(getattr(torch, name)) for name in _FACTORIES})
    _replace(torch.Tensor, cuda=lambda self, *_args, **_kwargs: self, type=_type_with_cuda_name(torch.Tensor.type))
    _patch_megatron_random_states()


def remove_host_device() -> None:
    """Put back everything that `install_host_device` has replaced. Idempotent."""
    _REPLACED.close()


def _replace(owner: Any, **substitutes: Any) -> None:
    """Set attributes of a module or class, to be put back, or taken away again where they were inherited."""
    for name, substitute in substitutes.items():
        if name in vars(owner):
            _REPLACED.callback(setattr, owner, name, vars(owner)[name])
        else:
            _REPLACED.callback(delattr, owner, name)
        setattr(owner, name, substitute)


def _patch_cuda_module() -> None:
    stream = _HostStream()
    _replace(
        torch.cuda,
        current_device=_host_current_device,
        synchronize=lambda *_args, **_kwargs: None,
        Stream=_HostStream,
        Event=_HostEvent,
        current_stream=lambda *_args, **_kwargs: stream,
        default_stream=lambda *_args, **_kwargs: stream,
        stream=_host_stream_context,
        get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.manual_seed(seed),
        device_count=lambda: 1,
    )


def _host_current_device() -> torch.device:
    return torch.device("cpu")


@contextlib.contextmanager
def _host_stream_context(_stream: object) -> Iterator[None]:
    yield


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that a request for CUDA memory gets host memory."""

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


def _patch_megatron_random_states() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    _replace(
        megatron_random,
        _get_cuda_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    )

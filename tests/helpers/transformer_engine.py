"""TransformerEngine's layers and AdamW in plain torch, with the behaviour that megatron-core and we depend on.

Weights are marked as sharded in the layer, states hold `_extra_state`, random state trackers must hold the state that
is asked for, AdamW counts steps per parameter group. Everything else that megatron-core imports is an empty class.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VERSION = "2.11.0"
_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride")


class _HasExtraState(torch.nn.Module):
    def get_extra_state(self) -> Tensor:
        """Without fp8 the state is an empty tensor of bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Nothing to restore without fp8."""
        assert state is None or state.numel() == 0, "the stand-in has no fp8"


class Linear(_HasExtraState):
    """`transformer_engine.pytorch.Linear`: column or row parallel, with or without sequence parallelism."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        parallel_mode: str | None,
        tp_group: Any,
        tp_size: int,
        sequence_parallel: bool,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        get_rng_state_tracker: Callable[[], Any] | None,
        init_method: Callable[[Tensor], Any],
        device: str | torch.device,
        rng_tracker_name: str | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        assert not bias and not return_bias, "our layers have no biases"
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        shape = [out_features, in_features]
        shape[0 if parallel_mode == "column" else 1] //= tp_size
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        assert not any(hasattr(self.weight, name) for name in _MARKS)
        for name, value in zip(_MARKS, (True, 1 if parallel_mode == "row" else 0, 1), strict=True):
            setattr(self.weight, name, value)
        if get_rng_state_tracker is None:
            init_method(self.weight)
        else:
            with get_rng_state_tracker().fork(rng_tracker_name or "model-parallel-rng"):
                init_method(self.weight)

    def forward(self, hidden_states: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """hidden_states [s, b, h] -> [s, b, f], exchanged between tensor-parallel ranks as `parallel_mode` says."""
        from megatron.core.tensor_parallel import mappings

        group = {"group": self.tp_group}
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                hidden_states = mappings.gather_from_sequence_parallel_region(hidden_states, **group)
            else:
                hidden_states = mappings.copy_to_tensor_model_parallel_region(hidden_states, **group)
        output = functional.linear(hidden_states, self.weight)
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(output, **group)
            return mappings.reduce_from_tensor_model_parallel_region(output, **group)
        return output


class RMSNorm(_HasExtraState):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        *,
        normalized_shape: int = 0,
        hidden_size: int = 0,
        eps: float,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: str | torch.device,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., h] -> same shape."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class DotProductAttention(_HasExtraState):
    """`transformer_engine.pytorch.DotProductAttention`, for causal attention over equal lengths."""

    def __init__(self, *, attn_mask_type: str, get_rng_state_tracker: Callable[[], Any] | None, **_unused: Any) -> None:
        super().__init__()
        assert attn_mask_type == "causal"
        self.get_rng_state_tracker = get_rng_state_tracker

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, attn_mask_type: str, **kwargs: Any
    ) -> Tensor:
        """query [s, b, a, d], key and value [s, b, g, d] -> [s, b, a * d]."""
        assert attn_mask_type == "causal" and attention_mask is None and not any(kwargs.values())
        assert query.shape[0] == key.shape[0], "its causal mask is aligned to the first key"
        assert self.get_rng_state_tracker is not None, "megatron-core's tracker is not initialised"
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        with self.get_rng_state_tracker().fork():
            context = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return context.permute(2, 0, 1, 3).flatten(2)


class FusedAdam(torch.optim.Optimizer):
    """`transformer_engine.pytorch.optimizers.FusedAdam`: AdamW whose step is counted per parameter group."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_: Any):
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1 ** group["step"]))


def _multi_tensor_applier(
    operation: Callable[..., Any], flag: Tensor, lists: Sequence[list[Tensor]], *args: Any
) -> Any:
    return operation(2048, flag, lists, *args)


def _multi_tensor_l2norm(_chunk: int, _flag: Tensor, lists: Sequence[list[Tensor]], *_args: Any) -> Any:
    return torch.stack([tensor.float().square().sum() for tensor in lists[0]]).sum().sqrt().reshape(1), None


def _multi_tensor_scale(_chunk: int, _flag: Tensor, lists: Sequence[list[Tensor]], scale: float) -> None:
    for source, target in zip(lists[0], lists[1], strict=True):
        target.copy_(source * scale)


_CONTENTS: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.pytorch": {
        "Linear": Linear,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
    },
    "transformer_engine.pytorch.cpu_offload": {
        "get_cpu_offload_context": lambda *_args, **_kwargs: (nullcontext(), lambda tensor: tensor)
    },
    "transformer_engine.pytorch.optimizers": {
        "FusedAdam": FusedAdam,
        "multi_tensor_applier": _multi_tensor_applier,
        "multi_tensor_l2norm": _multi_tensor_l2norm,
        "multi_tensor_scale": _multi_tensor_scale,
    },
}


class _Module(ModuleType):
    """A module whose other attributes are submodules in lower case, or empty classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower() and self.__name__ != "transformer_engine.pytorch.optimizers":
            return importlib.import_module(f"{self.__name__}.{name}")
        return type(name, (torch.nn.Module,), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        is_ours = name.split(".")[0] == "transformer_engine"
        return importlib.util.spec_from_loader(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_CONTENTS.get(module.__name__, {}))


def install_stand_in() -> None:
    """Make the stand-in importable in this process and let `build_model` use it. Before megatron-core is imported;
    idempotent.
    """
    if "transformer_engine" in sys.modules:
        return
    assert "megatron.core" not in sys.modules, "megatron-core has looked for TransformerEngine already"
    sys.meta_path.insert(0, _Finder())
    from megatron_itt.config.backends import ChosenBackend
    from megatron_itt.model import builder

    builder.choose_backend = lambda *_args, **_kwargs: ChosenBackend(name="transformer_engine")

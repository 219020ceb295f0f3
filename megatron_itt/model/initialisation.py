"""Initial weights, which depend on the seed and the tensor's name alone, not on the parallel layout.

Every rank draws a whole tensor from a generator seeded by its name and keeps its shard, so that 1 rank and 64 ranks
start from the same model, and the baselines start from the same base weights as the thinking model.
"""

from __future__ import annotations

import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_itt.config.model import ModelConfig, ThinkingConfig

# The sharded dimension of matrices under tensor parallelism; megatron-core marks it in its own initialisation.
_SHARDED_DIMS = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}
EMBEDDING = "embedding.word_embeddings.weight"
_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def initialise_weights(model: GPTModel, config: ModelConfig, thinking: ThinkingConfig, *, seed: int) -> None:
    """Fill a model chunk's parameters in place, and mark those that are sharded by tensor parallelism.

    Matrices: N(0, init_std), those that write to the residual stream N(0, init_std / sqrt(2 * num_layers)); norms 1,
    biases 0; router N(0, router_init_std); step encoding 1 for the base pass and `step_init` for the routed steps.
    """
    rank, degree = model.pg_collection.tp.rank(), model.pg_collection.tp.size()

    @torch.no_grad()
    def initialise(item: tuple[str, Tensor]) -> None:
        name, parameter = item
        whole_name = global_name(name, model)
        if name.endswith("thinking.step_encoding"):
            _fill_step_encoding(parameter, thinking)
        elif parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            std = _std_of(whole_name, config, thinking)
            whole = _draw(parameter, whole_name, std=std, seed=seed, degree=degree)
            parameter.copy_(own_shard(whole, whole_name, rank=rank, degree=degree))
            if _sharded_dim(name) is not None:
                _mark_sharded(parameter, whole_name, _sharded_dim(name))

    # A generator draws on one thread, so tensors are drawn side by side: at 7B that saves minutes of every start.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(initialise, model.named_parameters()))


def _mark_sharded(parameter: Tensor, name: str, dim: int | None) -> None:
    """Set megatron-core's tensor-parallel attributes; those that the layer has set already must agree.

    megatron-core 0.17 and newer and TransformerEngine set them in their layers.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        return
    # The stride is not compared: that of the fused gate and up projection is 1 or 2, by version.
    found = tuple(getattr(parameter, key) for key in ("tensor_model_parallel", "partition_dim"))
    assert found == (True, dim), f"{name} is marked as sharded {found}, but is drawn as sharded along dimension {dim}"


def global_name(name: str, model: GPTModel) -> str:
    """A parameter's name in the whole model: the layer's index there instead of that in its pipeline stage.

    The last stage's replica of a tied embedding has the name of the embedding, so that both are drawn alike.
    """
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return EMBEDDING
    match = re.match(r"(decoder\.layers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(2))]
    return f"{match.group(1)}{layer.layer_number - 1}{match.group(3)}"


def _std_of(name: str, config: ModelConfig, thinking: ThinkingConfig) -> float:
    if name.endswith("thinking.router"):
        return thinking.router_init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(2.0 * config.num_layers)
    return config.init_std


def _fill_step_encoding(parameter: Tensor, thinking: ThinkingConfig) -> None:
    parameter[0] = 1.0
    for step, value in enumerate(thinking.step_init_per_step, start=1):
        parameter[step] = value


def _sharded_dim(name: str) -> int | None:
    return next((dim for suffix, dim in _SHARDED_DIMS.items() if name.endswith(suffix)), None)


def _draw(parameter: Tensor, name: str, *, std: float, seed: int, degree: int) -> Tensor:
    """Draw the whole tensor in float32 from the generator of its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    shape = list(parameter.shape)
    dim = _sharded_dim(name)
    if dim is not None:
        shape[dim] *= degree
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def own_shard(whole: Tensor, name: str, *, rank: int, degree: int) -> Tensor:
    dim = _sharded_dim(name)
    if dim is None or degree == 1:
        return whole
    # A rank's shard of the fused gate and up projection is a shard of each, not one contiguous block.
    blocks = whole.chunk(2, dim=dim) if name.endswith("linear_fc1.weight") else (whole,)
    return torch.cat([block.chunk(degree, dim=dim)[rank] for block in blocks], dim=dim)

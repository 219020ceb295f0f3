"""Loss of the output layer beyond plain cross entropy: z-loss on vocabulary-parallel logits, and a soft cap of logits.

Shapes: s sequence, b micro-batch, v vocabulary of this tensor-parallel rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_itt.config.run import RunConfig


def install_head_loss(chunk: GPTModel, config: RunConfig) -> None:
    """Give the last model chunk the soft cap and the z-loss of a recipe. Without them it stays megatron-core's own."""
    cap = config.model.logit_soft_cap
    if cap is not None:  # the layer returns logits and its bias
        chunk.output_layer.register_forward_hook(lambda _layer, _inputs, output: (soft_cap(output[0], cap), output[1]))
    if config.optimizer.z_loss > 0.0:
        chunk.compute_language_model_loss = partial(_loss_with_z, chunk)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Squash logits smoothly into (-cap, cap). Source: Gemma 2, arXiv 2408.00118, section 2."""
    return cap * torch.tanh(logits / cap)


def _loss_with_z(chunk: GPTModel, labels: Tensor, logits: Tensor) -> Tensor:
    """In place of `compute_language_model_loss`: labels [b, s], logits [s, b, v] -> [2, b, s], without training [b, s].

    The first is the cross entropy of every token, the second the square of its log-partition function.
    """
    group = chunk.pg_collection.tp
    losses = torch.stack(_CrossEntropyAndZ.apply(logits, labels.t().contiguous(), group)).transpose(1, 2).contiguous()
    return losses if chunk.training else losses[0]


def find_own_labels(labels: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the place of each label among the `vocab_size` logits of this tensor-parallel rank, and whether it is one.

    The place of a label of another rank is 0.
    """
    own_labels = labels - group.rank() * vocab_size
    is_own = (own_labels >= 0) & (own_labels < vocab_size)
    return torch.where(is_own, own_labels, 0), is_own


class _CrossEntropyAndZ(torch.autograd.Function):
    """Cross entropy -log p(label) and z = (log sum exp logits)^2 of vocabulary-parallel logits, both [s, b] in float32.

    d cross entropy / d logits = p - onehot(label); d z / d logits = 2 log-partition p. Source: PaLM, arXiv 2204.02311,
    section 5.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        dtype, logits = logits.dtype, logits.float()
        largest = logits.max(dim=-1).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        own_labels, is_own = find_own_labels(labels, logits.shape[-1], group)
        own_labels = own_labels.unsqueeze(-1)
        shifted = logits - largest.unsqueeze(-1)
        of_label = shifted.gather(-1, own_labels).squeeze(-1) * is_own
        probabilities = shifted.exp_()
        sums = torch.stack([probabilities.sum(dim=-1), of_label])
        dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        log_partition = log_sum + largest
        ctx.save_for_backward(probabilities.div_(sums[0].unsqueeze(-1)), own_labels, is_own, log_partition)
        ctx.dtype = dtype
        return log_sum - sums[1], log_partition.square()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, of_z: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient, own_labels, is_own, log_partition = ctx.saved_tensors  # the first as probabilities
        gradient.mul_((of_loss + 2.0 * log_partition * of_z).unsqueeze(-1))  # in place: a backward pass runs once
        of_label = gradient.gather(-1, own_labels) - (of_loss * is_own).unsqueeze(-1)
        gradient.scatter_(-1, own_labels, of_label)  # one label per token: nothing to add atomically
        return gradient.to(ctx.dtype), None, None

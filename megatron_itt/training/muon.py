"""Muon for the matrices of layers, AdamW for all other parameters, in one torch optimizer.

The update of a matrix is its momentum, orthogonalised by Newton-Schulz iterations. Fused matrices are orthogonalised as
the matrices that they consist of: query, key, value, gate and up. Whichever ranks hold parts of a matrix, the whole of
it is orthogonalised: data-parallel ranks of the distributed optimizer send their parts to one of them, and its
tensor-parallel group gathers them. Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"; the scale of updates: Liu et al. 2025, arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_itt.config.run import MuonConfig

MUON_GROUP = "muon"  # a key of the parameter groups whose parameters are matrices
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: singular values end between 0.7 and 1.2
_SMALLEST_NORM = 1e-7

# m, n: rows and columns of a whole matrix, or of this tensor-parallel rank's part of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix of a layer on this tensor-parallel rank.

    `held`: the elements [start, stop) of it that this rank's optimizer steps, by the `ranges` of all data-parallel
    ranks; `sharded_dim`: the dimension that tensor parallelism divides; `pieces`: rows of the fused matrices, a pattern
    that repeats.
    """

    shape: tuple[int, int]
    held: Tensor | None
    ranges: tuple[tuple[int, int], ...]
    sharded_dim: int | None
    pieces: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements on this tensor-parallel rank."""
        return self.shape[0] * self.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether every data-parallel rank holds all of it."""
        return all(held == (0, self.numel) for held in self.ranges)

    def length(self, rank: int) -> int:
        """Elements that a data-parallel rank holds."""
        start, stop = self.ranges[rank]
        return stop - start


def orthogonalise(matrix: Tensor, *, num_steps: int) -> Tensor:
    """Return about U V^T of a matrix [m, n] = U S V^T, in its type, by iterations of a polynomial of odd powers."""
    a, b, c = _COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW that steps the parameters of groups with the key `muon` by Muon.

    `step` is a collective call over the data-parallel and the tensor-parallel group. `dtype` is that of the iterations;
    None: of the momenta.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        matrices: Sequence[Matrix],
        settings: MuonConfig,
        *,
        dtype: torch.dtype | None,
        tensor_group: Any,
        data_group: Any,
    ) -> None:
        super().__init__([torch.empty(0)], fused=True)
        self.param_groups = [{**self.defaults, **group} for group in param_groups]  # of views, which torch refuses
        self._matrices, self._settings, self._dtype = matrices, settings, dtype
        self._tensor_group, self._data_group = tensor_group, data_group
        costs = [min(matrix.shape) * matrix.numel for matrix in matrices]
        self._owned = _balance(costs, data_group.size())

    def fill_state(self, *_: Any) -> None:
        """Give every parameter a state of zeros, to be filled by a load."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, ("momentum_buffer",) if MUON_GROUP in group else ("exp_avg", "exp_avg_sq"))

    def load_state_dict(self, state_dict: Any) -> None:
        """Load, and set the step counts of parameters to those of their groups: megatron-core restores one of them."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"] if "step" in group else ():
                step = self._state_of(parameter)["step"]
                self.state[parameter]["step"] = torch.full_like(step, float(group["step"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all parameters."""
        assert closure is None, "megatron-core computes gradients before it steps"
        groups = self.param_groups
        self.param_groups = [group for group in groups if MUON_GROUP not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        group_of = {parameter: group for group in groups if MUON_GROUP in group for parameter in group["params"]}
        momenta = [None if matrix.held is None else self._advance(matrix.held) for matrix in self._matrices]
        for matrix, update in zip(self._matrices, self._orthogonalised(momenta), strict=True):
            if matrix.held is not None and update is not None:
                group = group_of[matrix.held]
                matrix.held.mul_(1.0 - group["lr"] * group["weight_decay"])
                matrix.held.add_(update.view_as(matrix.held), alpha=-group["lr"])
        for group in groups:
            for parameter in group["params"][:1]:
                group["step"] = int(self.state[parameter]["step"])

    def _state_of(self, parameter: Tensor, moments: tuple[str, ...] = ()) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            fused = any(group.get("fused") for group in self.param_groups)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
        for name in moments:
            state.setdefault(name, torch.zeros_like(parameter))
        return state

    def _advance(self, held: Tensor) -> Tensor:
        """Move the momentum on; return what is to be orthogonalised of it."""
        assert held.grad is not None, "all parameters of layers have gradients"
        state, beta = self._state_of(held, ("momentum_buffer",)), self._settings.momentum
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(held.grad, 1.0 - beta)
        return held.grad.lerp(momentum, beta) if self._settings.nesterov else momentum.clone()

    def _orthogonalised(self, momenta: list[Tensor | None]) -> list[Tensor | None]:
        """The updates, in place of the parts of momenta that this rank holds."""
        if all(matrix.is_whole for matrix in self._matrices):
            pairs = zip(self._matrices, momenta, strict=True)
            return [None if part is None else self._update_of(matrix, part) for matrix, part in pairs]
        rank, owned = self._data_group.rank(), self._owned
        # [rank][matrix]: how many elements of the matrices that it owns this rank has, and the other way round.
        given = [[self._matrices[index].length(rank) for index in there] for there in owned]
        taken = [[self._matrices[index].length(other) for index in owned[rank]] for other in range(len(owned))]
        sent = [part.flatten() for there in owned for index in there if (part := momenta[index]) is not None]
        parts = self._exchange(sent, given, taken)
        updates = [
            self._update_of(self._matrices[index], torch.cat(held)).flatten()
            for index, held in zip(owned[rank], zip(*parts, strict=True), strict=True)
        ]
        back = [
            update[slice(*self._matrices[index].ranges[other])]
            for other in range(len(owned))
            for index, update in zip(owned[rank], updates, strict=True)
        ]
        found = self._exchange(back, taken, given)
        by_index = {
            index: part
            for there, returned in zip(owned, found, strict=True)
            for index, part in zip(there, returned, strict=True)
        }
        return [by_index[index] for index in range(len(self._matrices))]

    def _exchange(self, parts: list[Tensor], given: list[list[int]], taken: list[list[int]]) -> list[list[Tensor]]:
        """Send flat parts, of the lengths `given` to each data-parallel rank; return what was taken from each."""
        some = next(parameter for group in self.param_groups for parameter in group["params"])
        sent = torch.cat([some.new_empty(0), *parts])
        received = some.new_empty(sum(map(sum, taken)))
        dist.all_to_all_single(
            received, sent, [sum(lengths) for lengths in taken], [sum(lengths) for lengths in given], self._data_group
        )
        flat = iter(received.split([length for lengths in taken for length in lengths]))
        return [[next(flat) for _ in lengths] for lengths in taken]

    def _update_of(self, matrix: Matrix, part: Tensor) -> Tensor:
        """The update of this tensor-parallel rank's part [m, n] of a matrix, from that of its momentum."""
        local, degree = part.view(matrix.shape).to(self._dtype or part.dtype), self._tensor_group.size()
        shards = [local]
        if matrix.sharded_dim is not None and degree > 1:
            shards = [torch.empty_like(local) for _ in range(degree)]
            dist.all_gather(shards, local.contiguous(), group=self._tensor_group)
        updates = []
        for pieces in zip(*(_unfused(shard, matrix.pieces) for shard in shards), strict=True):
            dim = matrix.sharded_dim or 0
            whole = torch.cat(pieces, dim=dim)
            scale = self._settings.scale * math.sqrt(max(whole.shape))
            update = scale * orthogonalise(whole, num_steps=self._settings.num_steps)
            updates.append(update.chunk(len(shards), dim=dim)[self._tensor_group.rank() if len(shards) > 1 else 0])
        repeats = matrix.shape[0] // sum(matrix.pieces)
        fused = torch.cat([update.reshape(repeats, -1, matrix.shape[1]) for update in updates], dim=1)
        return fused.view(matrix.shape).to(part.dtype)


def _unfused(local: Tensor, pieces: tuple[int, ...]) -> list[Tensor]:
    """The matrices [m, n] that the rows of a fused one are made of, in a repeated pattern."""
    parts = local.view(-1, sum(pieces), local.shape[1]).split(pieces, dim=1)
    return [part.reshape(-1, local.shape[1]) for part in parts]


def _balance(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions of the costs by rank: about as much for each, and the same answer everywhere."""
    loads, owned = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        lightest = loads.index(min(loads))
        loads[lightest] += costs[index]
        owned[lightest].append(index)
    return owned

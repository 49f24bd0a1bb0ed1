"""Packed sequences: several sequences in one row, told apart by their borders (cu_seqlens).

Sequences of similar length are laid side by side as a padded batch and computed as such, so that nothing can leak from
one to the next and short ones are not computed one by one. The padding is on the left: the latest tokens stand last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.basis import feature_count
from .backends import Backend
from .problem import Gradients, Inputs, Problem


@dataclass(frozen=True)
class Batch:
    """Some sequences as a padded batch."""

    sequences: Tensor  # [m], which ones
    positions: Tensor  # [m, L], where each token stands in the packed row (0 where there is none)
    present: Tensor  # bool [m, L]

    def gather(self, packed: Tensor) -> Tensor:
        """[1, H, T, ...] -> [m, H, L, ...], zeros where there is no token."""
        taken = packed[0][:, self.positions].transpose(0, 1)
        absent = ~self.present[:, None]
        return taken.masked_fill(absent if taken.ndim == 3 else absent[..., None], 0)

    def scatter_(self, packed: Tensor, batch: Tensor) -> None:
        """Put [m, H, L, ...] to where it belongs in [1, H, T, ...]."""
        packed[0][:, self.positions[self.present]] = batch.transpose(0, 1)[:, self.present]

    def inputs(self, inputs: Inputs) -> Inputs:
        """The padded batch's own inputs."""
        visible = self.present
        if inputs.visible is not None:
            visible = visible & inputs.visible[0][self.positions]
        return Inputs(
            self.gather(inputs.query),
            self.gather(inputs.key),
            self.gather(inputs.value),
            visible,
            None if inputs.log_decay is None else self.gather(inputs.log_decay),
            None if inputs.sums is None else inputs.sums[self.sequences],
            None if inputs.compensation is None else inputs.compensation[self.sequences],
        )


def batches(cu_seqlens: Tensor, device: torch.device) -> Iterator[Batch]:
    """The sequences, grouped so that within a group no one is padded to more than twice its length."""
    borders = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(borders)]
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(sequence)
    for members in groups.values():
        longest = max(lengths[m] for m in members)
        steps = torch.arange(longest, device=device)[None]
        stops = torch.tensor([borders[m + 1] for m in members], device=device)[:, None]
        present = steps >= longest - torch.tensor([lengths[m] for m in members], device=device)[:, None]
        yield Batch(torch.tensor(members, device=device), (stops - longest + steps) * present, present)


def _moments_shape(inputs: Inputs, problem: Problem) -> tuple[int, int, int]:
    heads, _, head_dim = inputs.key.shape[1:]
    return heads, inputs.value.shape[3] + 1, feature_count(head_dim, len(problem.coefficients) - 1)


def forward(
    backend: Backend, inputs: Inputs, problem: Problem, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `Backend.forward`, for packed sequences; moments come one per sequence, [N, Hkv, E, M]."""
    query, value = inputs.query, inputs.value
    out = query.new_zeros(*query.shape[:3], value.shape[3] + 1)
    ends: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches(cu_seqlens, query.device):
        part, end, dropped = backend.forward(batch.inputs(inputs), problem)
        batch.scatter_(out, part)
        if end is not None and dropped is not None:
            ends.append((batch.sequences, end, dropped))
    if not problem.keep:
        return out, None, None
    if not ends:
        nothing = query.new_empty(0, *_moments_shape(inputs, problem))
        return out, nothing, nothing.clone()
    order = torch.cat([sequences for sequences, _, _ in ends]).argsort()
    return out, torch.cat([end for _, end, _ in ends])[order], torch.cat([dropped for _, _, dropped in ends])[order]


def backward(
    backend: Backend,
    inputs: Inputs,
    problem: Problem,
    grad: Tensor,
    grad_end: Tensor | None,
    out: Tensor,
    end: Tensor | None,
    cu_seqlens: Tensor,
) -> Gradients:
    """As `Backend.backward`, for packed sequences."""
    found = Gradients(
        inputs.query.new_zeros(inputs.query.shape),
        inputs.key.new_zeros(inputs.key.shape),
        inputs.value.new_zeros(inputs.value.shape),
        None if inputs.log_decay is None else inputs.log_decay.new_zeros(inputs.log_decay.shape),
        None if inputs.sums is None else inputs.sums.new_zeros(inputs.sums.shape),
    )
    for batch in batches(cu_seqlens, grad.device):
        part = backend.backward(
            batch.inputs(inputs),
            problem,
            batch.gather(grad),
            None if grad_end is None else grad_end[batch.sequences],
            batch.gather(out),
            None if end is None else end[batch.sequences],
        )
        batch.scatter_(found.query, part.query)
        batch.scatter_(found.key, part.key)
        batch.scatter_(found.value, part.value)
        if found.log_decay is not None and part.log_decay is not None:
            batch.scatter_(found.log_decay, part.log_decay)
        if found.sums is not None and part.sums is not None:
            found.sums[batch.sequences] = part.sums
    return found

"""Exact attention to near keys as its implementations see it: tensors, what is not finite, gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.state import wide_dtype

_NEVER = 2**62
"""The first query to see a sink that none may see."""


@dataclass(frozen=True)
class NearInputs:
    """The tensors of one problem, all of the accumulating dtype; query t stands at place P + t among the keys.

    query [B, Hq, T, d], key [B, Hkv, P + T, d], value [B, Hkv, P + T, dv], far [B, Hq, F, E], visible bool [B, P + T],
    log_decay [B, Hkv, P + T], sink_key [B, Hkv, X, d], sink_value [B, Hkv, X, dv], sink_from and
    sink_until int64 [B, Hkv, X], sink_log_decay [B, Hkv, X] in the wide type. F: the last queries.
    After `with_heads` visible has heads too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    far: Tensor | None
    visible: Tensor | None
    log_decay: Tensor | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    sink_from: Tensor | None
    sink_until: Tensor | None
    sink_log_decay: Tensor | None
    window: int

    @property
    def past(self) -> int:
        """Keys before the first query's own, P."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def before_far(self) -> int:
        """Queries that have no far part, T - F."""
        return self.query.shape[2] - (0 if self.far is None else self.far.shape[2])

    @property
    def sinks(self) -> int:
        """Places for sinks, X."""
        return 0 if self.sink_key is None else self.sink_key.shape[2]

    @property
    def columns(self) -> int:
        """Entries of [v, 1], E."""
        return self.value.shape[3] + 1

    def total(self) -> Tensor | None:
        """The running sum of the log decay, [B, Hkv, P + T] in the wide type; None if no sink fades."""
        if self.log_decay is None or self.sink_key is None:
            return None
        return self.log_decay.to(wide_dtype(self.key.device)).cumsum(-1)

    def fading_of_sinks(self) -> Tensor | None:
        """`sink_log_decay`, zeros if it is not given; None if no sink fades."""
        if self.log_decay is None or self.sink_key is None:
            return None
        if self.sink_log_decay is not None:
            return self.sink_log_decay
        return self.sink_key.new_zeros(self.sink_key.shape[:3], dtype=wide_dtype(self.key.device))


@dataclass(frozen=True)
class NearFound:
    """What the backward passes find: gradients by queries, by keys and their [v, 1], by sinks and theirs."""

    query: Tensor
    key: Tensor
    column: Tensor
    sink_key: Tensor | None
    sink_column: Tensor | None


@dataclass(frozen=True)
class Check:
    """How normalisers are checked: with f(0), and how many far keys each query sees, [B, Hq, F] (None: none)."""

    constant: float
    count: Tensor | None

    def seen(self, out: Tensor, top: Tensor, far: Tensor | None) -> Tensor:
        """What the keys would give with far weights of f(0), as a share of that and under the maximum, [B, Hq, T].

        Args:
            out, top: results of the forward pass; far: as it took it.
        """
        if far is None:
            return out[..., -1] / (abs(self.constant) or 1)
        before = out.shape[2] - far.shape[2]
        by_far = far_factor(top[..., before:])
        seen = (out[..., -1] - pad(by_far * far[..., -1], (before, 0))) / (abs(self.constant) or 1)
        return seen if self.count is None else seen + pad(by_far * self.count, (before, 0))


def with_heads(inputs: NearInputs) -> NearInputs:
    """The same with `visible` for each head, as `guard` and the implementations take it."""
    if inputs.visible is None:
        return inputs
    return replace(inputs, visible=inputs.visible[:, None].expand(-1, inputs.key.shape[1], -1))


def guard(inputs: NearInputs) -> tuple[NearInputs, Tensor | None]:
    """Hide keys and sinks with NaN or Inf; also which queries would have seen one, bool [B, Hq, T] (None: no query).

    A sum is one look at the data; where it is not finite, a closer look decides.
    """
    visible, first = inputs.visible, inputs.sink_from
    tensors = (inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
    if bool(torch.stack([x.sum() for x in tensors if x is not None]).sum().isfinite()):
        return inputs, None
    broken = _broken(inputs.key, inputs.value)  # [B, Hkv, P + T]
    broken = broken if visible is None else broken & visible
    query = torch.arange(inputs.query.shape[2], device=broken.device)
    last = query + inputs.past + 1
    count = pad(broken.cumsum(-1), (1, 0))
    reached = count[..., last] > count[..., (last - inputs.window).clamp(min=0)]  # [B, Hkv, T]
    visible = ~broken if visible is None else visible & ~broken
    inputs = replace(inputs, visible=visible)
    if inputs.sink_key is not None and inputs.sink_value is not None and first is not None:
        broken = _broken(inputs.sink_key, inputs.sink_value)  # [B, Hkv, X]
        seen = first[..., None] <= query  # [B, Hkv, X, T]
        if inputs.sink_until is not None:
            seen = seen & (inputs.sink_until[..., None] > query)
        reached = reached | (broken[..., None] & seen).any(2)
        inputs = replace(
            inputs,
            sink_key=inputs.sink_key.masked_fill(broken[..., None], 0),
            sink_value=inputs.sink_value.masked_fill(broken[..., None], 0),
            sink_from=first.masked_fill(broken, _NEVER),
        )
    return inputs, reached.repeat_interleave(inputs.group, 1) if bool(reached.any()) else None


def _broken(key: Tensor, value: Tensor) -> Tensor:
    return ~(key.isfinite().all(-1) & value.isfinite().all(-1))


def far_factor(top: Tensor) -> Tensor:
    """exp(-m), by which the far part counts; finite where the far part has no positive Z and m may be anything."""
    return (-top).clamp(max=-math.log(torch.finfo(top.dtype).tiny)).exp()


def gradients(
    inputs: NearInputs, found: NearFound, grad: Tensor, out: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, far, log_decay, sink_key, sink_value, sink_log_decay (None where not given).

    Args:
        inputs: as `guard` returns them.
        grad: by the forward pass's [N | Z], [B, Hq, T, E]; out and top: that pass's results.
    """
    by_key, by_column = found.key, found.column
    if inputs.visible is not None:
        hidden = ~inputs.visible[..., None]
        by_key, by_column = by_key.masked_fill(hidden, 0), by_column.masked_fill(hidden, 0)
    before, by_far, by_decay = inputs.before_far, None, None
    factor = far_factor(top[..., before:])[..., None]
    if inputs.far is not None:
        by_far = factor * grad[:, :, before:]
    if inputs.log_decay is not None:
        near = out if inputs.far is None else out - pad(factor * inputs.far, (0, 0, before, 0))
        by_decay = _by_log_decay(inputs, by_column, torch.linalg.vecdot(grad, near))
    by_sink_value = by_sink_decay = None
    if found.sink_column is not None and inputs.sink_value is not None:
        by_sink_value = found.sink_column[..., :-1].contiguous()
        if inputs.sink_log_decay is not None:
            felt = _felt(found.sink_column, inputs.sink_value) if inputs.log_decay is not None else None
            shape = inputs.sink_log_decay
            by_sink_decay = torch.zeros_like(shape) if felt is None else felt.to(shape.dtype)
    return (
        found.query,
        by_key,
        by_column[..., :-1].contiguous(),
        by_far,
        by_decay,
        found.sink_key,
        by_sink_value,
        by_sink_decay,
    )


def _felt(by_column: Tensor, value: Tensor) -> Tensor:
    """The gradient by the size of [v, 1] as a whole."""
    return torch.linalg.vecdot(by_column[..., :-1], value) + by_column[..., -1]


def _by_log_decay(inputs: NearInputs, by_column: Tensor, felt: Tensor) -> Tensor:
    """Gradient of the log decay, [B, Hkv, P + T]; felt [B, Hq, T]: of the size of each query's near part.

    Key j acts on query i through exp(L_i - L_j), a sink through exp(L_i), with L the running sum: sum back.
    """
    value = inputs.value if inputs.visible is None else inputs.value.masked_fill(~inputs.visible[..., None], 0)
    by_total = -_felt(by_column, value)
    by_total[..., inputs.past :] += felt.unflatten(1, (value.shape[1], -1)).sum(2)
    return by_total.to(wide_dtype(value.device)).flip(-1).cumsum(-1).flip(-1).to(value.dtype)

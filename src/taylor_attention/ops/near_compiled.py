"""Exact attention to near keys by the compiled CPU kernels (`kernels/near.h`), in float32 and float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import address, count_threads, entries_together, kernels, strided
from .near_problem import Check, NearFound, NearInputs
from .normaliser import SAFE_SHARE

_SINK_PART = 4096
"""Queries whose shares of the gradients of the sinks are summed in one go, whatever the number of threads."""


def forward(inputs: NearInputs) -> tuple[Tensor, Tensor]:
    """As `near_torch.forward`."""
    out = inputs.query.new_empty(*inputs.query.shape[:3], inputs.columns)
    top = inputs.query.new_empty(inputs.query.shape[:3])
    call = _Call(inputs)
    kernels().near_forward(*call.numbers, *call.far, out.data_ptr(), top.data_ptr())
    return out, top


def divide(inputs: NearInputs, check: Check | None) -> tuple[Tensor, int] | None:
    """N / Z of `forward` [B, Hq, T, dv] and the number of unsafe normalisers; None if a key or value is not finite."""
    y = inputs.query.new_empty(*inputs.query.shape[:3], inputs.columns - 1)
    call = _Call(inputs)
    count = None if check is None or check.count is None else entries_together(check.count)
    unsafe, broken = kernels().near_divide(
        *call.numbers,
        *call.far,
        y.data_ptr(),
        0.0 if check is None else check.constant,
        -1.0 if check is None else SAFE_SHARE,
        *((0, 0, 0, 0) if count is None else (count.data_ptr(), *count.stride())),
    )
    return None if broken else (y, unsafe)


def backward(inputs: NearInputs, grad: Tensor, top: Tensor) -> NearFound:
    """As `near_torch.backward`."""
    grad, top = grad.contiguous(), top.contiguous()
    call = _Call(inputs)
    by_query, by_key = (x.new_empty(x.shape) for x in (inputs.query, inputs.key))
    by_column = inputs.key.new_empty(*inputs.key.shape[:3], inputs.columns)
    by_sink = by_sink_column = None
    if inputs.sinks:
        parts = -(-inputs.query.shape[2] // _SINK_PART)
        shape = (*inputs.key.shape[:2], parts, inputs.sinks)
        by_sink = inputs.key.new_empty(*shape, inputs.key.shape[3])
        by_sink_column = inputs.key.new_empty(*shape, inputs.columns)
    results = (by_query, by_key, by_column, by_sink, by_sink_column)
    kernels().near_backward(*call.numbers, top.data_ptr(), grad.data_ptr(), *map(address, results))
    if by_sink is None or by_sink_column is None:
        return NearFound(by_query, by_key, by_column, None, None)
    return NearFound(by_query, by_key, by_column, by_sink.sum(2), by_sink_column.sum(2))


class _Call:
    """The arguments that both passes share, and the tensors that have to live as long as the call."""

    def __init__(self, inputs: NearInputs) -> None:
        batch, heads, keys, head_dim = inputs.key.shape
        queries, window = inputs.query.shape[2], min(inputs.window, keys)
        given = (inputs.query, inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
        tokens = [None if x is None else entries_together(x) for x in given]
        gates = None if inputs.log_decay is None else inputs.log_decay.to(torch.float64)
        along = (inputs.visible, gates, inputs.sink_from, inputs.sink_until, inputs.fading_of_sinks(), inputs.total())
        beside = [None if x is None else x.contiguous() for x in along]
        far = None if inputs.far is None else inputs.far.contiguous()
        self.far = (0, 0) if far is None else (far.shape[2], far.data_ptr())
        self._alive = (tokens, beside, far)
        work = batch * heads * inputs.group * queries * (window + inputs.sinks) * (head_dim + inputs.columns)
        self.numbers: tuple[int, ...] = (
            inputs.key.dtype == torch.float64,
            batch,
            heads,
            inputs.group,
            queries,
            keys,
            inputs.sinks,
            head_dim,
            inputs.columns,
            window,
            _SINK_PART,
            count_threads(work),
            *(number for x in tokens for number in ((0, 0, 0, 0) if x is None else strided(x))),
            *map(address, beside),
        )

"""The operator `attend_near`: exact attention to a window of the latest keys and to sinks, joined with a far part.

Registered as the operator of the far part is (see `operator`), traceable by torch.compile, with its own backward. Only
inputs and outputs are kept for that.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import near_compiled, near_torch
from .backends import uses_kernels
from .near_problem import Check, NearInputs, gradients, guard, with_heads
from .normaliser import divide, find_unsafe
from .registry import register, register_autograd, without_autocast


def _computing(backend: str, query: Tensor) -> ModuleType:
    return near_compiled if uses_kernels(backend, query.device) else near_torch


def _attend_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor | None,
    visible: Tensor | None,
    log_decay: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    sink_from: Tensor | None,
    sink_until: Tensor | None,
    sink_log_decay: Tensor | None,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """[N | Z] exp(-m) [B, Hq, T, E] of near and far keys together, and m [B, Hq, T], which is finite and a constant.

    With s = q . k + the log decay in between, m is the largest s of the near keys that a query sees, or log Z of the
    far part if that is larger; 0 where there is neither.

    Args:
        query: [B, Hq, T, d], multiplied by the scale; query t stands at the place P + t of the keys.
        key: [B, Hkv, P + T, d]; value: [B, Hkv, P + T, dv], P >= 0.
        far: [N | Z] of the far part of the last F queries, [B, Hq, F, E]; the others have none.
        visible: bool [B, P + T], which keys count.
        log_decay: [B, Hkv, P + T], of hidden keys too: 0 for those that fade nothing; >= FULL_RESET.
        sink_key: [B, Hkv, X, d]; sink_value: [B, Hkv, X, dv].
        sink_from, sink_until: int64 [B, Hkv, X]; query t sees sink x if sink_from[x] <= t < sink_until[x].
        sink_log_decay: [B, Hkv, X] in the wide type: what the sum of log_decay up to a query lacks to be the log decay
            since the sink came.
        window: query t sees the keys in the places P + t - window < j <= P + t.
    """
    given = (far, visible, log_decay, sink_key, sink_value, sink_from, sink_until, sink_log_decay)
    with without_autocast(query):
        return _compute(with_heads(NearInputs(query, key, value, *given, window)), backend)


def _compute(inputs: NearInputs, backend: str) -> tuple[Tensor, Tensor]:
    inputs, reached = guard(inputs)
    out, top = _computing(backend, inputs.query).forward(inputs)
    return (out if reached is None else out.masked_fill_(reached[..., None], torch.nan)), top


def _fake_attend_near(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[3] + 1), query.new_empty(query.shape[:3])


def _attend_near_backward(
    grad: Tensor,
    out: Tensor,
    top: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor | None,
    visible: Tensor | None,
    log_decay: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    sink_from: Tensor | None,
    sink_until: Tensor | None,
    sink_log_decay: Tensor | None,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, far, log_decay, sink_key, sink_value and sink_log_decay (empty if not given)."""
    given = (far, visible, log_decay, sink_key, sink_value, sink_from, sink_until, sink_log_decay)
    inputs, _ = guard(with_heads(NearInputs(query, key, value, *given, window)))
    with without_autocast(query):
        found = _computing(backend, query).backward(inputs, grad, top)
        results = gradients(inputs, found, grad, out, top)
    return tuple(query.new_empty(0) if x is None else x for x in results)  # type: ignore[return-value]


def _fake_attend_near_backward(grad, out, top, *rest):  # type: ignore[no-untyped-def]
    query, key, value, far, _visible, log_decay, sink_key, sink_value, _from, _until, sink_log_decay, *_ = rest
    inputs = (query, key, value, far, log_decay, sink_key, sink_value, sink_log_decay)
    return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, backend = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (window, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    out, top, *tensors = ctx.saved_tensors
    if grad is None:
        return (None,) * 13
    found = attend_near_backward(grad, out, top, *tensors, *ctx.settings)
    places = (0, 1, 2, 3, 5, 6, 7, 10)  # of those that have a gradient, among the tensors
    by_tensor = dict(zip(places, found, strict=True))
    return (*(None if x is None else by_tensor.get(i) for i, x in enumerate(tensors)), None, None)


def _divide_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor | None,
    visible: Tensor | None,
    log_decay: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    sink_from: Tensor | None,
    sink_until: Tensor | None,
    sink_log_decay: Tensor | None,
    window: int,
    backend: str,
    count: Tensor | None,
    constant: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend_near` divided, N / Z [B, Hq, T, dv], and how many of its normalisers are unsafe, an int64; no gradients.

    Args:
        count: how many far keys each of the last F queries sees, [B, Hq, F], or None.
        constant: f(0); None: no normaliser is checked.
    """
    given = (far, visible, log_decay, sink_key, sink_value, sink_from, sink_until, sink_log_decay)
    inputs = with_heads(NearInputs(query, key, value, *given, window))
    check = None if constant is None else Check(constant, count)
    if uses_kernels(backend, query.device):
        found = near_compiled.divide(inputs, check)
        if found is not None:
            return found[0], torch.tensor(found[1])
    with without_autocast(query):
        out, top = _compute(inputs, backend)
        if check is None:
            return divide(out, out[..., -1] == 0), torch.tensor(0)
        seen = check.seen(out, top, far)
        unsafe = find_unsafe(out, seen, check.constant)
        return divide(out, seen == 0).masked_fill_(unsafe[..., None], torch.nan), unsafe.sum()


def _fake_divide_near(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty((), dtype=torch.int64)


divide_near = register("divide_near", _divide_near, _fake_divide_near)
attend_near_backward = register("attend_near_backward", _attend_near_backward, _fake_attend_near_backward)
attend_near = register("attend_near", _attend_near, _fake_attend_near)
register_autograd("attend_near", _backward, _setup_context)

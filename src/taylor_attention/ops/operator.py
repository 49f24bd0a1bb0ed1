"""The operator as PyTorch sees it: registered, traceable by torch.compile, with its own backward.

Everything whose shape or course depends on data (packed sequences, the cut into chunks) happens inside, where a tracer
does not look. Results that are not wanted are empty tensors, since an operator returns a fixed number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.basis import feature_count
from . import packed
from .backends import pick, uses_kernels
from .compiled import history_shape
from .problem import Inputs, Problem
from .registry import register, register_autograd, without_autocast


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether gradients by some of these may be asked for; not told to a tracer, for which sizes may be symbols."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def _problem(coefficients: Sequence[float], causal: bool, chunk: int, keep: bool) -> Problem:
    return Problem(tuple(coefficients), causal, chunk or None, keep)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor | None,
    compensation: Tensor | None,
    coefficients: Sequence[float],
    causal: bool,
    chunk: int,
    keep: bool,
    backend: str,
    recorded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator and normaliser [B, Hq, Tq, E] and, if kept, moments and compensation at the end [N, Hkv, E, M].

    The tensors are those of `problem.Inputs`; N is the batch or the number of packed sequences; chunk 0: the library's.
    Recorded: a backward pass is expected; the fourth result is what it can use (see `Inputs.history`).
    """
    shape = _history_shape(query, key, value, cu_seqlens, sums, coefficients, causal, chunk, keep, backend, recorded)
    history = query.new_empty(shape)
    room = history if len(shape) > 1 else None
    inputs = Inputs(query, key, value, visible, log_decay, sums, compensation, room)
    problem, computing = _problem(coefficients, causal, chunk, keep), pick(backend, query.device)
    with without_autocast(query):
        if cu_seqlens is None:
            out, end, dropped = computing.forward(inputs, problem)
        else:
            out, end, dropped = packed.forward(computing, inputs, problem, cu_seqlens)
    empty = query.new_empty(0)
    return out, empty if end is None else end, empty.clone() if dropped is None else dropped, history


def _history_shape(  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, sums, coefficients, causal, chunk, keep, backend, recorded
) -> tuple[int, ...]:
    if not recorded or cu_seqlens is not None or not uses_kernels(backend, query.device):
        return (0,)
    return history_shape(query, key, value, _problem(coefficients, causal, chunk, keep), sums is not None)


def _fake_attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    visible,
    log_decay,
    cu_seqlens,
    sums,
    _,
    coefficients,
    causal,
    chunk,
    keep,
    backend,
    recorded=False,
):
    out = query.new_empty(*query.shape[:3], value.shape[3] + 1)
    shape = _history_shape(query, key, value, cu_seqlens, sums, coefficients, causal, chunk, keep, backend, recorded)
    history = query.new_empty(shape)
    if not keep:
        return out, query.new_empty(0), query.new_empty(0), history
    sequences = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, key.shape[1], value.shape[3] + 1, feature_count(key.shape[3], len(coefficients) - 1))
    return out, query.new_empty(shape), query.new_empty(shape), history


def _attend_backward(
    grad: Tensor,
    grad_end: Tensor | None,
    out: Tensor,
    end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor | None,
    compensation: Tensor | None,
    history: Tensor | None,
    coefficients: Sequence[float],
    causal: bool,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay and sums (empty where that input is None)."""
    inputs = Inputs(query, key, value, visible, log_decay, sums, compensation, history)
    problem, computing = _problem(coefficients, causal, chunk, end is not None), pick(backend, query.device)
    with without_autocast(query):
        if cu_seqlens is None:
            found = computing.backward(inputs, problem, grad, grad_end, out, end)
        else:
            found = packed.backward(computing, inputs, problem, grad, grad_end, out, end, cu_seqlens)
    by_decay = query.new_empty(0) if found.log_decay is None else found.log_decay
    by_sums = query.new_empty(0) if found.sums is None else found.sums
    return found.query, found.key, found.value, by_decay, by_sums


def _fake_attend_backward(grad, grad_end, out, end, query, key, value, visible, log_decay, cu_seqlens, sums, *rest):  # type: ignore[no-untyped-def]
    by_decay = query.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    by_sums = query.new_empty(0) if sums is None else sums.new_empty(sums.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), by_decay, by_sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, coefficients, causal, chunk, keep, backend, _ = inputs
    history = output[3]
    ctx.save_for_backward(output[0], output[1] if keep else None, *tensors, history if history.numel() else None)
    ctx.settings = (coefficients, causal, chunk, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_end: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    out, end, *tensors = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    if end is None:
        grad_end = None
    by_query, by_key, by_value, by_decay, by_sums = attend_backward(grad, grad_end, out, end, *tensors, *ctx.settings)
    log_decay, sums = tensors[4], tensors[6]
    return (
        by_query,
        by_key,
        by_value,
        None,
        None if log_decay is None else by_decay,
        None,
        None if sums is None else by_sums,
        *([None] * 7),
    )


attend_backward = register("attend_backward", _attend_backward, _fake_attend_backward)
attend = register("attend", _attend, _fake_attend)
register_autograd("attend", _backward, _setup_context)

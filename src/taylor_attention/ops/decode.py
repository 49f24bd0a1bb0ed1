"""Decoding: tokens appended to a state in place, at a cost that does not depend on how many came before."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.basis import expand, reading_weights
from ..core.series import Series
from ..core.state import State, wide_dtype
from ..errors import expect
from . import compiled
from .attention import attention
from .backends import uses_kernels
from .normaliser import SAFE_SHARE, divide, divide_checked, resolve, warn_unsafe
from .problem import FULL_RESET
from .tiles import polynomial
from .validation import Optional, check_choices, check_data, check_inputs, check_scale, check_series, check_state


def decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    *,
    scale: float | None = None,
    series: Series | None = None,
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append tokens to a state in place and attend from them: `attention(..., state=state)` for generation.

    Args:
        query: [B, Hq, n, d]. key: [B, Hkv, n, d]. value: [B, Hkv, n, dv]. Usually n == 1.
        state: the tokens before; changed in place. A state of `State.zeros` begins a sequence.
        scale, series, key_padding_mask, log_decay, backend: as for `attention`.

    Returns:
        y [B, Hq, n, dv] in the query's dtype.

    Raises:
        ArgumentError: an argument is not as above, or gradients are being recorded; the state is unchanged.
    """
    step = _checked(query, key, value, key_padding_mask, log_decay, state, scale, series, backend)
    if step.compiled is not None and step.compiled.as_they_are:
        y, unsafe = compiled.decode_(step.compiled, query, key, value, key_padding_mask, log_decay, state)
        if unsafe < 0:
            check_data(None, log_decay, 1)
        if unsafe > 0:
            warn_unsafe(unsafe)
        return y
    if step.compiled is not None:  # once more, with tensors that the kernels can read
        q, k, v = (x.to(state.dtype).contiguous() for x in (query, key, value))
        gate = None if log_decay is None else log_decay.double()
        again = partial(decode_, scale=scale, series=series, key_padding_mask=key_padding_mask, log_decay=gate)
        return again(q, k, v, state, backend=backend).to(query.dtype)
    if log_decay is not None:
        check_data(None, log_decay, 1)
    with torch.no_grad():
        if step.queries == 1:
            with torch.autocast(query.device.type, enabled=False):  # sums keep their dtype whatever the caller's says
                return _decode_one(query, key, value, state, step, key_padding_mask, log_decay)
        y, after = attention(
            query,
            key,
            value,
            degree=state.degree,
            scale=scale,
            series=series,
            key_padding_mask=key_padding_mask,
            log_decay=log_decay,
            state=state,
            return_state=True,
            backend=backend,
            max_state_bytes=state.nbytes,
        )
        state.assign_(after)
        return y


class _Step(NamedTuple):
    """What checking a call found out."""

    queries: int
    coefficients: tuple[float, ...]
    positive: bool
    compiled: compiled.Step | None  # for single tokens, where the kernels compute


_known: dict[tuple[Any, ...], _Step] = {}
_KNOWN_LIMIT = 1024


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    log_decay: Tensor | None,
    state: State,
    scale: float | None,
    series: Series | None,
    backend: str,
) -> _Step:
    """Check everything but the data. What was good once is good again: decoding repeats the same call very often."""
    arguments = (query, key, value, visible, log_decay, state, scale, series, backend)
    if torch.compiler.is_compiling():
        return _check(*arguments)
    try:
        sums, tail = state.sums, state.tail_key
        signature = (
            (query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride()),
            (query.dtype, key.dtype, value.dtype, query.device, key.device, value.device),
            query.requires_grad or key.requires_grad or value.requires_grad or sums.requires_grad,
            None if visible is None else (visible.shape, visible.stride(), visible.dtype, visible.device),
            None if log_decay is None else _signature(log_decay),
            (type(state), sums.shape, sums.dtype, sums.device, tail.shape, state.degree, state.scale),
            state.is_contiguous,
            (scale, type(scale), series, backend, torch.is_grad_enabled(), torch.get_num_threads()),
        )
        found = _known.get(signature)
    except (AttributeError, TypeError):  # then the check has something to say
        return _check(*arguments)
    if found is None:
        found = _check(*arguments)
        if len(_known) >= _KNOWN_LIMIT:
            _known.clear()
        _known[signature] = found
    return found


def _signature(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    log_decay: Tensor | None,
    state: State,
    scale: float | None,
    series: Series | None,
    backend: str,
) -> _Step:
    degree = state.degree if isinstance(state, State) else 0
    shapes = check_inputs(query, key, value, Optional(visible, None, log_decay), degree, True)
    scale = check_scale(scale, shapes.head_dim)
    check_state(state, shapes, degree, scale, in_place=(query, key, value, log_decay))
    expect(state.is_contiguous, "state", "contiguous tensors, to change them in place", "others")
    check_choices(backend, None)
    coefficients, positive = resolve(check_series(series), degree)
    plan = None
    if shapes.queries == 1 and uses_kernels(backend, query.device):
        safe_share = None if positive else SAFE_SHARE * abs(coefficients[0])
        plan = compiled.plan_step((query, key, value), visible, log_decay, state, coefficients, safe_share)
    return _Step(shapes.queries, coefficients, positive, plan)


def _decode_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    step: _Step,
    visible: Tensor | None,
    log_decay: Tensor | None,
) -> Tensor:
    """One token: the moments are read once, the tail is attended to exactly as inside a chunk."""
    batch, heads = key.shape[:2]
    k, v = key[:, :, 0].to(state.dtype), value[:, :, 0].to(state.dtype)
    u = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    u = u + (k * 0).sum(-1, keepdim=True) + (v * 0).sum(-1, keepdim=True)  # all NaN if any is not finite
    gate = None if log_decay is None else log_decay[..., 0].to(wide_dtype(state.device)).clamp(min=FULL_RESET)
    state.append_(k, u, gate, None if visible is None else visible[:, 0])
    coefficients = step.coefficients
    q = (query[:, :, 0].to(state.dtype) * state.scale).reshape(batch * heads, -1, state.head_dim)  # [n, g, d]
    weights = reading_weights(state.head_dim, coefficients, state.dtype, state.device)
    features = expand(q, state.degree) * weights
    out = torch.bmm(features, state.sums.flatten(0, 1).transpose(1, 2))  # [n, g, E]
    if bool(state.tail_log_decay.any()):
        out *= state.tail_log_decay.exp().to(state.dtype).view(-1, 1, 1)
    tail = slice(0, state.tail_length)
    near = polynomial(torch.bmm(q, state.tail_key.flatten(0, 1)[..., tail]), coefficients)
    out.baddbmm_(near, state.tail_value.flatten(0, 1)[..., tail].transpose(1, 2))
    out = out.view(batch, -1, 1, u.shape[-1])
    if step.positive:
        y = divide(out, out[..., -1] == 0)
    else:
        degree_zero = state.sums[:, :, -1, 0] * state.tail_log_decay.exp().to(state.dtype)
        seen = (degree_zero + state.tail_value[:, :, -1, tail].sum(-1)).repeat_interleave(q.shape[1], 1)
        y = divide_checked(out, seen[..., None], coefficients[0])
    return y.to(query.dtype)

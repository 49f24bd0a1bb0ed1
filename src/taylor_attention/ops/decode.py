"""Decoding: tokens appended to a state in place, at a cost that does not depend on how many came before."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.ranges import check_tokens
from ..core.series import Series
from ..core.state import State, check_scale
from ..errors import LARGEST_INT, expect
from . import compiled
from .attention import attention
from .backends import uses_kernels
from .decode_torch import decode_one_
from .normaliser import SAFE_SHARE, note, resolve, warn_unsafe
from .validation import (
    Optional,
    check_choices,
    check_data,
    check_far,
    check_gain,
    check_inputs,
    check_reading,
    check_series,
    check_state,
    expect_state,
)


def decode_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    *,
    scale: float | None = None,
    series: Series | None = None,
    reading: str = "taylor",
    key_padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    far_gain: Tensor | None = None,
    far_query: Tensor | None = None,
    far_key: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append tokens to a state in place and attend from them: `attention(..., state=state)` for generation.

    Args:
        query: [B, Hq, n, d]. key: [B, Hkv, n, d]. value: [B, Hkv, n, dv]. Usually n == 1.
        state: the tokens before; changed in place. A state of `State.zeros` begins a sequence.
        scale, series, reading, key_padding_mask, log_decay, far_gain, far_query, far_key, backend: as for `attention`.

    Returns:
        y [B, Hq, n, dv] in the query's dtype.

    Raises:
        ArgumentError: an argument is not as above, gradients are being recorded, or a token that is not hidden is not
            finite or too large for the moments (see `core.ranges`); the state is unchanged.
    """
    tensors = (query, key, value, key_padding_mask, log_decay, far_gain, far_query, far_key)
    done, step = _step_again(tensors, state, (scale, series, reading, backend))
    if done is not None:
        y, unsafe = done
        if unsafe < 0:
            check_data(None, log_decay, 1)
            check_tokens(key, value, key_padding_mask, state.degree)
        assert unsafe >= 0  # what the kernels refuse, one of these refuses
        if unsafe > 0:
            warn_unsafe()
        note(y, query)
        return y
    assert step is not None
    if step.compiled is not None and not step.compiled.as_they_are:  # once more, with tensors that the kernels can read
        q, k, v = (x.to(state.dtype).contiguous() for x in (query, key, value))
        gate = None if log_decay is None else log_decay.double()
        gain = None if far_gain is None else far_gain.to(state.dtype).contiguous()
        again = partial(decode_, scale=scale, series=series, reading=reading, backend=backend)
        y = again(q, k, v, state, key_padding_mask=key_padding_mask, log_decay=gate, far_gain=gain)
        return y.to(query.dtype)
    if log_decay is not None:
        check_data(None, log_decay, 1)
    k, v = key.to(state.dtype), value.to(state.dtype)
    check_tokens(k, v, key_padding_mask, state.degree if far_key is None else None)
    if far_key is not None:
        check_tokens(far_key.to(state.dtype), v, key_padding_mask, state.degree)
    with torch.no_grad():
        if step.queries == 1:
            with torch.autocast(query.device.type, enabled=False):  # sums keep their dtype whatever the caller's says
                optional = key_padding_mask, log_decay, far_gain, far_query, far_key
                return decode_one_(query, key, value, state, step.coefficients, *optional, step.fitted, step.checked)
        y, after = attention(
            query,
            key,
            value,
            degree=state.degree,
            window=state.window,
            sinks=state.sinks,
            heavy=state.heavy,
            scale=scale,
            series=series,
            reading=reading,
            key_padding_mask=key_padding_mask,
            log_decay=log_decay,
            far_gain=far_gain,
            far_query=far_query,
            far_key=far_key,
            state=state,
            return_state=True,
            backend=backend,
            max_state_bytes=LARGEST_INT,  # there is one already
        )
        state.assign_(after)
        return y


class _Step(NamedTuple):
    """What checking a call found out."""

    queries: int
    coefficients: tuple[float, ...]
    checked: bool  # whether the normaliser may fail to be positive
    fitted: bool
    compiled: compiled.Step | None  # for single tokens, where the kernels compute


_Done = tuple[Tensor, int] | None

_known: dict[tuple[Any, ...], _Step] = {}
"""Steps by what the tensors are like, and by all else that was checked."""

_last: dict[tuple[Any, ...], compiled.Step] = {}
"""Steps by the state's identity, and by all else: whether the tensors are as before is seen when they are read."""

_KNOWN_LIMIT = 1024
if hasattr(os, "register_at_fork"):  # how many threads compute is known too
    os.register_at_fork(after_in_child=_known.clear)
    os.register_at_fork(after_in_child=_last.clear)


def _step_again(
    tensors: tuple[Tensor | None, ...], state: State, options: tuple[Any, ...]
) -> tuple[_Done, _Step | None]:
    """Check everything but the data, and decode where the kernels can read the tensors; else the step that was checked.

    What was good once is good again: decoding repeats the same call very often.
    """
    arguments: tuple[Any, ...] = (*tensors, state, *options)
    if torch.compiler.is_compiling():
        return None, _check(*arguments)
    try:
        state.check_layout()
        recording = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, state.sums))
        alone = tensors[6] is None and tensors[7] is None  # without far keys
        about = (type(state), state.degree, state.scale, recording, alone, torch.get_num_threads())
        signature = (*about, *options, type(options[0]))  # 1.0 is a scale, True is none
        last = _last.get((id(state), signature))
    except (AttributeError, TypeError, RuntimeError):  # then the check has something to say
        return None, _check(*arguments)
    done = None if last is None else compiled.decode_(last, tensors[:6], state)
    if done is not None:
        return done, None
    try:
        described = compiled.describe((*tensors, *state.all_tensors())), signature
    except (AttributeError, TypeError, RuntimeError):
        return None, _check(*arguments)
    found = _known.get(described)
    if found is None:
        state.check_layout_anew()  # someone may have put other tensors into it
        found = _check(*arguments)
        _remember(_known, described, found)
    if found.compiled is None or not found.compiled.as_they_are:
        return None, found
    if compiled.sees_tensors():
        _remember(_last, (id(state), signature), found.compiled)
    return compiled.decode_(found.compiled, tensors[:6], state), found


def _remember(known: dict[tuple[Any, ...], Any], signature: tuple[Any, ...], found: object) -> None:
    if len(known) >= _KNOWN_LIMIT:
        known.clear()
    known[signature] = found


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    log_decay: Tensor | None,
    far_gain: Tensor | None,
    far_query: Tensor | None,
    far_key: Tensor | None,
    state: State,
    scale: float | None,
    series: Series | None,
    reading: str,
    backend: str,
) -> _Step:
    far = far_query, far_key
    expect_state(state)
    shapes = check_inputs(query, key, value, Optional(visible, None, log_decay), True)
    shapes = replace(shapes, far_dim=check_far(*far, query, key, state.degree, state.near is not None))
    scale, degree = check_scale(scale, shapes.head_dim), state.degree
    check_gain(far_gain, shapes, degree, state.near is not None)
    in_place = (query, key, value, log_decay, far_gain, *far)
    check_state(state, shapes, degree, scale, state.window, state.sinks, state.heavy, in_place)
    check_choices(backend, None)
    kernels = uses_kernels(backend, query.device)
    expect(shapes.device.type != "meta", "state", "tensors with data, to change them in place", "ones on meta")
    expect(state.is_contiguous, "state", "contiguous tensors, to change them in place", "others")
    check_reading(reading, series, True)
    coefficients, positive = resolve(check_series(series), degree)
    fitted, plan = reading == "fitted", None
    checked = not positive and (degree % 2 == 1 if fitted and degree is not None else True)
    if shapes.queries == 1 and kernels and shapes.far_dim is None:
        safe_share = SAFE_SHARE * abs(coefficients[0]) if checked else None
        tensors = (query, key, value, visible, log_decay, far_gain)
        plan = compiled.plan_step(tensors, state, coefficients, fitted, safe_share)
    return _Step(shapes.queries, coefficients, checked, fitted, plan)

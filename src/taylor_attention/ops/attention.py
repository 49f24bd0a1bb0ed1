"""The public functional API: softmax attention by a truncated series, at constant cost and memory per token."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..core.basis import expand, feature_count, reading_weights
from ..core.series import Series
from ..core.state import MAX_STATE_BYTES, State, check_state_bytes, wide_dtype
from ..errors import NormaliserError, NormaliserWarning
from . import compiled
from .backends import uses_kernels
from .operator import attend
from .tiles import polynomial
from .validation import (
    Optional,
    Shapes,
    check_choices,
    check_data,
    check_inputs,
    check_scale,
    check_series,
    check_state,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SAFE_SHARE = 1e-3
"""A normaliser below this share of what its keys would give at score zero counts as not safely positive."""

FULL_RESET = -1e3
"""A log decay below this forgets everything in either precision; clamping to it keeps differences of sums finite."""

_ADVICE = (
    "the truncated series is negative for some scores, and the normaliser of {count:,} queries is not safely positive: "
    "use an even degree of exp (positive everywhere), or make the scores smaller (scale, QK-norm)"
)


class Options(TypedDict, total=False):
    """The optional arguments of `attention` that do not change what it returns."""

    causal: bool
    scale: float | None
    series: Series | None
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    log_decay: Tensor | None
    state: State | None
    backend: str
    chunk_size: int | None
    max_state_bytes: int


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, degree: int, return_state: Literal[False] = ..., **_: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, degree: int, return_state: Literal[True], **_: Unpack[Options]
) -> tuple[Tensor, State]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int,
    causal: bool = True,
    scale: float | None = None,
    series: Series | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
    max_state_bytes: int = MAX_STATE_BYTES,
) -> Tensor | tuple[Tensor, State]:
    """Attention whose weights are a truncated series of the scores instead of their exponential.

    With s_ij = scale * q_i . k_j and f(s) = sum_p c_p s^p up to `degree`, y_i = sum_j f(s_ij) v_j / sum_j f(s_ij) over
    the visible keys (for exp: the paper's equations 1 to 8). Costs do not depend on the context beyond the moments.
    Differentiable in query, key, value, log_decay and the state; sums are float32 (float64 for float64 inputs).

    Args:
        query: [B, Hq, Tq, d]; floating point, any strides.
        key: [B, Hkv, Tk, d]; Hq must be a multiple of Hkv (query head h uses key/value head h // (Hq / Hkv)).
        value: [B, Hkv, Tk, dv].
        degree: highest power of the scores, >= 0 (the paper's P - 1). Even degrees of exp are positive everywhere.
        causal: query i sees keys j <= i (then Tq == Tk); else every query sees every key.
        scale: factor on q . k; 1 / sqrt(d) if None.
        series: coefficients c_p; exp's Taylor series if None (see `taylor_attention.series`).
        key_padding_mask: bool [B, Tk], True = attend. Hidden tokens count nowhere: not in the sums, not in the
            normaliser, not as decay. A query that sees no key at all gives zeros.
        cu_seqlens: int32 [N + 1], borders of N sequences packed in one row (B == 1, Tq == Tk): 0, ..., Tk.
        log_decay: [B, Hkv, T] <= 0, forget gates (causal only): the weight of key j for query i is multiplied by
            exp(sum of log_decay over j < t <= i). -inf forgets everything before t.
        state: the tokens before these (left unchanged); its batch is B, or N with cu_seqlens.
        return_state: also return the state after these tokens.
        backend: "cpu" (compiled kernels), "torch" (PyTorch's own products, any device), or "auto": the fastest here.
        chunk_size: tokens per chunk; chosen by the library if None.
        max_state_bytes: larger states are refused.

    Returns:
        y [B, Hq, Tq, dv] in the query's dtype, and the new `State` if return_state.

        Where the series is not positive everywhere (odd degrees of exp, fitted coefficients), a query whose normaliser
        is not safely positive gives a row of NaN and a `NormaliserWarning`; see Raises for training. A NaN or Inf in
        a key or value makes NaN of the rows that see it, and of no other.

    Raises:
        ArgumentError: an argument is not as above, or the backend asked for by name cannot compute here.
        NormaliserError: a normaliser is not safely positive while gradients are being recorded (inside torch.compile:
            NaN rows instead).
    """
    optional = Optional(key_padding_mask, cu_seqlens, log_decay)
    shapes = check_inputs(query, key, value, optional, degree, causal)
    check_choices(backend, chunk_size)
    degree = len(range(degree))  # a tracer that takes ints for unknowns pins this one down
    scale = check_scale(scale, shapes.head_dim)
    if state is not None:
        check_state(state, shapes, degree, scale)
    if not torch.compiler.is_compiling():
        check_data(cu_seqlens, log_decay, shapes.keys)
    if return_state:
        features = feature_count(shapes.head_dim, degree)
        elements = 2 * shapes.sequences * shapes.kv_heads * (shapes.value_dim + 1) * features
        check_state_bytes(elements * shapes.sum_dtype.itemsize, max_state_bytes, degree)
    start = None if state is None else state.folded()
    series = check_series(series)
    coefficients, positive = _resolve(series, degree)
    q, k, v = (x.to(shapes.sum_dtype) for x in (query, key, value))
    gates = None if log_decay is None else log_decay.to(shapes.sum_dtype).clamp(min=FULL_RESET)
    sums, compensation = (None, None) if start is None else (start.sums, start.compensation)
    out, end, dropped = attend(
        q * scale,
        k,
        v,
        key_padding_mask,
        gates,
        cu_seqlens,
        sums,
        compensation,
        coefficients,
        causal,
        chunk_size or 0,
        return_state,
        backend,
    )
    if positive:
        y = _divide(out, out[..., -1] == 0)  # exactly zero only where no key is visible
    else:
        seen = _visible_weight(q, k, v, key_padding_mask, gates, cu_seqlens, sums, compensation, causal, backend)
        y = _divide_checked(out, seen, coefficients[0])
    y = y.to(query.dtype)
    if not return_state:
        return y
    tokens = _count(shapes, key_padding_mask, cu_seqlens)
    faded = None if gates is None else _sum_decay(gates, key_padding_mask, cu_seqlens)
    if state is not None:
        tokens = tokens + state.tokens
        faded = state.log_decay.clone() if faded is None else faded + state.log_decay
    return y, State.from_sums(end, dropped, tokens, faded, shapes.head_dim, degree, scale)


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
    degree = state.degree if isinstance(state, State) else 0
    shapes = check_inputs(query, key, value, Optional(key_padding_mask, None, log_decay), degree, True)
    scale = check_scale(scale, shapes.head_dim)
    check_state(state, shapes, degree, scale, in_place=(query, key, value, log_decay))
    check_choices(backend, None)
    series = check_series(series)
    series.coefficients(degree)  # raises before the state is touched
    with torch.no_grad():
        if shapes.queries != 1:
            y, after = attention(
                query,
                key,
                value,
                degree=degree,
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
        check_data(None, log_decay, 1)
        with torch.autocast(query.device.type, enabled=False):  # sums keep their dtype whatever the caller's autocast
            step = _decode_compiled if uses_kernels(backend, query.device) else _decode_one
            return step(query, key, value, state, series, key_padding_mask, log_decay)


def _decode_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    series: Series,
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
    coefficients = series.coefficients(state.degree)
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
    if series.is_positive(state.degree):
        y = _divide(out, out[..., -1] == 0)
    else:
        degree_zero = state.sums[:, :, -1, 0] * state.tail_log_decay.exp().to(state.dtype)
        seen = (degree_zero + state.tail_value[:, :, -1, tail].sum(-1)).repeat_interleave(q.shape[1], 1)
        y = _divide_checked(out, seen[..., None], coefficients[0])
    return y.to(query.dtype)


def _decode_compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    series: Series,
    visible: Tensor | None,
    log_decay: Tensor | None,
) -> Tensor:
    """As `_decode_one`, in one call of the compiled kernels."""
    q, k, v = (x.to(state.dtype) for x in (query, key, value))
    gate = None if log_decay is None else log_decay[..., 0].double().clamp(min=FULL_RESET).contiguous()
    coefficients, positive = _resolve(series, state.degree)
    safe = None if positive else _SAFE_SHARE * abs(coefficients[0])
    shown = None if visible is None else visible[:, 0].contiguous()
    y, unsafe = compiled.decode_(q, k, v, state, series, shown, gate, safe)
    if unsafe:
        _warn_unsafe(unsafe)
    return y.to(query.dtype)


def _resolve(series: Series, degree: int) -> tuple[tuple[float, ...], bool]:
    """The coefficients of a series up to a degree, and whether it is positive everywhere."""
    return series.coefficients(degree), series.is_positive(degree)


# Exact arithmetic on Python integers is nothing for a tracer. This is all that torch.compiler.assume_constant_result
# does, without the second that importing the compiler takes.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _divide(out: Tensor, empty: Tensor) -> Tensor:
    """N / Z from [N | Z], zeros where no key was visible."""
    return out[..., :-1] / torch.where(empty, 1, out[..., -1]).unsqueeze(-1)


def _divide_checked(out: Tensor, seen: Tensor, constant: float) -> Tensor:
    """As `_divide`; NaN rows where Z is not safely positive, and an error if gradients are recorded."""
    unsafe = ~(out[..., -1] > _SAFE_SHARE * abs(constant) * seen) & (seen != 0)
    if not torch.compiler.is_compiling():
        count = int(unsafe.sum())
        if count and out.requires_grad:
            raise NormaliserError(_ADVICE.format(count=count))
        if count:
            _warn_unsafe(count)
    return _divide(out, seen == 0).masked_fill(unsafe.unsqueeze(-1), torch.nan)


def _warn_unsafe(count: int) -> None:
    warnings.warn(_ADVICE.format(count=count) + "; their rows are NaN", NormaliserWarning, stacklevel=4)


@torch.no_grad()
def _visible_weight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    gates: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor | None,
    compensation: Tensor | None,
    causal: bool,
    backend: str,
) -> Tensor:
    """How many keys each query sees, faded ones for less, [B, Hq, Tq]: attention of degree 0 to values of size 0."""
    if gates is None and cu_seqlens is None:  # then counting is enough
        shown = k.new_ones(k.shape[0], 1, k.shape[2]) if visible is None else visible[:, None].to(k.dtype)
        seen = shown.cumsum(-1) if causal else shown.sum(-1, keepdim=True).expand(-1, -1, q.shape[2])
        if sums is None:
            return seen.expand(-1, q.shape[1], -1)
        return (seen + sums[:, :, -1, :1]).repeat_interleave(q.shape[1] // k.shape[1], 1)
    if sums is not None and compensation is not None:
        sums, compensation = sums[:, :, -1:, :1].contiguous(), compensation[:, :, -1:, :1].contiguous()
    nothing = v.new_zeros(*v.shape[:3], 0)
    q, k = torch.zeros_like(q[..., :1]), torch.zeros_like(k[..., :1])
    return attend(q, k, nothing, visible, gates, cu_seqlens, sums, compensation, (1.0,), causal, 0, False, backend)[0][
        ..., 0
    ]


def _count(shapes: Shapes, visible: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Visible tokens per sequence, int64."""
    if cu_seqlens is None:
        if visible is None:
            return torch.full((shapes.sequences,), shapes.keys, dtype=torch.int64, device=shapes.device)
        return visible.sum(-1)
    if visible is None:
        return cu_seqlens.diff().long()
    return _per_sequence(visible.long(), cu_seqlens)[0]


def _sum_decay(gates: Tensor, visible: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Log decay summed over visible tokens per sequence and head."""
    gates = gates if visible is None else gates.masked_fill(~visible[:, None], 0)
    gates = gates.to(wide_dtype(gates.device))
    return gates.sum(-1) if cu_seqlens is None else _per_sequence(gates, cu_seqlens)[0].transpose(0, 1)


def _per_sequence(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums over each packed sequence: [..., T] -> [..., N]."""
    running = torch.nn.functional.pad(packed.cumsum(-1), (1, 0))
    return running.index_select(-1, cu_seqlens.long()).diff(dim=-1)

"""The public functional API: softmax attention by a truncated series, at constant cost and memory per token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..core.ranges import check_tokens
from ..core.series import Series
from ..core.state import MAX_STATE_BYTES, State, check_reach, check_scale, check_state_bytes, needed_bytes, wide_dtype
from ..errors import LARGEST_INT, expect, expect_bool, expect_int
from .backends import uses_kernels
from .hybrid import attend_hybrid
from .normaliser import divide, divide_checked, note, resolve
from .operator import attend, is_recorded
from .problem import FULL_RESET
from .sequence import Sequence
from .validation import (
    Optional,
    Shapes,
    check_choices,
    check_data,
    check_far,
    check_gain,
    check_inputs,
    check_reading,
    check_series,
    check_state,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The optional arguments of `attention` that do not change what it returns."""

    window: int
    sinks: int
    heavy: int
    reading: str
    causal: bool
    scale: float | None
    series: Series | None
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    log_decay: Tensor | None
    far_gain: Tensor | None
    far_query: Tensor | None
    far_key: Tensor | None
    state: State | None
    backend: str
    chunk_size: int | None
    max_state_bytes: int


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int | None,
    return_state: Literal[False] = ...,
    **_: Unpack[Options],
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, degree: int | None, return_state: Literal[True], **_: Unpack[Options]
) -> tuple[Tensor, State]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    degree: int | None,
    window: int = 0,
    sinks: int = 0,
    heavy: int = 0,
    reading: str = "taylor",
    causal: bool = True,
    scale: float | None = None,
    series: Series | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    far_gain: Tensor | None = None,
    far_query: Tensor | None = None,
    far_key: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
    max_state_bytes: int = MAX_STATE_BYTES,
) -> Tensor | tuple[Tensor, State]:
    """Attention whose weights are a truncated series of the scores instead of their exponential.

    With s_ij = scale * q_i . k_j and f(s) = sum_p c_p s^p up to `degree`, y_i = sum_j f(s_ij) v_j / sum_j f(s_ij) over
    the visible keys (for exp: the paper's equations 1 to 8). Costs do not depend on the context beyond the moments.
    Differentiable in all tensors of numbers and the state; sums are float32 (float64 for float64 inputs).

    With a window or sinks, near keys have their true weight exp(s_ij) and only the others, the far ones, f(s_ij), in
    one sum and one normaliser. A window that holds all tokens gives softmax.

    Args:
        query: [B, Hq, Tq, d]; floating point, any strides.
        key: [B, Hkv, Tk, d]; Hq must be a multiple of Hkv (query head h uses key/value head h // (Hq / Hkv)).
        value: [B, Hkv, Tk, dv].
        degree: highest power of the scores, >= 0 (the paper's P - 1). Even degrees of exp are positive everywhere.
            None, with a window or sinks: far keys count for nothing.
        window: how many of the latest visible tokens are near, the query's own included. With near tokens or a fitted
            reading the rows of hidden tokens are zeros.
        sinks: how many of the sequence's first visible tokens are near.
        heavy: how many others are near for their weight, in each key/value head: when a token leaves the window, the
            attention that it got there decides whether it takes such a place (see `ops.heavy`).
        reading: "taylor": far weights are f(s_ij), the same for all; "fitted": the polynomial nearest to exp for scores
            that are distributed as the query's own far scores are, in mean and variance (see `ops.reading`).
        causal: query i sees keys j <= i (then Tq == Tk); else every query sees every key.
        scale: factor on q . k; 1 / sqrt(d) if None.
        series: coefficients c_p; exp's Taylor series if None (see `taylor_attention.series`). Near weights are exp.
        key_padding_mask: bool [B, Tk], True = attend. Hidden tokens count nowhere: not in the sums, not in the
            normaliser, not as decay. A query that sees no key at all gives zeros.
        cu_seqlens: int32 [N + 1], borders of N sequences packed in one row (B == 1, Tq == Tk): 0, ..., Tk.
        log_decay: [B, Hkv, T] <= 0, forget gates (causal only): the weight of key j for query i is multiplied by
            exp(sum of log_decay over j < t <= i). -inf forgets everything before t.
        far_gain: [Hq], floating point: far weights are multiplied by exp(far_gain), a factor per query head. Only with
            a window or sinks and a degree, as without near tokens it cancels. Meant for |far_gain| <= 40: exp(far_gain)
            times the sums of far weights must be finite in their dtype.
        far_query, far_key: [B, Hq, T, f] and [B, Hkv, T, f]: far scores are far_query . far_key, without a scale and of
            any size f, instead of scale * query . key; near ones stay as they are. Only with a window or sinks and a
            degree. Moments are then of size f: a few learned entries cost little; or far keys have no positions.
        state: the tokens before these (left unchanged); its batch is B, or N with cu_seqlens.
        return_state: also return the state after these tokens.
        backend: "cpu" (compiled kernels), "torch" (PyTorch's own products, any device), or "auto": the fastest here.
        chunk_size: tokens per chunk; chosen by the library if None.
        max_state_bytes: larger states are refused, and moments as large that a chunk_size asks for.

    Returns:
        y [B, Hq, Tq, dv] in the query's dtype, and the new `State` if return_state.

        Where the series is not positive everywhere (odd degrees of exp, fitted coefficients), a query whose normaliser
        is not safely positive gives a row of NaN and a `NormaliserWarning`; see Raises for training. So does a query
        whose normaliser is beyond the range of the sums, without a warning where the series is positive everywhere;
        `watch_normalisers` counts both. A NaN or Inf in a key or value makes NaN of the rows that see it, and of no
        other.

    Raises:
        ArgumentError: an argument is not as above, or the backend asked for by name cannot compute here; or a state is
            to be returned that would hold NaN or Inf, or moments too large to go on from (see `core.ranges`; inside
            torch.compile nobody looks).
        NormaliserError: a normaliser is not safely positive while gradients are being recorded (inside torch.compile:
            NaN rows instead).
    """
    optional = Optional(key_padding_mask, cu_seqlens, log_decay)
    check_reach(degree, window, sinks, heavy)
    shapes = check_inputs(query, key, value, optional, causal, near=window + sinks > 0)
    far_dim = check_far(far_query, far_key, query, key, degree, window + sinks > 0)
    shapes = shapes if far_dim is None else replace(shapes, far_dim=far_dim)
    check_reach(degree, window, sinks, heavy, shapes.moment_dim)
    check_choices(backend, chunk_size)
    expect_bool("return_state", return_state)
    expect_int("max_state_bytes", max_state_bytes, 0)
    check_reading(reading, series, causal)
    check_gain(far_gain, shapes, degree, window + sinks > 0)
    degree = None if degree is None else len(range(degree))  # a tracer that takes ints for unknowns pins this one down
    scale = check_scale(scale, shapes.head_dim)
    if state is not None:
        check_state(state, shapes, degree, scale, window, sinks, heavy)
    if not torch.compiler.is_compiling():
        uses_kernels(backend, shapes.device)  # refuses a backend that cannot compute here
        check_data(cu_seqlens, log_decay, shapes.keys)
    if return_state or (chunk_size is not None and chunk_size < shapes.keys):  # else there may be no moments at all
        rows, columns = shapes.sequences * shapes.kv_heads, shapes.value_dim + 1
        near_sizes = (window, sinks, heavy)
        needed = needed_bytes(rows, shapes.head_dim, columns, degree, near_sizes, shapes.sum_dtype, far_dim)
        check_state_bytes(needed, max_state_bytes, degree)
    start = None if state is None else state.folded()
    chunk = 0 if chunk_size is None else min(chunk_size, LARGEST_INT)
    coefficients, positive = resolve(check_series(series), degree)
    q, k, v = (x.to(shapes.sum_dtype) for x in (query, key, value))
    gates = None if log_decay is None else log_decay.to(shapes.sum_dtype).clamp(min=FULL_RESET)
    sums, compensation = (None, None) if start is None else (start.sums, start.compensation)
    near, seen, divided, fitted = None, None, False, reading == "fitted"
    if window or sinks or fitted:
        if state is None and not return_state:
            sinks, heavy = min(sinks, shapes.keys), min(heavy, shapes.keys)
        q = q * scale
        if far_query is not None and far_key is not None:
            q, k = (torch.cat((x, y.to(x.dtype)), -1) for x, y in ((q, far_query), (k, far_key)))
        sequence = Sequence(q, k, v, key_padding_mask, gates, start, window, sinks, heavy, backend, far_dim)
        found = attend_hybrid(
            sequence,
            None if degree is None else coefficients,
            cu_seqlens,
            far_gain=None if far_gain is None else far_gain.to(shapes.sum_dtype),
            fitted=fitted,
            checked=degree is not None and degree % 2 == 1 if fitted else not positive,
            chunk=chunk,
            keep=return_state,
        )
        out, end, dropped, near, seen = found.out, found.sums, found.compensation, found.near, found.seen
        divided = found.divided
    else:
        out, end, dropped, _ = attend(
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
            chunk,
            return_state,
            backend,
            is_recorded(q, k, v, gates, sums),
        )
        if not positive:
            seen = _visible_weight(q, k, v, key_padding_mask, gates, cu_seqlens, sums, compensation, causal, backend)
    if divided:
        y = out
    elif seen is None:
        y = divide(out, out[..., -1] == 0)  # exactly zero only where no key is visible
    else:
        y = divide_checked(out, seen, 1.0 if fitted else coefficients[0])
    if not torch.compiler.is_compiling():
        note(y, query)
    y = y.to(query.dtype)
    if not return_state:
        return y
    tokens = _count(shapes, key_padding_mask, cu_seqlens)
    faded = None if gates is None else _sum_decay(gates, key_padding_mask, cu_seqlens)
    if state is not None:
        tokens = tokens + state.tokens
        faded = state.log_decay.clone() if faded is None else faded + state.log_decay
    assert end is not None and dropped is not None  # kept
    after = State.from_sums(end, dropped, tokens, faded, shapes.moment_dim, degree, scale, near)
    excess = after.excess()
    if excess:
        check_tokens(
            k if far_key is None else far_key.to(k.dtype), v, key_padding_mask, degree
        )  # says which token it was, if one alone is too much
        expect(False, "state", "these tokens to leave one to go on from", excess)
    return y, after


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
    return gates.sum(-1) if cu_seqlens is None else _per_sequence(gates, cu_seqlens)[0].mT.contiguous()


def _per_sequence(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums over each packed sequence: [..., T] -> [..., N]."""
    running = torch.nn.functional.pad(packed.cumsum(-1), (1, 0))
    return running.index_select(-1, cu_seqlens.long()).diff(dim=-1)

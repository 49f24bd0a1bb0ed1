"""One decoded token in PyTorch's own products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.basis import expand, offsets, reading_weights
from ..core.near import Near
from ..core.state import State, wide_dtype
from .normaliser import divide, divide_checked, note
from .problem import FORGOTTEN, FULL_RESET
from .reading import fit, join
from .tiles import polynomial


def decode_one_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    coefficients: tuple[float, ...],
    visible: Tensor | None,
    log_decay: Tensor | None,
    far_gain: Tensor | None,
    far_query: Tensor | None,
    far_key: Tensor | None,
    fitted: bool,
    checked: bool,
) -> Tensor:
    """Append a token to a state in place and attend: the moments are read once, near tokens exactly.

    Args:
        query: [B, Hq, 1, d]; key, value: [B, Hkv, 1, ...]; visible: bool [B, 1]; log_decay: [B, Hkv, 1].
        coefficients: of the series, none without a far part. fitted: read far scores by `reading.fit`.
        far_gain: the logarithm of a factor on far weights, [Hq], or None; only with near tokens.
        far_query: [B, Hq, 1, f]; far_key: [B, Hkv, 1, f], or None: the far part has no keys of its own.
        checked: whether the normaliser may fail to be positive.
    """
    batch, heads, group = *key.shape[:2], query.shape[1] // key.shape[1]
    k, v = (x[:, :, 0].to(state.dtype) for x in (key if far_key is None else torch.cat((key, far_key), -1), value))
    u = torch.cat((v, v.new_ones(batch, heads, 1)), dim=-1)
    gate = None if log_decay is None else log_decay[..., 0].to(wide_dtype(state.device)).clamp(min=FULL_RESET)
    state.append_(k, u, gate, None if visible is None else visible[:, 0])
    q = query[:, :, 0].to(state.dtype) * state.scale
    far_q = None if far_query is None else far_query[:, :, 0].to(state.dtype)
    if visible is not None and fitted:
        q = q.masked_fill(~visible[:, None], 0)  # a fit to hidden queries has nothing to report
        far_q = None if far_q is None else far_q.masked_fill(~visible[:, None], 0)
    q = q.reshape(batch * heads, group, state.head_dim)  # [n, g, d]
    far_q = q if far_q is None else far_q.reshape(batch * heads, group, state.moment_dim)
    gain = None if far_gain is None else far_gain.to(q.dtype).view(heads, group).repeat(batch, 1)  # [n, g]
    out, seen = _read_(q, far_q, state, coefficients, gain, fitted, None if visible is None else visible[:, 0])
    out, seen = out.reshape(batch, heads * group, 1, u.shape[-1]), seen.reshape(batch, heads * group, 1)
    if visible is not None and (fitted or state.near is not None):  # hidden tokens see nothing
        out, seen = out.masked_fill(~visible[:, None, :, None], 0), seen.masked_fill(~visible[:, None], 0)
    constant = 1.0 if fitted or not coefficients else coefficients[0]
    y = divide_checked(out, seen, constant) if checked else divide(out, out[..., -1] == 0)
    if not torch.compiler.is_compiling():
        note(y, query)
    return y.to(query.dtype)


def _read_(
    q: Tensor,
    far_q: Tensor,
    state: State,
    coefficients: tuple[float, ...],
    gain: Tensor | None,
    fitted: bool,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[N | Z] [n, g, E] for scaled queries [n, g, d], and what it would be if far weights were c_0, over c_0 [n, g].

    Far tokens are read with `far_q`, and their weights count exp(gain) times, [n, g]. Near tokens note the attention
    that they get from visible queries, bool [B].
    """
    if not coefficients:
        assert state.near is not None  # a state without a degree has near tokens
        out, _ = _read_near_(q, state, state.near, visible)
        return out, out[..., -1]
    if fitted:
        powers = _read_powers(far_q, state, len(coefficients) - 1)
        out, log_factor = fit(powers)
    else:
        out = _read_far(far_q, state, coefficients)
        log_factor = torch.zeros_like(out[..., -1])
    log_factor = log_factor if gain is None else log_factor + gain
    if state.near is None and not fitted:
        return out, _count(state).expand(out.shape[:2])
    near, top = torch.zeros_like(out), log_factor
    if state.near is not None:
        near, top = _read_near_(q, state, state.near, visible)
    both, by_near, by_far = join(near, top, out, log_factor)
    constant = 1.0 if fitted else abs(coefficients[0]) or 1.0
    return both, by_near * near[..., -1] / constant + by_far * _count(state)


def _count(state: State) -> Tensor:
    """Far tokens, faded ones for less: [n, 1]."""
    moments = state.sums[:, :, -1, 0] * state.tail_log_decay.exp().to(state.dtype)
    return (moments + state.tail_value[:, :, -1, : state.tail_length].sum(-1)).view(-1, 1)


def _read_far(q: Tensor, state: State, coefficients: tuple[float, ...]) -> Tensor:
    """What the series reads from the moments and the tail: [n, g, E]."""
    weights = reading_weights(state.moment_dim, coefficients, state.dtype, state.device)
    features = expand(q, len(coefficients) - 1) * weights
    out = torch.bmm(features, state.sums.flatten(0, 1).transpose(1, 2))
    if bool(state.tail_log_decay.any()):
        out *= state.tail_log_decay.exp().to(state.dtype).view(-1, 1, 1)
    scores, values = _tail(q, state)
    return out.baddbmm_(polynomial(scores, coefficients), values)


def _read_powers(q: Tensor, state: State, degree: int) -> list[Tensor]:
    """The same for each power of the scores alone: degree + 1 times [n, g, E]."""
    ones = reading_weights(state.moment_dim, (1.0,) * (degree + 1), state.dtype, state.device)
    features, sums = expand(q, degree) * ones, state.sums.flatten(0, 1).transpose(1, 2)
    faded = state.tail_log_decay.exp().to(state.dtype).view(-1, 1, 1)
    scores, values = _tail(q, state)
    at = offsets(state.moment_dim, degree)
    return [
        torch.bmm(features[..., at[p] : at[p + 1]], sums[:, at[p] : at[p + 1]]) * faded + torch.bmm(scores**p, values)
        for p in range(degree + 1)
    ]


def _tail(q: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Scores against the tail's tokens, [n, g, t], and their values [n, t, E]."""
    tail = slice(0, state.tail_length)
    values = state.tail_value.flatten(0, 1)[..., tail].transpose(1, 2)
    return torch.bmm(q, state.tail_key.flatten(0, 1)[..., tail]), values


def _read_near_(q: Tensor, state: State, near: Near, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(-m) sum exp(s) [v, 1] over near tokens, [n, g, E], and the maximum m [n, g]."""
    exact = near.exact()
    key, value = (
        exact.key[:, :, : state.head_dim].flatten(0, 1),
        exact.value.flatten(0, 1),
    )  # [n, d, W + S + H], [n, E, W + S + H]
    since = state.log_decay[..., None] - exact.log_decay
    scores = torch.bmm(q, key) + since.to(q.dtype).flatten(0, 1)[:, None]
    forgotten = (since < FORGOTTEN).flatten(0, 1)  # a maximum must not bring it back
    scores = scores.masked_fill(((value[:, -1] == 0) | forgotten)[:, None], -torch.inf)
    if near.heavy:
        # A query that is not finite, or sees such a key, tells nothing; its own row of the output is NaN all the same.
        broken = ~near.key[:, :, : state.head_dim].isfinite().all(2).flatten(0, 1)[:, None]
        weights = scores[..., : near.window].masked_fill(broken, torch.nan).softmax(-1)
        weights = weights.where(weights.isfinite(), 0).sum(1).view_as(near.received)
        near.received += weights if visible is None else weights.masked_fill(~visible[:, None, None], 0)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    out = torch.bmm((scores - top).exp(), value.mT)
    return out + (q * 0).sum(-1, keepdim=True), top[..., 0]  # a query that is not finite makes NaN of its row

"""Exact attention to near keys as GEMMs in PyTorch, on any device, with its backward: blocks of queries.

A block of C queries stands against the C + window - 1 keys that it can see and against the sinks, whose scores are the
last columns. For query t, near keys j and the cumulative log decay L:

    m_t = max_j (q_t . k_j + L_t - L_j),  or log Z of the far part if that is larger
    out_t = exp(-m_t) far_t + sum_j exp(q_t . k_j + L_t - L_j - m_t) [v_j, 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.state import wide_dtype
from .near_problem import NearFound, NearInputs, far_factor
from .problem import FORGOTTEN

_SHORTEST = 64  # fewest queries of a block
_LONGEST = 512
_WORKSPACE = 2**21  # scores that are computed together: stays near the caches


@dataclass(frozen=True)
class _Rows:
    """Some rows (batch x key/value heads) of one problem; hidden keys are erased."""

    q: Tensor  # [n, g, T, d]
    k: Tensor  # [n, P + T, d]
    u: Tensor  # [n, P + T, E]
    hidden: Tensor | None  # bool [n, P + T]
    log_decay: Tensor | None  # [n, P + T]
    sink_k: Tensor | None  # [n, X, d]
    sink_u: Tensor | None  # [n, X, E]
    sink_from: Tensor | None  # [n, X]
    sink_until: Tensor | None  # [n, X]
    sink_log_decay: Tensor | None  # [n, X]
    total: Tensor | None  # [n, P + T]

    def part(self, rows: slice) -> _Rows:
        """Some of these rows."""
        return _Rows(*(None if x is None else x[rows] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Block:
    """Queries from `first` to `last` and what they see: keys from..to, then the sinks."""

    first: int
    last: int
    keys: slice
    k: Tensor  # [n, keys, d]
    u: Tensor  # [n, keys, E]
    exponents: Tensor  # [n, g * C, keys]: score and log decay, -inf where a query does not see a key


def forward(inputs: NearInputs) -> tuple[Tensor, Tensor]:
    """[N | Z] under the maximum, [B, Hq, T, E], and the maximum [B, Hq, T]; inputs as `guard` returns them."""
    batch, heads, tokens, _ = inputs.query.shape
    whole = _whole(inputs)
    n, group = whole.q.shape[:2]
    out = inputs.query.new_empty(n, group, tokens, inputs.columns)
    top = inputs.query.new_empty(n, group, tokens)
    far = None if inputs.far is None else inputs.far.reshape(n, group, inputs.far.shape[2], inputs.columns)
    for rows, block in _blocks(whole, inputs):
        queries = slice(block.first, block.last)
        shape = (-1, group, block.last - block.first)
        found = block.exponents.new_full(block.exponents.shape[:2], -torch.inf)
        if block.exponents.shape[2]:
            found = block.exponents.amax(-1)
        maximum = found.view(shape)
        late = max(0, min(inputs.before_far - block.first, shape[2]))  # queries of the block before the far part
        if far is not None:
            part = far[rows, :, max(0, block.first - inputs.before_far) :][:, :, : shape[2] - late]
            maximum = torch.maximum(maximum, pad(_log_normaliser(part[..., -1]), (late, 0), value=-torch.inf))
        largest = torch.finfo(maximum.dtype).max
        # Finite whatever the query: one that is not finite makes NaN of its row of `out` below, and no key gives 0.
        maximum = maximum.nan_to_num(nan=0.0, posinf=largest, neginf=0.0)
        weights = (block.exponents - maximum.flatten(1)[..., None]).exp_()
        result = torch.bmm(weights, block.u).unflatten(1, shape[1:])
        if far is not None:
            result[:, :, late:] += far_factor(maximum[..., late:])[..., None] * part
        out[rows, :, queries], top[rows, :, queries] = result, maximum
    out += (whole.q * 0).sum(-1, keepdim=True)  # a query that is not finite makes NaN of its row
    return out.view(batch, heads, tokens, inputs.columns), top.view(batch, heads, tokens)


def backward(inputs: NearInputs, grad: Tensor, top: Tensor) -> NearFound:
    """Gradients, given that of `forward`'s [N | Z] and its maximum."""
    whole = _whole(inputs)
    n, group = whole.q.shape[:2]
    grad, top = grad.reshape(n, group, *grad.shape[2:]), top.reshape(n, group, grad.shape[2])
    dq, dk, du = torch.zeros_like(whole.q), torch.zeros_like(whole.k), torch.zeros_like(whole.u)
    sinks = None
    if whole.sink_k is not None and whole.sink_u is not None:
        sinks = torch.zeros_like(whole.sink_k), torch.zeros_like(whole.sink_u)
    for rows, block in _blocks(whole, inputs):
        queries, count = slice(block.first, block.last), block.keys.stop - block.keys.start
        by_out, q = grad[rows, :, queries].flatten(1, 2), whole.q[rows, :, queries].flatten(1, 2)
        weights = (block.exponents - top[rows, :, queries].flatten(1)[..., None]).exp_()
        by_u = torch.bmm(weights.mT, by_out)
        by_score = weights.mul_(torch.bmm(by_out, block.u.mT))
        by_k = torch.bmm(by_score.mT, q)
        dq[rows, :, queries] = torch.bmm(by_score, block.k).unflatten(1, (group, -1))
        dk[rows, block.keys] += by_k[:, :count]
        du[rows, block.keys] += by_u[:, :count]
        if sinks is not None:
            sinks[0][rows] += by_k[:, count:]
            sinks[1][rows] += by_u[:, count:]
    outer = inputs.key.shape[:2]
    by_sinks = (None, None) if sinks is None else tuple(x.unflatten(0, outer) for x in sinks)
    return NearFound(dq.view(inputs.query.shape), dk.unflatten(0, outer), du.unflatten(0, outer), *by_sinks)


def _log_normaliser(z: Tensor) -> Tensor:
    """log Z where Z is positive, else -inf."""
    return torch.where(z > 0, z.clamp(min=torch.finfo(z.dtype).tiny).log(), -torch.inf)


def _whole(inputs: NearInputs) -> _Rows:
    """All rows of a problem; visible and sink_from have heads."""
    heads = inputs.key.shape[1]

    def with_one(value: Tensor) -> Tensor:
        return torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1)

    k, u, hidden = inputs.key, with_one(inputs.value), None
    if inputs.visible is not None:
        hidden = ~inputs.visible
        k, u = k.masked_fill(hidden[..., None], 0), u.masked_fill(hidden[..., None], 0)
    sink_u = None if inputs.sink_value is None else with_one(inputs.sink_value)
    return _Rows(
        inputs.query.unflatten(1, (heads, -1)).flatten(0, 1),
        k.flatten(0, 1),
        u.flatten(0, 1),
        rows(hidden),
        rows(inputs.log_decay),
        rows(inputs.sink_key),
        rows(sink_u),
        rows(inputs.sink_from),
        rows(inputs.sink_until),
        rows(inputs.fading_of_sinks()),
        rows(inputs.total()),
    )


def _blocks(whole: _Rows, inputs: NearInputs) -> Iterator[tuple[slice, _Block]]:
    """The problem in pieces of bounded size: which rows, and the block."""
    n, group, tokens, _ = whole.q.shape
    window = min(inputs.window, inputs.key.shape[2])
    length = min(max(window, _SHORTEST), _LONGEST)
    together = max(1, _WORKSPACE // (group * length * (length + window + inputs.sinks)))
    for a in range(0, n, together):
        rows = slice(a, min(a + together, n))
        part = whole.part(rows)
        for first in range(0, tokens, length):
            yield rows, _block(part, first, min(first + length, tokens), inputs.past, window)


def _block(part: _Rows, first: int, last: int, past: int, window: int) -> _Block:
    keys = slice(max(0, past + first - window + 1), past + last) if window else slice(0, 0)
    k, u = part.k[:, keys], part.u[:, keys]
    query = torch.arange(first, last, device=k.device)[:, None]  # [C, 1]
    age = past + query - torch.arange(keys.start, keys.stop, device=k.device)  # [C, keys]
    unseen = ((age < 0) | (age >= window))[None]
    if part.hidden is not None:
        unseen = unseen | part.hidden[:, None, keys]  # [n, C, keys]
    fading = None
    if part.log_decay is not None:
        total = part.log_decay[:, keys].to(wide_dtype(k.device)).cumsum(-1)
        own = total[:, total.shape[1] - (last - first) :, None] if window else total[..., None]
        fading = own - total[:, None]  # [n, C, keys]
    if part.sink_k is not None and part.sink_u is not None and part.sink_from is not None:
        k, u = torch.cat([k, part.sink_k], 1), torch.cat([u, part.sink_u], 1)
        late = part.sink_from[:, None] > query  # [n, C, X]
        if part.sink_until is not None:
            late = late | (part.sink_until[:, None] <= query)
        unseen = torch.cat([unseen.expand(late.shape[0], -1, -1), late], -1)
        if part.total is not None and part.sink_log_decay is not None:
            sinking = part.total[:, past + first : past + last, None] + part.sink_log_decay[:, None]
            fading = sinking if fading is None or not window else torch.cat([fading, sinking], -1)
    exponents = torch.bmm(part.q[:, :, first:last].flatten(1, 2), k.mT)  # [n, g * C, keys]
    by_head = exponents.unflatten(1, (-1, last - first))
    if fading is not None:
        by_head += fading.masked_fill(fading < FORGOTTEN, -torch.inf).to(k.dtype)[:, None]
    by_head.masked_fill_(unseen[:, None], -torch.inf)
    return _Block(first, last, keys, k, u, exponents)

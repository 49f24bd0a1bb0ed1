"""Exact near, Taylor far: the latest, the first and the weightiest tokens by exp itself, all others by the series.

For a query at position i, with the sum over near keys and the sum over far ones, under one maximum m:

    y_i = (sum_near e^(s - m) v + e^-m N_far) / (sum_near e^(s - m) + e^-m Z_far)

where N_far and Z_far count e^g times, if the query's head has a gain g.
Hidden tokens take no place: they are moved before all others, and their rows are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.near import Near, Tokens
from ..core.state import moment_count
from .far import Far, find_far
from .heavy import Contest, find_contest
from .near import attend_near, divide_near
from .near_problem import Check
from .normaliser import warn_unsafe
from .operator import is_recorded
from .packed import Batch, batches
from .reading import fit, join, power
from .sequence import NEVER, Sequence, with_one

_TOGETHER = 512
"""Queries for which all heavy tokens that one of them sees are compared with all."""


@dataclass(frozen=True)
class Found:
    """[N | Z] of near and far together [B, Hq, T, E], how far from zero Z may be [B, Hq, T], and what a state needs.

    divided: out is N / Z [B, Hq, T, dv] already, and unsafe normalisers have been reported.
    """

    out: Tensor
    seen: Tensor | None
    sums: Tensor | None
    compensation: Tensor | None
    near: Near | None
    divided: bool


def attend_hybrid(
    sequence: Sequence,
    coefficients: tuple[float, ...] | None,
    cu_seqlens: Tensor | None,
    *,
    far_gain: Tensor | None,
    fitted: bool,
    checked: bool,
    chunk: int,
    keep: bool,
) -> Found:
    """Near and far together.

    Args:
        coefficients: of the series, None: no far part.
        cu_seqlens: borders of packed sequences, or None.
        far_gain: the logarithm of a factor on far weights, [Hq] in the sums' dtype, or None.
        fitted: read far scores by a fit to each query's own; of the series only the degree counts then.
        checked: also say what the keys would give if far weights were c_0 (1 where fitted), gain apart, as a share of
            that.
        keep: also return what the state after these tokens consists of.
    """
    gain = None if far_gain is None else far_gain[:, None]
    part = partial(_attend, coefficients=coefficients, gain=gain)
    part = partial(part, fitted=fitted, checked=checked, chunk=chunk, keep=keep, whole=cu_seqlens is None)
    solve = partial(_attend_compacted, solve=part)
    return solve(sequence) if cu_seqlens is None else _attend_packed(sequence, cu_seqlens, solve)


def _attend_packed(sequence: Sequence, cu_seqlens: Tensor, solve: Callable[[Sequence], Found]) -> Found:
    """Packed sequences, side by side in padded batches."""
    query, value, start = sequence.query, sequence.value, sequence.start
    out = query.new_zeros(*query.shape[:3], value.shape[3] + 1)
    seen, found = query.new_zeros(query.shape[:3]), []
    members = list(batches(cu_seqlens, query.device)) or [_no_sequences(query.device)]
    for batch in members:
        part = solve(
            Sequence(
                batch.gather(query),
                batch.gather(sequence.key),
                batch.gather(value),
                batch.present if sequence.visible is None else batch.present & sequence.visible[0][batch.positions],
                None if sequence.gates is None else batch.gather(sequence.gates),
                None if start is None else start.select(batch.sequences),
                sequence.window,
                sequence.sinks,
                sequence.heavy,
                sequence.backend,
                sequence.far_dim,
            )
        )
        batch.scatter_(out, part.out)
        if part.seen is not None:
            batch.scatter_(seen, part.seen)
        found.append(part)
    order = torch.cat([batch.sequences for batch in members]).argsort()

    def join(parts: list[Tensor | None]) -> Tensor | None:
        given = [x for x in parts if x is not None]
        return torch.cat(given)[order] if given else None

    return Found(
        out,
        None if found[0].seen is None else seen,
        join([part.sums for part in found]),
        join([part.compensation for part in found]),
        _join_near([part.near for part in found if part.near is not None], order),
        False,
    )


def _no_sequences(device: torch.device) -> Batch:
    none = torch.zeros(0, 0, dtype=torch.int64, device=device)
    return Batch(none.flatten(), none, none.bool())


def _join_near(parts: list[Near], order: Tensor) -> Near | None:
    if not parts:
        return None
    columns = zip(*(part.tensors().values() for part in parts), strict=True)
    tensors = zip(parts[0].tensors(), (torch.cat(column)[order] for column in columns), strict=True)
    return Near.from_tensors(dict(tensors))


def _attend_compacted(sequence: Sequence, solve: Callable[[Sequence], Found]) -> Found:
    """Sequences of one length, whose hidden tokens are moved before all others; their rows are zeros."""
    if sequence.visible is None:
        return solve(sequence)
    order = sequence.visible.long().argsort(dim=-1, stable=True)  # [B, T]

    def move(x: Tensor, order: Tensor) -> Tensor:
        index = order.view(len(order), 1, order.shape[1], *[1] * (x.ndim - 3))
        return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))

    found = solve(
        replace(
            sequence,
            query=move(sequence.query, order),
            key=move(sequence.key, order),
            value=move(sequence.value, order),
            visible=sequence.visible.gather(1, order),
            gates=None if sequence.gates is None else move(sequence.gates, order),
        )
    )
    back, hidden = order.argsort(dim=-1), ~sequence.visible[:, None]
    out = move(found.out, back).masked_fill(hidden[..., None], 0)
    return replace(found, out=out, seen=None if found.seen is None else move(found.seen, back).masked_fill(hidden, 0))


def _attend(
    sequence: Sequence,
    coefficients: tuple[float, ...] | None,
    *,
    gain: Tensor | None,
    fitted: bool,
    checked: bool,
    chunk: int,
    keep: bool,
    whole: bool,
) -> Found:
    """Sequences of one length; see `attend_hybrid`. gain: [Hq, 1]; whole: they are all that there is."""
    contest = find_contest(sequence) if sequence.heavy else None
    far = None if coefficients is None else find_far(sequence, contest)
    end, dropped, seen, divided = None, None, None, False
    if fitted and far is not None and coefficients is not None:
        both, seen, end, dropped = _join_fitted(sequence, contest, far, len(coefficients), gain, checked, chunk, keep)
    else:
        out = None if gain is None else _nothing(sequence, gain)
        if far is not None and coefficients is not None:
            out, end, dropped = far.attend(coefficients, chunk, keep, sequence.backend)
            out = out if gain is None else gain.exp()[..., None] * out
        check = None
        if checked and coefficients is not None:
            count = None if far is None else far.count(sequence.backend)
            count = count if count is None or gain is None else gain.detach().exp() * count
            check = Check(1.0 if fitted else coefficients[0], count)
        y = _divide_near(sequence, out, check) if whole else None
        if y is not None:
            both, divided = y, True
        else:
            both, top = _attend_near(sequence, contest, out)
            seen = None if check is None else check.seen(both.detach(), top, None if out is None else out.detach())
    if not keep:
        return Found(both, seen, None, None, None, divided)
    if far is None:
        end, dropped = _moments_before(sequence, coefficients)
    after = _near_after(sequence, contest) if sequence.window or sequence.sinks else None
    return Found(both, seen, end, dropped, after, divided)


def _join_fitted(
    sequence: Sequence,
    contest: Contest | None,
    far: Far,
    terms: int,
    gain: Tensor | None,
    checked: bool,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """[N | Z] with a fit of so many terms to the far part, `Found.seen`, and the moments at the end."""
    powers, end, dropped = [], None, None
    for p in range(terms):  # the last one has the moments of all
        each, end, dropped = far.attend(power(p), chunk, keep and p + 1 == terms, sequence.backend)
        powers.append(pad(each, (0, 0, far.first, 0)))
    near, top = _attend_near(sequence, contest, None)
    out, log_factor = fit(powers)
    both, by_near, by_far = join(near, top, out, log_factor if gain is None else log_factor + gain)
    if not checked:
        return both, None, end, dropped
    seen = (by_near * near[..., -1]).detach() + by_far.detach() * pad(far.count(sequence.backend), (far.first, 0))
    return both, seen, end, dropped


def _nothing(sequence: Sequence, gain: Tensor) -> Tensor:
    """A far part of no query, [B, Hq, 0, E]; so that the gain has a gradient, of zero, in short sequences too."""
    return gain[:, :0, None] * sequence.query.new_zeros(*sequence.query.shape[:2], 0, sequence.value.shape[3] + 1)


def _attend_near(sequence: Sequence, contest: Contest | None, far: Tensor | None) -> tuple[Tensor, Tensor]:
    """The near part, joined with the far one if there is one: as `attend_near`."""
    if not (sequence.window or sequence.sinks):
        none = sequence.query.new_zeros(*sequence.query.shape[:3], sequence.value.shape[3] + 1)
        return none, none[..., 0]
    tokens = sequence.tokens
    if contest is None or tokens == 0:
        return attend_near(*_near_arguments(sequence, contest, far, 0, tokens))
    parts = [
        attend_near(*_near_arguments(sequence, contest, far, begin, min(begin + _TOGETHER, tokens)))
        for begin in range(0, tokens, _TOGETHER)
    ]
    out, top = zip(*parts, strict=True)
    return torch.cat(out, 2), torch.cat(top, 2)


def _divide_near(sequence: Sequence, far: Tensor | None, check: Check | None) -> Tensor | None:
    """N / Z of near and far together; None where gradients may be asked for or rows are still to be moved."""
    together = sequence.visible is None and sequence.heavy == 0 and (sequence.window or sequence.sinks)
    if torch.compiler.is_compiling() or not together:
        return None
    given = _near_arguments(sequence, None, far, 0, sequence.tokens)
    if is_recorded(*given[:-2]):
        return None
    y, unsafe = divide_near(*given, *((None, None) if check is None else (check.count, check.constant)))
    if check is not None and int(unsafe):
        warn_unsafe()
    return y


def _near_arguments(
    sequence: Sequence, contest: Contest | None, far: Tensor | None, begin: int, end: int
) -> tuple[Any, ...]:
    """Of `attend_near` for the queries begin..end."""
    low = max(0, sequence.past + begin - sequence.window + 1) if contest is not None else 0
    ext = slice(low, sequence.past + end)
    before = 0 if far is None else sequence.tokens - far.shape[2]  # queries without a far part
    visible, gates = sequence.ext_visible, sequence.ext_gates
    return (
        sequence.near_part(sequence.query)[:, :, begin:end],
        sequence.near_part(sequence.ext_key)[:, :, ext],
        sequence.ext_value[:, :, ext],
        None if far is None else far[:, :, max(0, begin - before) : max(0, end - before)],
        None if visible is None else visible[:, ext],
        None if gates is None else gates[..., ext],
        *_kept(sequence, contest, begin, end, low),
        sequence.window,
        sequence.backend,
    )


def _kept(
    sequence: Sequence, contest: Contest | None, begin: int, end: int, low: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sinks and heavy tokens that some query in begin..end sees, as `attend_near` takes them; ext begins at `low`."""
    parts = []
    if sequence.sinks:
        since = sequence.sink_from[:, None].expand(-1, sequence.key.shape[1], -1)
        own = sequence.sink_key, sequence.sink_value, sequence.sink_totals
        parts.append((*own, since, torch.full_like(since, NEVER)))
    if contest is not None:
        parts.append(contest.held(begin, end))
    if sum(part[0].shape[2] for part in parts) == 0:
        return None, None, None, None, None
    key, columns, totals, since, until = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    faded = None
    if sequence.fading is not None and sequence.ext_gates is not None:
        # what the sum of ext's gates, from `low` up to a query, lacks to be the log decay since the token came
        faded = -totals if sequence.start is None else sequence.start.log_decay[..., None] - totals
        if sequence.ring_gates is not None:
            faded = faded - sequence.ring_gates.to(faded.dtype).sum(-1, keepdim=True)
        faded = faded + sequence.ext_gates[..., :low].to(faded.dtype).sum(-1, keepdim=True)
    return sequence.near_part(key), columns[..., :-1], since - begin, None if contest is None else until - begin, faded


def _moments_before(sequence: Sequence, coefficients: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """Moments that no new token has joined, [B, Hkv, E, M]."""
    if sequence.start is not None:
        return sequence.start.sums.clone(), sequence.start.compensation.clone()
    batch, heads, _, head_dim = sequence.key.shape
    moment_dim = head_dim if sequence.far_dim is None else sequence.far_dim
    features = moment_count(moment_dim, None if coefficients is None else len(coefficients) - 1)
    sums = sequence.key.new_zeros(batch, heads, sequence.value.shape[3] + 1, features)
    return sums, torch.zeros_like(sums)


def _near_after(sequence: Sequence, contest: Contest | None) -> Near:
    """The ring, the sinks and the heavy tokens after the new tokens."""
    first = max(0, sequence.past + sequence.tokens - sequence.window)
    key, value = sequence.ext_key[:, :, first:], sequence.ext_value[:, :, first:]
    columns, totals = with_one(key, value), sequence.ext_totals[..., first:]
    if sequence.ext_visible is not None:
        hidden = ~sequence.ext_visible[:, None, first:]
        key, columns = key.masked_fill(hidden[..., None], 0), columns.masked_fill(hidden[..., None], 0)
        totals = totals.masked_fill(hidden, 0)
    missing = (sequence.window - key.shape[2], 0)
    ordered = Tokens(pad(key.mT, missing), pad(columns.mT, missing), pad(totals, missing))
    received = torch.zeros_like(totals) if contest is None else contest.received[..., first:]
    tokens = ordered.value.new_zeros(len(key), dtype=torch.int64) + sequence.count
    if sequence.start is not None:
        tokens = tokens + sequence.start.tokens
    near = Near.zeros(ordered.value, totals[..., :0].sum(-1), key.shape[3], sequence.window, sequence.sinks, 0)
    if sequence.sinks:
        own = (sequence.sink_key.mT, sequence.sink_value.mT, sequence.sink_totals)
        near.sink_key, near.sink_value, near.sink_log_decay = (x.contiguous() for x in own)
    if contest is not None:
        held, value, since = contest.holder
        near.heavy_key, near.heavy_value, near.heavy_log_decay = held.mT.contiguous(), value.mT.contiguous(), since
        near.heavy_priority = contest.choice.priority
    return near.with_ring(ordered, pad(received, missing), tokens)

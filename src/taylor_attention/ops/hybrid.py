"""Exact near, Taylor far: the latest and the first tokens by exp itself, all others by the series, in one normaliser.

For a query at position i, with the sum over near keys (the last W, and the sinks) and the sum over far ones,

    y_i = (sum_near e^(s - m) v + e^-m N_far) / (sum_near e^(s - m) + e^-m Z_far)

The far part is causal attention by the series to keys that lag W behind the queries: with ext the sequence of the
ring's tokens and the new ones, query t reads the key in place t of ext, W places before its own, and all before that.
Hidden tokens take no place: they are moved before all others, and their rows are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.basis import feature_count
from ..core.near import Near, Tokens
from ..core.state import State, moment_count, wide_dtype
from .near import attend_near
from .near_problem import far_factor
from .operator import attend
from .packed import Batch, batches
from .problem import FULL_RESET
from .reading import fit, join, power

_NEVER = 2**62
"""The place of a sink that has not come."""


@dataclass(frozen=True)
class Sequence:
    """New tokens and the state before them.

    query [B, Hq, T, d], scaled; key, value [B, Hkv, T, ...]; visible bool [B, T] or None; gates (log decay)
    [B, Hkv, T] or None; start: with an empty tail, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    gates: Tensor | None
    start: State | None
    window: int
    sinks: int

    @property
    def tokens(self) -> int:
        """New tokens, T."""
        return self.key.shape[2]

    @property
    def past(self) -> int:
        """Places of ext before the new tokens."""
        return 0 if self.start is None else self.window

    @cached_property
    def ring(self) -> Tokens | None:
        """The ring at the start, oldest token first; None without a start."""
        return None if self.start is None or self.start.near is None else self.start.near.in_order(self.start.tokens)

    @cached_property
    def count(self) -> Tensor | int:
        """Visible new tokens, int64 [B], or the same for all."""
        return self.tokens if self.visible is None else self.visible.sum(-1)

    @cached_property
    def fading(self) -> Tensor | None:
        """The gates of the new tokens, 0 where hidden; None if nothing fades or has faded."""
        if self.gates is None:
            faded = self.start is not None and (torch.compiler.is_compiling() or bool(self.start.log_decay.any()))
            return self.key.new_zeros(self.key.shape[:3]) if faded else None
        return self.gates if self.visible is None else self.gates.masked_fill(~self.visible[:, None], 0)

    @cached_property
    def totals(self) -> Tensor:
        """Log decay since the sequence began when each new token has come, [B, Hkv, T], in the wide type."""
        batch, heads, tokens, _ = self.key.shape
        wide = wide_dtype(self.key.device)
        if self.fading is None:
            return self.key.new_zeros(batch, heads, tokens, dtype=wide)
        totals = self.fading.to(wide).cumsum(-1)
        return totals if self.start is None else totals + self.start.log_decay[..., None]

    # ---- sinks -------------------------------------------------------------------------------------------------------

    @cached_property
    def rank(self) -> Tensor:
        """Visible tokens of the sequence before each new one, int64 [B, T]."""
        shown = self.key.new_ones(self.key.shape[0], self.tokens, dtype=torch.int64)
        shown = shown if self.visible is None else self.visible.long()
        before = shown.cumsum(-1) - shown
        return before if self.start is None else before + self.start.tokens[:, None]

    @cached_property
    def is_sink(self) -> Tensor:
        """Which new tokens are sinks, bool [B, T]."""
        first = self.rank < self.sinks
        return first if self.visible is None else first & self.visible

    @cached_property
    def sink_place(self) -> Tensor:
        """Where each sink stands among the new tokens, int64 [B, S]; T if it is none of them."""
        batch, tokens = self.rank.shape
        slot = torch.where(self.is_sink, self.rank, self.sinks)
        place = slot.new_full((batch, self.sinks + 1), tokens)
        return place.scatter(1, slot, torch.arange(tokens, device=slot.device).expand(batch, -1))[:, : self.sinks]

    @cached_property
    def sink_from(self) -> Tensor:
        """The first query that sees each sink, int64 [B, S]."""
        absent = torch.full_like(self.sink_place, _NEVER)
        if self.start is not None:
            there = torch.arange(self.sinks, device=absent.device) < self.start.tokens[:, None]
            absent = absent.masked_fill(there, -1)
        return torch.where(self.sink_place < self.tokens, self.sink_place, absent)

    def _of_sinks(self, new: Tensor, before: Tensor | None) -> Tensor:
        """The sinks' entries [B, Hkv, S, ...] of the new tokens [B, Hkv, T, ...], else what stood there before."""
        batch, heads = new.shape[:2]
        place = self.sink_place[:, None].expand(batch, heads, -1)
        new = torch.cat([new, new.new_zeros(batch, heads, 1, *new.shape[3:])], 2)  # the last one stands for none
        if new.ndim == 4:
            place = place[..., None].expand(-1, -1, -1, new.shape[3])
        found = new.gather(2, place)
        return found if before is None else torch.where(place < self.tokens, found, before)

    @property
    def _before(self) -> Near | None:
        return None if self.start is None else self.start.near

    @cached_property
    def sink_key(self) -> Tensor:
        """Keys [B, Hkv, S, d]."""
        return self._of_sinks(self.key, None if self._before is None else self._before.sink_key.mT)

    @cached_property
    def sink_value(self) -> Tensor:
        """Values with their one, [B, Hkv, S, E]."""
        new = _with_one(self.key, self.value)
        return self._of_sinks(new, None if self._before is None else self._before.sink_value.mT)

    @cached_property
    def sink_totals(self) -> Tensor:
        """Log decay since the sequence began when each sink had come, [B, Hkv, S]."""
        return self._of_sinks(self.totals, None if self._before is None else self._before.sink_log_decay)

    # ---- ext: the ring's tokens and the new ones ---------------------------------------------------------------------

    def _extend(self, ring: Tensor | None, new: Tensor, dim: int) -> Tensor:
        """The ring's entries before the new ones, and hidden new ones before both, along dim (1 of [B, T], else 2)."""
        if ring is None or not self.past:
            return new
        both = torch.cat([ring, new], dim)
        if self.visible is None:
            return both
        hidden = (self.tokens - self.visible.sum(-1))[:, None]
        place = torch.arange(self.past + self.tokens, device=hidden.device)
        place = torch.where(
            place < hidden, place + self.past, torch.where(place < hidden + self.past, place - hidden, place)
        )
        if dim == 1:
            return both.gather(1, place)
        place = place[:, None].expand(-1, both.shape[1], -1)
        return both.gather(2, place if both.ndim == 3 else place[..., None].expand(-1, -1, -1, both.shape[3]))

    @cached_property
    def ext_visible(self) -> Tensor | None:
        """Which places hold a visible token that is no sink, bool [B, P + T]; None: all."""
        shown = self.visible
        if self.sinks:
            shown = ~self.is_sink if shown is None else shown & ~self.is_sink
        if self.ring is None or not self.past:
            return shown
        if shown is None:
            shown = self.key.new_ones(self.key.shape[0], self.tokens, dtype=torch.bool)
        return self._extend(self.ring.value[:, 0, -1] != 0, shown, 1)

    @cached_property
    def ext_key(self) -> Tensor:
        """Keys [B, Hkv, P + T, d]."""
        return self._extend(None if self.ring is None else self.ring.key.mT, self.key, 2)

    @cached_property
    def ext_value(self) -> Tensor:
        """Values [B, Hkv, P + T, dv]."""
        return self._extend(None if self.ring is None else self.ring.value[:, :, :-1].mT, self.value, 2)

    @cached_property
    def ext_totals(self) -> Tensor:
        """As `totals`, [B, Hkv, P + T]."""
        return self._extend(None if self.ring is None else self.ring.log_decay, self.totals, 2)

    @cached_property
    def ring_gates(self) -> Tensor | None:
        """Log decay from slot to slot of the ring, [B, Hkv, P]; None if nothing fades or there is no ring."""
        if self.fading is None or self.ring is None or not self.past:
            return None
        steps = pad(self.ring.log_decay.diff(dim=-1), (1, 0)).to(self.fading.dtype)
        return steps.clamp(min=FULL_RESET)  # larger only from an empty slot to a token, which no pair of tokens spans

    @cached_property
    def ext_gates(self) -> Tensor | None:
        """Log decay from place to place, [B, Hkv, P + T]."""
        return None if self.fading is None else self._extend(self.ring_gates, self.fading, 2)


def _with_one(key: Tensor, value: Tensor) -> Tensor:
    """[v, 1] of tokens [B, Hkv, T, ...], all NaN where a key or a value is not finite."""
    broken = (key * 0).sum(-1, keepdim=True) + (value * 0).sum(-1, keepdim=True)
    return torch.cat((value, torch.ones_like(broken)), -1) + broken


@dataclass(frozen=True)
class Far:
    """The far part as a causal problem of its own, for queries from `first` on; see `attend`.

    Where something fades, a key that leaves the ring has faded since it came: its [v, 1] comes scaled as the value,
    and the operator's own column of ones is ignored.
    """

    first: int
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    gates: Tensor | None
    sums: Tensor | None
    compensation: Tensor | None

    def attend(
        self, coefficients: tuple[float, ...], chunk: int, keep: bool, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N | Z] of all queries [B, Hq, T, E], and if kept the moments at the end with their compensation."""
        features = feature_count(self.key.shape[3], len(coefficients) - 1)
        sums, compensation = (
            x if x is None or x.shape[3] == features else x[..., :features].contiguous()  # of a lower degree
            for x in (self.sums, self.compensation)
        )
        out, end, dropped = attend(
            self.query,
            self.key,
            self.value,
            self.visible,
            self.gates,
            None,
            sums,
            compensation,
            coefficients,
            True,
            chunk,
            keep,
            backend,
        )
        if self.gates is not None:
            out = out[..., :-1]
            end, dropped = (x[:, :, :-1].contiguous() for x in (end, dropped)) if keep else (end, dropped)
        return pad(out, (0, 0, self.first, 0)), end, dropped

    @torch.no_grad()
    def count(self, backend: str) -> Tensor:
        """How many far keys each query sees, faded ones for less: [B, Hq, T]."""
        group = self.query.shape[1] // self.key.shape[1]
        if self.gates is None:
            shown = self.key.new_ones(self.key.shape[0], 1, self.key.shape[2])
            seen = (shown if self.visible is None else self.visible[:, None].to(shown.dtype)).cumsum(-1)
            seen = seen.expand(-1, self.key.shape[1], -1) if self.sums is None else seen + self.sums[:, :, -1, :1]
            return pad(seen.repeat_interleave(group, 1), (self.first, 0))
        one = replace(
            self,
            query=torch.zeros_like(self.query[..., :1]),
            key=torch.zeros_like(self.key[..., :1]),
            value=self.value[..., -1:],
            sums=None if self.sums is None else self.sums[:, :, -2:],
            compensation=None if self.compensation is None else self.compensation[:, :, -2:],
        )
        return one.attend((1.0,), 0, False, backend)[0][..., 0]


def _far(sequence: Sequence) -> Far | None:
    """The far part; None where no query sees any far key."""
    first = sequence.window - sequence.past
    count = sequence.tokens - first
    if count <= 0:
        return None
    start, shown, gates = sequence.start, sequence.ext_visible, sequence.fading
    sums, compensation = (None, None) if start is None else (start.sums, start.compensation)
    query, key, value = sequence.query[:, :, first:], sequence.ext_key[:, :, :count], sequence.ext_value[:, :, :count]
    shown = None if shown is None else shown[:, :count]
    if gates is None:
        return Far(first, query, key, value, shown, None, sums, compensation)
    totals = sequence.ext_totals
    since = totals[..., sequence.window : sequence.window + count] - totals[..., :count]
    faded = (
        since.clamp(max=0).exp().to(key.dtype)
    )  # above 0 only for hidden tokens, moved before those that came earlier
    columns = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    if shown is not None:
        hidden = ~shown[:, None, :, None]
        key, columns = key.masked_fill(hidden, 0), columns.masked_fill(hidden, 0)
    if sums is not None and compensation is not None:
        sums, compensation = (pad(x, (0, 0, 0, 1)) for x in (sums, compensation))
    return Far(first, query, key, columns * faded[..., None], None, gates[..., first:], sums, compensation)


@dataclass(frozen=True)
class Found:
    """[N | Z] of near and far together [B, Hq, T, E], how far from zero Z may be [B, Hq, T], and what a state needs."""

    out: Tensor
    seen: Tensor | None
    sums: Tensor | None
    compensation: Tensor | None
    near: Near | None


def attend_hybrid(
    sequence: Sequence,
    coefficients: tuple[float, ...] | None,
    cu_seqlens: Tensor | None,
    *,
    fitted: bool,
    checked: bool,
    chunk: int,
    keep: bool,
    backend: str,
) -> Found:
    """Near and far together.

    Args:
        coefficients: of the series, None: no far part.
        cu_seqlens: borders of packed sequences, or None.
        fitted: read far scores by a fit to each query's own; of the series only the degree counts then.
        checked: also say what the keys would give if far weights were c_0 (1 where fitted), as a share of that.
        keep: also return what the state after these tokens consists of.
    """
    part = partial(_attend, coefficients=coefficients, fitted=fitted, checked=checked, chunk=chunk, keep=keep)
    solve = partial(_attend_compacted, solve=partial(part, backend=backend))
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
        index = order.view(len(order), 1, -1, *[1] * (x.ndim - 3))
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
    fitted: bool,
    checked: bool,
    chunk: int,
    keep: bool,
    backend: str,
) -> Found:
    """Sequences of one length; see `attend_hybrid`."""
    far = None if coefficients is None else _far(sequence)
    end, dropped, seen = None, None, None
    if far is None or coefficients is None:
        both, top = _attend_near(sequence, None, backend)
        by_far, weight = torch.zeros_like(top), both[..., -1]
    elif fitted:
        powers = []
        for p in range(len(coefficients)):  # the last one has the moments of all
            each, end, dropped = far.attend(power(p), chunk, keep and p + 1 == len(coefficients), backend)
            powers.append(each)
        near, top = _attend_near(sequence, None, backend)
        both, by_near, by_far = join(near, top, *fit(powers))
        weight = by_near * near[..., -1]
    else:
        out, end, dropped = far.attend(coefficients, chunk, keep, backend)
        both, top = _attend_near(sequence, out, backend)
        by_far = far_factor(top)
        weight = both[..., -1] - by_far * out[..., -1]
    if checked and coefficients is not None:
        seen = weight.detach() / ((1 if fitted else abs(coefficients[0])) or 1)
        seen = seen if far is None else seen + by_far.detach() * far.count(backend)
    if not keep:
        return Found(both, seen, None, None, None)
    if far is None:
        end, dropped = _moments_before(sequence, coefficients)
    return Found(both, seen, end, dropped, _near_after(sequence) if sequence.window or sequence.sinks else None)


def _attend_near(sequence: Sequence, far: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    if not (sequence.window or sequence.sinks):
        none = sequence.query.new_zeros(*sequence.query.shape[:3], sequence.value.shape[3] + 1)
        return none, none[..., 0]
    sinks: tuple[Tensor | None, ...] = (None, None, None, None)
    if sequence.sinks:
        sinks = (sequence.sink_key, sequence.sink_value[..., :-1], sequence.sink_from, _sink_decay(sequence))
    key, value, visible, gates = sequence.ext_key, sequence.ext_value, sequence.ext_visible, sequence.ext_gates
    return attend_near(sequence.query, key, value, far, visible, gates, *sinks, sequence.window, backend)


def _sink_decay(sequence: Sequence) -> Tensor | None:
    """What the sum of ext's gates up to a query lacks to be the log decay since a sink came: [B, Hkv, S]."""
    if sequence.fading is None:
        return None
    since = (
        -sequence.sink_totals if sequence.start is None else sequence.start.log_decay[..., None] - sequence.sink_totals
    )
    return since if sequence.ring_gates is None else since - sequence.ring_gates.to(since.dtype).sum(-1, keepdim=True)


def _moments_before(sequence: Sequence, coefficients: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """Moments that no new token has joined, [B, Hkv, E, M]."""
    if sequence.start is not None:
        return sequence.start.sums.clone(), sequence.start.compensation.clone()
    batch, heads, _, head_dim = sequence.key.shape
    features = moment_count(head_dim, None if coefficients is None else len(coefficients) - 1)
    sums = sequence.key.new_zeros(batch, heads, sequence.value.shape[3] + 1, features)
    return sums, torch.zeros_like(sums)


def _near_after(sequence: Sequence) -> Near:
    """The ring and the sinks after the new tokens."""
    first = max(0, sequence.past + sequence.tokens - sequence.window)
    key, value = sequence.ext_key[:, :, first:], sequence.ext_value[:, :, first:]
    columns, totals = _with_one(key, value), sequence.ext_totals[..., first:]
    if sequence.ext_visible is not None:
        hidden = ~sequence.ext_visible[:, None, first:]
        key, columns = key.masked_fill(hidden[..., None], 0), columns.masked_fill(hidden[..., None], 0)
        totals = totals.masked_fill(hidden, 0)
    missing = (sequence.window - key.shape[2], 0)
    ordered = Tokens(pad(key.mT, missing), pad(columns.mT, missing), pad(totals, missing))
    sinks = (x.contiguous() for x in _sinks_after(sequence))
    tokens = ordered.value.new_zeros(len(key), dtype=torch.int64) + sequence.count
    if sequence.start is not None:
        tokens = tokens + sequence.start.tokens
    return Near(*ordered, *sinks).with_ring(ordered, tokens)


def _sinks_after(sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks as a state keeps them: [B, Hkv, d, S], [B, Hkv, E, S], [B, Hkv, S]."""
    if sequence.sinks:
        return sequence.sink_key.mT, sequence.sink_value.mT, sequence.sink_totals
    batch, heads, _, head_dim = sequence.key.shape
    none = sequence.key.new_zeros(batch, heads, head_dim, 0)
    return none, none.new_zeros(batch, heads, sequence.value.shape[3] + 1, 0), sequence.totals[..., :0]

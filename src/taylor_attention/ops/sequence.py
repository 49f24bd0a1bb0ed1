"""Sequences as exact and far attention see them: new tokens, the state before them, and the two in one row.

Ext is the row of the ring's tokens and the new ones, so that a query has its window right before its own place. Hidden
new tokens take no place in a window: callers move them before all others (`hybrid`), and ext has them before the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.near import Near, Tokens
from ..core.state import State, wide_dtype
from .problem import FULL_RESET

NEVER = 2**62
"""A place after every token."""


class _Once:
    """A property that is computed once; functools.cached_property locks before Python 3.12, where no tracer follows."""

    def __init__(self, function: Any) -> None:
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        found = owner.__dict__[self.name] = self.function(owner)
        return found


if TYPE_CHECKING:
    once = property
else:
    once = _Once


@dataclass(frozen=True)
class Sequence:
    """New tokens and the state before them.

    query [B, Hq, T, d], scaled; key, value [B, Hkv, T, ...]; visible bool [B, T] or None; gates (log decay)
    [B, Hkv, T] or None; start: with an empty tail, or None. far_dim: queries and keys end in so many entries that are
    for the far part alone, and the others are for near tokens; None: all are for both.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    gates: Tensor | None
    start: State | None
    window: int
    sinks: int
    heavy: int
    backend: str
    far_dim: int | None = None

    def near_part(self, x: Tensor) -> Tensor:
        """Of queries or keys [..., d]: what near tokens are read with."""
        return x if self.far_dim is None else x[..., : -self.far_dim]

    def far_part(self, x: Tensor) -> Tensor:
        """Of queries or keys [..., d]: what far tokens are read with."""
        return x if self.far_dim is None else x[..., -self.far_dim :]

    @property
    def tokens(self) -> int:
        """New tokens, T."""
        return self.key.shape[2]

    @property
    def past(self) -> int:
        """Places of ext before the new tokens."""
        return 0 if self.start is None else self.window

    @once
    def ring(self) -> Tokens | None:
        """The ring at the start, oldest token first; None without a start."""
        return None if self.start is None or self.start.near is None else self.start.near.in_order(self.start.tokens)

    @once
    def count(self) -> Tensor | int:
        """Visible new tokens, int64 [B], or the same for all."""
        return self.tokens if self.visible is None else self.visible.sum(-1)

    @once
    def fading(self) -> Tensor | None:
        """The gates of the new tokens, 0 where hidden; None if nothing fades or has faded."""
        if self.gates is None:
            faded = self.start is not None and (torch.compiler.is_compiling() or bool(self.start.log_decay.any()))
            return self.key.new_zeros(self.key.shape[:3]) if faded else None
        return self.gates if self.visible is None else self.gates.masked_fill(~self.visible[:, None], 0)

    @once
    def totals(self) -> Tensor:
        """Log decay since the sequence began when each new token has come, [B, Hkv, T], in the wide type."""
        batch, heads, tokens, _ = self.key.shape
        wide = wide_dtype(self.key.device)
        if self.fading is None:
            return self.key.new_zeros(batch, heads, tokens, dtype=wide)
        totals = self.fading.to(wide).cumsum(-1)
        return totals if self.start is None else totals + self.start.log_decay[..., None]

    @property
    def first(self) -> int:
        """The first query that has more than a window of places up to its own: there a token leaves the window."""
        return self.window - self.past

    @property
    def leaving(self) -> int:
        """Tokens that leave the window, one for each query from `first` on: the places of ext from 0 on."""
        return max(0, self.tokens - self.first)

    # ---- sinks -------------------------------------------------------------------------------------------------------

    @once
    def rank(self) -> Tensor:
        """Visible tokens of the sequence before each new one, int64 [B, T]."""
        shown = self.key.new_ones(self.key.shape[0], self.tokens, dtype=torch.int64)
        shown = shown if self.visible is None else self.visible.long()
        before = shown.cumsum(-1) - shown
        return before if self.start is None else before + self.start.tokens[:, None]

    @once
    def is_sink(self) -> Tensor:
        """Which new tokens are sinks, bool [B, T]."""
        first = self.rank < self.sinks
        return first if self.visible is None else first & self.visible

    @once
    def sink_place(self) -> Tensor:
        """Where each sink stands among the new tokens, int64 [B, S]; T if it is none of them."""
        batch, tokens = self.rank.shape
        slot = torch.where(self.is_sink, self.rank, self.sinks)
        place = slot.new_full((batch, self.sinks + 1), tokens)
        return place.scatter(1, slot, torch.arange(tokens, device=slot.device).expand(batch, -1))[:, : self.sinks]

    @once
    def sink_from(self) -> Tensor:
        """The first query that sees each sink, int64 [B, S]."""
        absent = torch.full_like(self.sink_place, NEVER)
        if self.start is not None:
            there = torch.arange(self.sinks, device=absent.device) < self.start.tokens[:, None]
            absent = absent.masked_fill(there, -1)
        return torch.where(self.sink_place < self.tokens, self.sink_place, absent)

    def _of_sinks(self, new: Tensor, before: Tensor | None) -> Tensor:
        """The sinks' entries [B, Hkv, S, ...] of the new tokens [B, Hkv, T, ...], else what stood there, or 0."""
        place = self.sink_place[:, None].expand(*new.shape[:2], -1)
        if new.ndim == 4:
            place = place[..., None].expand(-1, -1, -1, new.shape[3])
        stood = new.new_zeros(place.shape) if before is None else before
        if self.tokens == 0:
            return stood.clone()  # it goes into the state after, which shares nothing with the one before
        return torch.where(place < self.tokens, new.gather(2, place.clamp(max=self.tokens - 1)), stood)

    @property
    def before(self) -> Near | None:
        """What is near at the start."""
        return None if self.start is None else self.start.near

    @once
    def sink_key(self) -> Tensor:
        """Keys [B, Hkv, S, d]."""
        return self._of_sinks(self.key, None if self.before is None else self.before.sink_key.mT)

    @once
    def sink_value(self) -> Tensor:
        """Values with their one, [B, Hkv, S, E]."""
        new = with_one(self._of_sinks(self.key, None), self._of_sinks(self.value, None))
        stood = torch.zeros_like(new) if self.before is None else self.before.sink_value.mT
        return torch.where((self.sink_place < self.tokens)[:, None, :, None], new, stood)

    @once
    def sink_totals(self) -> Tensor:
        """Log decay since the sequence began when each sink had come, [B, Hkv, S]."""
        return self._of_sinks(self.totals, None if self.before is None else self.before.sink_log_decay)

    # ---- ext: the ring's tokens and the new ones ---------------------------------------------------------------------

    def extend(self, ring: Tensor | None, new: Tensor, dim: int) -> Tensor:
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

    @once
    def ext_visible(self) -> Tensor | None:
        """Which places hold a visible token that is no sink, bool [B, P + T]; None: all."""
        shown = self.visible
        if self.sinks:
            shown = ~self.is_sink if shown is None else shown & ~self.is_sink
        if self.ring is None or not self.past:
            return shown
        if shown is None:
            shown = self.key.new_ones(self.key.shape[0], self.tokens, dtype=torch.bool)
        return self.extend(self.ring.value[:, 0, -1] != 0, shown, 1)

    @once
    def ext_key(self) -> Tensor:
        """Keys [B, Hkv, P + T, d]."""
        return self.extend(None if self.ring is None else self.ring.key.mT, self.key, 2)

    @once
    def ext_value(self) -> Tensor:
        """Values [B, Hkv, P + T, dv]."""
        return self.extend(None if self.ring is None else self.ring.value[:, :, :-1].mT, self.value, 2)

    @once
    def ext_totals(self) -> Tensor:
        """As `totals`, [B, Hkv, P + T]."""
        return self.extend(None if self.ring is None else self.ring.log_decay, self.totals, 2)

    @once
    def ring_gates(self) -> Tensor | None:
        """Log decay from slot to slot of the ring, [B, Hkv, P]; None if nothing fades or there is no ring."""
        if self.fading is None or self.ring is None or not self.past:
            return None
        steps = pad(self.ring.log_decay.diff(dim=-1), (1, 0)).to(self.fading.dtype)
        return steps.clamp(min=FULL_RESET)  # larger only from an empty slot to a token, which no pair of tokens spans

    @once
    def ext_gates(self) -> Tensor | None:
        """Log decay from place to place, [B, Hkv, P + T]."""
        return None if self.fading is None else self.extend(self.ring_gates, self.fading, 2)


def with_one(key: Tensor, value: Tensor) -> Tensor:
    """[v, 1] of tokens [B, Hkv, T, ...], all NaN where a key or a value is not finite."""
    broken = (key * 0).sum(-1, keepdim=True) + (value * 0).sum(-1, keepdim=True)
    return torch.cat((value, torch.ones_like(broken)), -1) + broken

"""The tokens that stay exact: a ring of the latest ones, the first ones ("sinks"), some for their weight ("heavy").

All are of fixed number. A token is in the ring until `window` others have come after it; then it joins the far moments,
or takes the place of a heavy token, which joins them instead. A sink stays for ever, and is neither in the ring nor in
the moments. Only visible tokens count. Where they stand in the ring follows from how many there have been: the n-th
token (from 0) that is no sink is in slot n % window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import expect
from .values import check_finite, check_log_decay

_TENSORS = {  # whose slots there are, and what stands in them
    "key": ("window", "key"),
    "value": ("window", "value"),
    "log_decay": ("window", "number"),
    "received": ("window", "number"),
    "sink_key": ("sinks", "key"),
    "sink_value": ("sinks", "value"),
    "sink_log_decay": ("sinks", "number"),
    "heavy_key": ("heavy", "key"),
    "heavy_value": ("heavy", "value"),
    "heavy_log_decay": ("heavy", "number"),
    "heavy_priority": ("heavy", "number"),
}
_all = attrgetter(*_TENSORS)
_WIDE = [name for name, (_, kind) in _TENSORS.items() if kind == "number"]  # float64 whatever the dtype
_PREFIX = "near_"


class Tokens(NamedTuple):
    """Keys [B, Hkv, d, n], values [v, 1] [B, Hkv, E, n] (zeros: none), total log decay [B, Hkv, n]; or one of each."""

    key: Tensor
    value: Tensor
    log_decay: Tensor


@dataclass(eq=False)
class Near:
    """Keys, values [v, 1] and the total log decay (since the sequence began) when each token had come.

    Attributes:
        key: [B, Hkv, d, W], the ring. Where the far part has keys of its own, each stands behind its key.
        value: [B, Hkv, E, W]; zeros where there is no token yet.
        log_decay: float64 [B, Hkv, W] (float32 on devices without it).
        received: float64 [B, Hkv, W], the attention that each token in the ring has got so far (see `ops.heavy`).
        sink_key, sink_value, sink_log_decay: the same for sinks, in the order in which they came; zeros: not yet.
        heavy_key, heavy_value, heavy_log_decay: the same for heavy tokens, zeros where none is.
        heavy_priority: float64 [B, Hkv, H], by which they hold their places; -inf where none is.
    """

    key: Tensor
    value: Tensor
    log_decay: Tensor
    received: Tensor
    sink_key: Tensor
    sink_value: Tensor
    sink_log_decay: Tensor
    heavy_key: Tensor
    heavy_value: Tensor
    heavy_log_decay: Tensor
    heavy_priority: Tensor

    @classmethod
    def zeros(cls, sums: Tensor, log_decay: Tensor, head_dim: int, window: int, sinks: int, heavy: int) -> Near:
        """No token yet, for moments like these [B, Hkv, E, M] and log decay like this [B, Hkv]."""
        batch, heads, columns, _ = sums.shape

        def slots(size: int) -> tuple[Tensor, Tensor, Tensor]:
            key, value = (sums.new_zeros(batch, heads, rows, size) for rows in (head_dim, columns))
            return key, value, log_decay.new_zeros(batch, heads, size)

        received = log_decay.new_zeros(batch, heads, window)
        priority = log_decay.new_full((batch, heads, heavy), -torch.inf)
        return cls(*slots(window), received, *slots(sinks), *slots(heavy), priority)

    @property
    def window(self) -> int:
        """Tokens in the ring."""
        return self.key.shape[3]

    @property
    def sinks(self) -> int:
        """Sinks, those to come included."""
        return self.sink_key.shape[3]

    @property
    def heavy(self) -> int:
        """Places for heavy tokens."""
        return self.heavy_key.shape[3]

    @property
    def is_contiguous(self) -> bool:
        """Whether every tensor is contiguous."""
        return (  # one by one: every decoding step asks
            self.key.is_contiguous()
            and self.value.is_contiguous()
            and self.log_decay.is_contiguous()
            and self.sink_key.is_contiguous()
            and self.sink_value.is_contiguous()
            and self.sink_log_decay.is_contiguous()
            and (self.heavy == 0 or all(getattr(self, name).is_contiguous() for name in _TENSORS))
        )

    def exact(self) -> Tokens:
        """All of them side by side: the ring's, the sinks, the heavy ones, [B, Hkv, ..., W + S + H] each."""
        sinks = Tokens(self.sink_key, self.sink_value, self.sink_log_decay)
        return Tokens(*(torch.cat(each, -1) for each in zip(self._ring(), sinks, self._heavy(), strict=True)))

    def in_order(self, tokens: Tensor) -> Tokens:
        """The ring with its oldest token first, empty places before it, after so many visible tokens int64 [B]."""
        places = torch.arange(self.window, device=tokens.device)
        return _pick(self._ring(), (self._next(tokens) + places) % max(1, self.window))

    def received_in_order(self, tokens: Tensor) -> Tensor:
        """`received` in the order of `in_order`."""
        places = (torch.arange(self.window, device=tokens.device) + self._next(tokens)) % max(1, self.window)
        return _pick_numbers(self.received, places[:, None].expand(-1, self.key.shape[1], -1))

    def with_ring(self, ordered: Tokens, received: Tensor, tokens: Tensor) -> Near:
        """The same with another ring: the inverse of `in_order`."""
        places = (torch.arange(self.window, device=tokens.device) - self._next(tokens)) % max(1, self.window)
        ring = _pick(ordered, places)
        received = _pick_numbers(received, places[:, None].expand(-1, received.shape[1], -1))
        return replace(self, key=ring.key, value=ring.value, log_decay=ring.log_decay, received=received)

    def push_(self, token: Tokens, tokens: Tensor, visible: Tensor | None) -> Tokens:
        """Take in a token in place; the one that leaves for the far moments, zeros if none does.

        Args:
            token: the new one, [B, Hkv, ...] each, zeros where hidden.
            tokens: int64 [B], visible ones before it.
            visible: bool [B], None: all.
        """
        sink = tokens < self.sinks
        comes = ~sink
        if visible is not None:
            sink, comes = sink & visible, comes & visible
        here = sink[:, None] & (torch.arange(self.sinks, device=tokens.device) == tokens[:, None])  # [B, S]
        _put_(Tokens(self.sink_key, self.sink_value, self.sink_log_decay), token, here)
        goes = token if self.window == 0 else Tokens(*(x[..., 0] for x in self.in_order(tokens)))
        goes = goes._replace(value=goes.value.masked_fill(~comes[:, None, None], 0))
        if self.heavy:
            goes = self._compete_(goes, self.received_in_order(tokens)[..., 0], comes)
        slots = torch.arange(self.window, device=tokens.device)
        slot = comes[:, None] & (slots == self._next(tokens) % max(1, self.window))
        _put_(self._ring(), token, slot)
        self.received.masked_fill_(slot[:, None], 0)
        return goes

    def _compete_(self, goes: Tokens, received: Tensor, comes: Tensor) -> Tokens:
        """One step of `ops.heavy.choose`, in place: a leaving token may take a place; who joins the far moments."""
        priority = received.log() - goes.log_decay  # [B, Hkv]
        lowest, place = self.heavy_priority.min(-1)
        enters = comes[:, None] & (goes.value[..., -1] != 0) & (priority > lowest)
        here = enters[..., None] & (torch.arange(self.heavy, device=place.device) == place[..., None])  # [B, Hkv, H]
        evicted = _pick_each(self._heavy(), place[..., None])
        _put_(self._heavy(), goes, here)
        self.heavy_priority.copy_(torch.where(here, priority[..., None], self.heavy_priority))
        pairs = zip(evicted, goes, strict=True)
        return Tokens(*(torch.where(enters if y.ndim == 2 else enters[..., None], x[..., 0], y) for x, y in pairs))

    def followed_by(self, later: Near, tokens: Tensor, others: Tensor, before: Tensor) -> tuple[Near, Tokens]:
        """The ring of this sequence and then another's, and what leaves this one; without sinks and heavy tokens.

        Args:
            tokens, others: int64 [B], visible tokens of this and of the other sequence.
            before: [B, Hkv], total log decay at the end of this one.
        """
        mine, other = self.in_order(tokens), later.in_order(others)
        other = other._replace(log_decay=other.log_decay + before[..., None])
        both = Tokens(*(torch.cat([a, b], -1) for a, b in zip(mine, other, strict=True)))
        places = torch.arange(self.window, device=tokens.device)
        kept = others.clamp(max=self.window)[:, None]  # of the other ring
        ordered = _pick(both, places + torch.where(places >= self.window - kept, self.window, kept))
        left = mine._replace(value=mine.value.masked_fill((places >= kept)[:, None, None], 0))
        return self.with_ring(ordered, torch.zeros_like(ordered.log_decay), tokens + others), left

    def _ring(self) -> Tokens:
        return Tokens(self.key, self.value, self.log_decay)

    def _heavy(self) -> Tokens:
        return Tokens(self.heavy_key, self.heavy_value, self.heavy_log_decay)

    def _next(self, tokens: Tensor) -> Tensor:
        """Tokens that have come to the ring, [B, 1]: the next one's slot, if divided by the window."""
        return (tokens - self.sinks).clamp(min=0)[:, None]

    def each(self, function: Callable[[Tensor], Tensor]) -> Near:
        """The same with a function applied to every tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def convert(self, device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Near:
        """The same elsewhere, keys and values in `dtype`, the rest in `wide`."""
        narrow: dict[str, Any] = {name: getattr(self, name).to(wide) for name in _WIDE}
        moved = replace(self, **narrow).each(lambda x: x.to(device, copy=True))
        changed: dict[str, Any] = {name: getattr(moved, name).to(dtype) for name in _TENSORS if name not in _WIDE}
        return replace(moved, **changed)

    def assign_(self, other: Near) -> None:
        """Take over another's content in place."""
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name that it has in a file."""
        return {_PREFIX + name: getattr(self, name) for name in _TENSORS}

    def all_tensors(self) -> tuple[Tensor, ...]:
        """The same without names."""
        return _all(self)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Near | None:
        """The inverse of `tensors()`; None if there are none, KeyError if some are missing."""
        if not any(name.startswith(_PREFIX) for name in tensors):
            return None
        return cls(*(tensors[_PREFIX + name] for name in _TENSORS))

    def check_layout(self, sums: Tensor, moment_dim: int, wide: torch.dtype) -> None:
        """Raise `ArgumentError` unless types, shapes and devices go with moments [B, Hkv, E, M] of such keys."""
        batch, heads, columns, _ = sums.shape
        good = isinstance(self.key, Tensor) and self.key.ndim == 4 and self.key.shape[2] >= moment_dim
        expect(good, _PREFIX + "key", f"a tensor [B, Hkv, {moment_dim} or more, W]", self.key)
        rows = {"key": (self.key.shape[2],), "value": (columns,), "number": ()}
        for name, (_, kind) in _TENSORS.items():
            tensor = getattr(self, name)
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device == sums.device
            axes = 3 + len(rows[kind])
            good = dense and tensor.ndim == axes
            expect(good, _PREFIX + name, f"a dense tensor of {axes} axes on {sums.device}", tensor)
        for name, (slots, kind) in _TENSORS.items():
            tensor, shape = getattr(self, name), (batch, heads, *rows[kind], getattr(self, slots))
            expect(tensor.shape == shape, _PREFIX + name, f"shape {shape}", tuple(tensor.shape))
            dtype = wide if kind == "number" else sums.dtype
            expect(tensor.dtype == dtype, _PREFIX + name, str(dtype), tensor.dtype)

    def check_values(self) -> None:
        """Raise `ValueError` for values that attention never leaves here."""
        for name, (_, kind) in _TENSORS.items():
            tensor = getattr(self, name)
            if kind != "number":
                check_finite(_PREFIX + name, tensor)
            elif name.endswith("log_decay"):
                check_log_decay(_PREFIX + name, tensor)
        check_finite(_PREFIX + "received", self.received)
        expect(bool((self.received >= 0).all()), _PREFIX + "received", "numbers >= 0", "others")
        expect(not bool(self.heavy_priority.isnan().any()), _PREFIX + "heavy_priority", "no NaN", "NaN")


def _pick(tokens: Tokens, places: Tensor) -> Tokens:
    """Those in other places, int64 [B, n]."""
    return _pick_each(tokens, places[:, None].expand(-1, tokens.key.shape[1], -1))


def _pick_each(tokens: Tokens, places: Tensor) -> Tokens:
    """Those in other places for each head, int64 [B, Hkv, n]."""
    return Tokens(*(_pick_numbers(x, places) for x in tokens))


def _pick_numbers(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(-1, places if x.ndim == 3 else places[:, :, None].expand(-1, -1, x.shape[2], -1))


def _put_(slots: Tokens, token: Tokens, here: Tensor) -> None:
    """Write a token [B, Hkv, ...] in place where bool [B, n] or [B, Hkv, n] says."""
    here = here[:, None] if here.ndim == 2 else here
    for kept, new in zip(slots, token, strict=True):
        kept.copy_(torch.where(here if kept.ndim == 3 else here[:, :, None], new[..., None], kept))

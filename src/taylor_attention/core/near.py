"""The tokens that stay exact: a ring of the latest ones, and the first ones of the sequence ("sinks").

Both are of fixed size. A token is in the ring until `window` others have come after it, and then joins the far moments;
a sink stays for ever, and is neither in the ring nor in the moments. Only visible tokens count. Where they stand
follows from how many there have been: the n-th token (from 0) that is no sink is in slot n % window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import expect

_TENSORS = ("key", "value", "log_decay", "sink_key", "sink_value", "sink_log_decay")
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
        key: [B, Hkv, d, W], the ring.
        value: [B, Hkv, E, W]; zeros where there is no token yet.
        log_decay: float64 [B, Hkv, W] (float32 on devices without it).
        sink_key, sink_value, sink_log_decay: the same for sinks, in the order in which they came; zeros: not yet.
    """

    key: Tensor
    value: Tensor
    log_decay: Tensor
    sink_key: Tensor
    sink_value: Tensor
    sink_log_decay: Tensor

    @classmethod
    def zeros(cls, sums: Tensor, log_decay: Tensor, head_dim: int, window: int, sinks: int) -> Near:
        """No token yet, for moments like these [B, Hkv, E, M] and log decay like this [B, Hkv]."""
        batch, heads, columns, _ = sums.shape
        sizes = (window, sinks)
        (key, sink_key), (value, sink_value) = (
            [sums.new_zeros(batch, heads, rows, size) for size in sizes] for rows in (head_dim, columns)
        )
        decay, sink_decay = (log_decay.new_zeros(batch, heads, size) for size in sizes)
        return cls(key, value, decay, sink_key, sink_value, sink_decay)

    @property
    def window(self) -> int:
        """Tokens in the ring."""
        return self.key.shape[3]

    @property
    def sinks(self) -> int:
        """Sinks, those to come included."""
        return self.sink_key.shape[3]

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
        )

    def in_order(self, tokens: Tensor) -> Tokens:
        """The ring with its oldest token first, empty places before it, after so many visible tokens int64 [B]."""
        places = torch.arange(self.window, device=tokens.device)
        return _pick(self._ring(), (self._next(tokens) + places) % max(1, self.window))

    def with_ring(self, ordered: Tokens, tokens: Tensor) -> Near:
        """The same with another ring: the inverse of `in_order`."""
        places = torch.arange(self.window, device=tokens.device)
        ring = _pick(ordered, (places - self._next(tokens)) % max(1, self.window))
        return replace(self, key=ring.key, value=ring.value, log_decay=ring.log_decay)

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
        slots = torch.arange(self.window, device=tokens.device)
        _put_(self._ring(), token, comes[:, None] & (slots == self._next(tokens) % max(1, self.window)))
        return goes

    def followed_by(self, later: Near, tokens: Tensor, others: Tensor, before: Tensor) -> tuple[Near, Tokens]:
        """The ring of this sequence and then another's, and what leaves this one; without sinks.

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
        return self.with_ring(ordered, tokens + others), left

    def _ring(self) -> Tokens:
        return Tokens(self.key, self.value, self.log_decay)

    def _next(self, tokens: Tensor) -> Tensor:
        """Tokens that have come to the ring, [B, 1]: the next one's slot, if divided by the window."""
        return (tokens - self.sinks).clamp(min=0)[:, None]

    def each(self, function: Callable[[Tensor], Tensor]) -> Near:
        """The same with a function applied to every tensor."""
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)

    def convert(self, device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Near:
        """The same elsewhere, keys and values in `dtype`, log decays in `wide`."""
        narrow = replace(self, log_decay=self.log_decay.to(wide), sink_log_decay=self.sink_log_decay.to(wide))
        moved = narrow.each(lambda x: x.to(device))
        changed: dict[str, Any] = {name: getattr(moved, name).to(dtype) for name in _TENSORS if "decay" not in name}
        return replace(moved, **changed)

    def assign_(self, other: Near) -> None:
        """Take over another's content in place."""
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name that it has in a file."""
        return {_PREFIX + name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Near | None:
        """The inverse of `tensors()`; None if there are none, KeyError if some are missing."""
        if not any(name.startswith(_PREFIX) for name in tensors):
            return None
        return cls(*(tensors[_PREFIX + name] for name in _TENSORS))

    def check_layout(self, sums: Tensor, head_dim: int, wide: torch.dtype) -> None:
        """Raise `ValueError` unless shapes and types go with moments [B, Hkv, E, M]."""
        batch, heads, columns, _ = sums.shape
        for prefix, slots in {"": self.window, "sink_": self.sinks}.items():
            rows = {"key": (head_dim,), "value": (columns,), "log_decay": ()}
            for name, row in rows.items():
                tensor, shape = getattr(self, prefix + name), (batch, heads, *row, slots)
                expect(tensor.shape == shape, _PREFIX + prefix + name, f"shape {shape}", tuple(tensor.shape))
                dtype = wide if name == "log_decay" else sums.dtype
                expect(tensor.dtype == dtype, _PREFIX + prefix + name, str(dtype), tensor.dtype)


def _pick(tokens: Tokens, places: Tensor) -> Tokens:
    """Those in other places, int64 [B, n]."""

    def pick(x: Tensor) -> Tensor:
        index = places.view(len(places), *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)
        return x.gather(-1, index)

    return Tokens(*map(pick, tokens))


def _put_(slots: Tokens, token: Tokens, here: Tensor) -> None:
    """Write a token [B, Hkv, ...] in place where bool [B, n] says."""
    for kept, new in zip(slots, token, strict=True):
        where = here.view(len(here), *[1] * (kept.ndim - 2), -1)
        kept.copy_(torch.where(where, new[..., None], kept))

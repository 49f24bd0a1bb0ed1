"""Streams of tokens without end that are hard on long sums. Any block of one is drawn on its own, from seed and place.

Queries and keys are as long as QK-norm makes them, so that scores lie within -1 and 1, where the series is positive at
any degree; longer ones where a stream says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

RATES = (1e-3, 1e-6, 1e-9)
"""Log decay per token of the heads of "decay", in turns: they remember 1e3, 1e6 and 1e9 tokens."""

OUTLIER, OUTLIER_EVERY = 1000.0, 2**20
"""How much larger than others the key and value of an outlier are, and one in how many tokens is one."""


@dataclass(frozen=True)
class Tokens:
    """A block: query, key and value [1, H, T, d] in float32, and log_decay [1, H, T] or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """As `attention` and `decode_` take them."""
        return {"query": self.query, "key": self.key, "value": self.value, "log_decay": self.log_decay}


_APART = 0x9E3779B1
"""Blocks between one seed's stream and the next one's; odd, so that no two seeds below 2^32 have the same."""

Stream = Callable[[Tokens, Tokens, Tensor], Tokens]
"""What a stream makes of random tokens, one random token that is always the same, and the places in the stream [T]."""


def _random(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    return drawn


def _constant(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    """Equal terms are all rounded to the same side."""
    return replace(drawn, key=fixed.key.expand_as(drawn.key), value=fixed.value.expand_as(drawn.value))


def _alternating(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    """Half of the moments are sums of terms of one sign, the others of signs that alternate."""
    sign = _column(1 - 2 * (place % 2))
    return Tokens(drawn.query.abs(), sign * drawn.key.abs(), sign * drawn.value.abs())


def _growing(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    """Norms grow without end, like the fourth root of the place."""
    norm = _column((1 + place / 1024) ** 0.25)
    return replace(drawn, key=norm * drawn.key, value=norm * drawn.value)


def _outlier(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    """One token in a million outweighs all others together; scores are positive, or a normaliser might vanish."""
    size = _column(torch.where(place % OUTLIER_EVERY == OUTLIER_EVERY // 16, OUTLIER, 1.0))
    return Tokens(drawn.query.abs(), size * drawn.key.abs(), size * drawn.value)


def _decay(drawn: Tokens, fixed: Tokens, place: Tensor) -> Tokens:
    """Gates that are always the same: what a factor loses to rounding, it loses every time."""
    rates = torch.tensor([RATES[head % len(RATES)] for head in range(drawn.key.shape[1])])
    return replace(drawn, value=drawn.value.abs(), log_decay=-rates[:, None].expand(drawn.key.shape[:3]).contiguous())


def _column(x: Tensor) -> Tensor:
    return x.float()[:, None]


STREAMS: dict[str, Stream] = {
    "random": _random,
    "constant": _constant,
    "alternating": _alternating,
    "growing": _growing,
    "outlier": _outlier,
    "decay": _decay,
}
"""By name."""


def draw(stream: str, seed: int, block: int, length: int, heads: int, head_dim: int) -> Tokens:
    """The tokens block * length..(block + 1) * length of a stream."""
    drawn, fixed = _normal(seed, block, length, heads, head_dim), _normal(seed, -1, 1, heads, head_dim)
    return STREAMS[stream](drawn, fixed, torch.arange(block * length, (block + 1) * length))


def _normal(seed: int, block: int, length: int, heads: int, head_dim: int) -> Tokens:
    """Random tokens, others for each seed and block."""
    generator = torch.Generator().manual_seed((seed * _APART + block) % 2**32)  # the generator takes no more bits
    query, key, value = (torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3))
    query, key = (head_dim**0.25 * x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    return Tokens(query, key, value)

"""Streams with planted needles.

A stream of random tokens, and a query at its end that scores them all alike (normal, of a mean and a spread), but for a
few keys at one age, the needles, that are higher than that mean by a margin and have values of their own.

All keys have the same norm, and of the queries before the last one most score needles as they score the background. The
others, each query with the chance `asked`, are the last one come early: where that is 0 nothing gives a needle away
before it is asked for at the end. Half of the background's variance of values is a vector that all tokens
of a head share, without which softmax itself would give next to nothing where no token stands out, and every
error would be large beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .needles_plan import Case, Settings

REACH = 16.0
"""The score of a key that points where the query does; the query's norm, since keys have that of sqrt(head_dim)."""

MAX_TIES = 1024

COMMON = 0.5
"""Part of the variance of background values that all tokens of a head share."""


@dataclass(frozen=True)
class Stream:
    """The background of all streams, [seeds, heads, length, d] each, and needles to plant, without their scores.

    Attributes:
        direction: [seeds, heads, 1, d], of unit length; the last query, and each that asks early, is `REACH` times it.
        side, worth: [seeds, heads, MAX_TIES, d], the needles' parts across the direction, of unit length, and values.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    direction: Tensor
    side: Tensor
    worth: Tensor

    @classmethod
    def draw(cls, settings: Settings) -> Stream:
        """The streams of these settings; each sequence depends on its own seed alone."""
        seeds = range(settings.seed, settings.seed + settings.seeds)
        parts = zip(*(_draw(settings, torch.Generator().manual_seed(seed)) for seed in seeds), strict=True)
        return cls(*(torch.stack(part) for part in parts))

    @property
    def length(self) -> int:
        """Tokens, the last query's own included."""
        return self.key.shape[2]

    def plant(self, case: Case, mean: float) -> tuple[Tensor, Tensor]:
        """Keys and values [seeds, heads, ties, d] of the needles."""
        score = torch.tensor(mean + case.margin)
        key = _with_score(score, self.direction, self.side[:, :, : case.ties])
        return key, self.worth[:, :, : case.ties]

    @cached_property
    def scores(self) -> Tensor:
        """Of the background with the last query, float64 [seeds, heads, length]."""
        return torch.stack(
            [scores_of(*pair) for pair in zip(self.query[:, :, -1:], self.key, strict=True)]
        )  # one sequence at a time, since these are long


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """Scaled scores in float64: [heads, 1, d], [heads, T, d] -> [heads, T]."""
    return (key.double() @ query.double().mT)[..., 0] * key.shape[-1] ** -0.5


def _draw(settings: Settings, generator: torch.Generator) -> tuple[Tensor, ...]:
    heads, length, d = settings.heads, settings.length, settings.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(heads, *shape, generator=generator)

    direction = torch.nn.functional.normalize(normal(1, d), dim=-1)
    side, worth = _across(normal(MAX_TIES, d), direction), normal(MAX_TIES, d)
    usual = settings.spread * normal(length, d)
    score = settings.mean + settings.spread * normal(length, 1)
    key = _with_score(score, direction, _across(normal(length, d), direction))
    value = COMMON**0.5 * normal(1, d) + (1 - COMMON) ** 0.5 * normal(length, d)
    asks = torch.rand(heads, length, 1, generator=generator) < settings.asked
    asks[:, -1] = True
    query = torch.where(asks, REACH * direction, usual)
    return query, key, value, direction, side, worth


def _across(x: Tensor, direction: Tensor) -> Tensor:
    """The part of x across a direction, made of unit length."""
    return torch.nn.functional.normalize(x - (x * direction).sum(-1, keepdim=True) * direction, dim=-1)


def _with_score(score: Tensor, direction: Tensor, side: Tensor) -> Tensor:
    """Keys of norm sqrt(d) whose scores with the last query are these, [..., 1] or one for all."""
    cosine = (score / REACH).clamp(-1, 1)
    return side.shape[-1] ** 0.5 * (cosine * direction + (1 - cosine**2).sqrt() * side)

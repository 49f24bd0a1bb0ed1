"""Tasks that ask for what stood earlier in a sequence, drawn at random: sizes to train on, and more to be tested on.

The settings of multi-query associative recall are those of Zoology (Arora et al. 2023; pairs first, then each key once,
gaps by a power law of exponent 0.01 - 1) and Based (Arora et al. 2024; trained on sequences of 4 to 64 pairs, 2 layers,
a short convolution, no positions), smaller: 256 keys and 256 values instead of 8,192 symbols, and hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from ...lm.data import load_split, to_tensor

IGNORED = -100
"""Target where nothing is asked."""

Drawn = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [count, T] each; a target is what follows its token."""


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: in cases. title: for people. size: what the sizes count.
        symbols: size of the vocabulary.
        train, test: sizes; those to be tested on that are not trained on ask for more than was practised.
        hard: the size to compare at.
        answer: symbols of an answer, all of which have to be right.
        tokens: length of a sequence of a size.
        draw: count sequences of a size; `held_out`: from text that was not trained on, where there is any.
    """

    name: str
    title: str
    size: str
    symbols: int
    train: tuple[int, ...]
    test: tuple[int, ...]
    hard: int
    answer: int
    tokens: Callable[[int], int]
    draw: Callable[[Generator, int, int, bool], Drawn]


_KEYS = 256
_POWER = 0.01 - 1  # of the gaps between a pair and its query, as in Zoology


def draw_associations(generator: Generator, count: int, pairs: int, held_out: bool = False) -> Drawn:
    """`pairs` different keys, each with its value; then each key once more, where its value is asked for.

    Between the queries stand random values, so that no filler is a key. T = max(64, 4 pairs).
    """
    keys, values = (_choose(generator, count, _KEYS, pairs) for _ in range(2))
    values = values + _KEYS
    tokens = torch.randint(_KEYS, 2 * _KEYS, (count, _length_of_pairs(pairs)), generator=generator)
    targets = torch.full_like(tokens, IGNORED)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = (tokens.shape[1] - 2 * pairs) // 2
    weights = torch.arange(1.0, places + 1).pow(_POWER).expand(count, -1)
    at = 2 * pairs + 2 * torch.multinomial(weights, pairs, generator=generator)  # one after the other, as they race
    return tokens.scatter(1, at, keys), targets.scatter(1, at, values)


def _length_of_pairs(pairs: int) -> int:
    return max(64, 4 * pairs)


_LETTERS, _DIGITS, _ASKED = 26, 10, 8
_NAME, _NUMBER = 3, 4


def draw_phone_book(generator: Generator, count: int, entries: int, held_out: bool = False) -> Drawn:
    """Lines of a name (3 letters) and a number (4 digits); then 8 lines again, whose numbers are asked for."""
    kinds = _choose(generator, count, _LETTERS**_NAME, entries)  # different names
    names = torch.stack([kinds // _LETTERS**i % _LETTERS for i in range(_NAME)], -1)
    numbers = _LETTERS + torch.randint(_DIGITS, (count, entries, _NUMBER), generator=generator)
    ends = torch.full((count, entries, 1), _LETTERS + _DIGITS)
    lines = torch.cat([names, numbers, ends], -1)  # [count, entries, 8]
    asked = torch.randint(entries, (count, _ASKED), generator=generator)
    again = lines.gather(1, asked[..., None].expand(-1, -1, lines.shape[-1]))
    tokens = torch.cat([lines, again], 1).flatten(1)
    targets = torch.full_like(again, IGNORED)
    targets[..., _NAME - 1 : _NAME + _NUMBER - 1] = again[..., _NAME : _NAME + _NUMBER]
    return tokens, torch.cat([torch.full_like(lines, IGNORED), targets], 1).flatten(1)


_COPIED = 32


def draw_copy(generator: Generator, count: int, length: int, held_out: bool = False) -> Drawn:
    """A mark and a random string over 32 symbols, twice; every symbol of the second one is asked for."""
    string = torch.randint(_COPIED, (count, length), generator=generator)
    half = torch.cat([torch.full((count, 1), _COPIED), string], 1)
    tokens = torch.cat([half, half], 1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, length + 1 : -1] = string
    return tokens, targets


_NOISE = 16


def draw_induction(generator: Generator, count: int, length: int, held_out: bool = False) -> Drawn:
    """Noise over 16 symbols with a mark at a random place and at the end: what followed it? (Gu and Dao 2023)."""
    tokens = torch.randint(_NOISE, (count, length), generator=generator)
    place = torch.randint(length - 2, (count, 1), generator=generator)
    tokens[:, -1] = _NOISE
    tokens.scatter_(1, place, _NOISE)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = tokens.gather(1, place + 1)
    return tokens, targets


_NEEDLES = 4
_NEEDLE = 7  # bytes: #ab=12#


def draw_needles(generator: Generator, count: int, length: int, held_out: bool = False) -> Drawn:
    """Speeches of US presidents, byte by byte, with 4 needles such as #ab=12#; then these again, numbers asked for."""
    text = _speeches()[held_out]
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    tokens = text[starts + torch.arange(length)].long()
    letters = ord("a") + torch.randint(26, (count, _NEEDLES, 2), generator=generator)
    letters[..., 0] = ord("a") + _choose(generator, count, 26, _NEEDLES)  # different names
    digits = ord("0") + torch.randint(10, (count, _NEEDLES, 2), generator=generator)
    mark, equals = (torch.full((count, _NEEDLES, 1), ord(sign)) for sign in "#=")
    needles = torch.cat([mark, letters, equals, digits, mark], -1)  # [count, 4, 7]
    body = length - _NEEDLES * _NEEDLE
    places = _choose(generator, count, body // _NEEDLE, _NEEDLES) * _NEEDLE
    at = places[..., None] + torch.arange(_NEEDLE)
    tokens.scatter_(1, at.flatten(1), needles.flatten(1))
    order = torch.rand(count, _NEEDLES, generator=generator).argsort(-1)
    asked = needles.gather(1, order[..., None].expand(-1, -1, _NEEDLE))
    tokens[:, body:] = asked.flatten(1)
    targets = torch.full_like(asked, IGNORED)
    targets[..., 3:5] = asked[..., 4:6]
    return tokens, torch.cat([torch.full((count, body), IGNORED), targets.flatten(1)], 1)


@cache
def _speeches() -> tuple[Tensor, Tensor]:
    """Text to train on, and of other speeches."""
    train, held_out = load_split("sotu")
    return to_tensor(train), to_tensor(held_out)


def _choose(generator: Generator, count: int, of: int, some: int) -> Tensor:
    """Different numbers below `of` in random order, int64 [count, some]."""
    return torch.rand(count, of, generator=generator).topk(some, dim=-1).indices


TASKS = {
    each.name: each
    for each in (
        Task(
            "mqar",
            "Multi-query associative recall",
            "key/value pairs",
            2 * _KEYS,
            (4, 8, 16, 32, 64),
            (4, 8, 16, 32, 64, 128),
            64,
            1,
            _length_of_pairs,
            draw_associations,
        ),
        Task(
            "phone book",
            "Phone book: name to number",
            "entries",
            _LETTERS + _DIGITS + 1,
            (4, 8, 16),
            (4, 8, 16, 32, 64),
            16,
            _NUMBER,
            lambda entries: (entries + _ASKED) * (_NAME + _NUMBER + 1),
            draw_phone_book,
        ),
        Task(
            "copy",
            "Copying a random string",
            "symbols",
            _COPIED + 1,
            (16, 32, 64),
            (16, 32, 64, 128, 256),
            64,
            1,
            lambda length: 2 * length + 2,
            draw_copy,
        ),
        Task(
            "induction",
            "Induction: what followed the mark",
            "tokens",
            _NOISE + 1,
            (16, 32, 64),
            (64, 256, 1024),
            64,
            1,
            lambda length: length,
            draw_induction,
        ),
        Task(
            "needles",
            "Needles in real text",
            "bytes of context",
            256,
            (64, 128, 256),
            (128, 256, 512, 1024),
            256,
            2,
            lambda length: length,
            draw_needles,
        ),
    )
}

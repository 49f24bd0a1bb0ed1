"""PyTorch's thread count, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import expect


@contextlib.contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Run PyTorch on so many threads while the block runs; None leaves them as they are.

    A step of a small model is too short to share: one thread is faster, and gives the same bits on every machine size.

    Raises:
        ArgumentError: the count is not positive.
    """
    expect(count is None or count >= 1, "threads", "an int >= 1", count)
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

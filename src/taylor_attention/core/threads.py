"""PyTorch's thread count, for the length of a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..errors import expect_int

MAX_THREADS = max(256, os.cpu_count() or 1)
"""More than these and more than there are cores were not meant: OpenMP ends a process that cannot have them all."""


@contextlib.contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Run PyTorch on so many threads while the block runs; None leaves them as they are.

    A step of a small model is too short to share: one thread is faster, and gives the same bits on every machine size.

    Raises:
        ArgumentError: the count is not positive, or absurd.
    """
    if count is not None:
        expect_int("threads", count, 1, MAX_THREADS)
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

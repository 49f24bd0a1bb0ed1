"""What tests of reliability share: backends by their rows in a table, and one nursery of processes to kill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels import selected
from kills import Nursery


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, given a row of a table of backends: "torch", "cpu", "cpu, avx2"."""
    with selected(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Takes seconds to start."""
    with Nursery() as nursery:
        yield nursery

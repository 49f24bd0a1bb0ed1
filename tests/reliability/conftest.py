"""Which backend computes: a test asks for one by its row in a table of backends (see tests/kernels.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels import selected


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, given a row of a table of backends: "torch", "cpu", "cpu, avx2"."""
    with selected(request.param) as name:
        yield name

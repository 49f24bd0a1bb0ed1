"""The compiled kernels as tests ask for them: one row for each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import pytest


def load() -> ModuleType | None:
    """The compiled module, if it was built."""
    try:
        return import_module("taylor_attention.ops._kernels")
    except ImportError:
        return None


MODULE = load()
INSTRUCTIONS: tuple[str, ...] = tuple(MODULE.targets()) if MODULE else ()

built = pytest.mark.skipif(MODULE is None, reason="the compiled kernels are not built: make setup needs a C++ compiler")

# For tests of what holds whatever "auto" computes with (see ops/conftest.py).
EITHER = pytest.mark.parametrize("auto", ["torch", pytest.param("cpu", marks=built)], indirect=True)

# Rows of a table of backends: "cpu" with the instruction set to compute with, the best one first.
KERNELS = [f"cpu, {name}" for name in INSTRUCTIONS] or [pytest.param("cpu", marks=built)]


# For tests of every backend (see ops/conftest.py).
ROWS = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)


@contextmanager
def selected(row: str) -> Iterator[str]:
    """Compute with a row's instruction set for a while; the name that `backend` takes."""
    backend, _, instructions = row.partition(", ")
    if MODULE and instructions:
        MODULE.use(instructions)
    try:
        yield backend
    finally:
        if MODULE:
            MODULE.use(INSTRUCTIONS[0])

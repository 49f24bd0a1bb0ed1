"""What holds for every test: seeds, poisoned buffers, and how hypothesis draws its examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not there is not waited for

# The first example of a shape pays for PyTorch's warm-up, so a deadline would fail at random.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Fill `torch.empty` with NaN (the largest number, for integers): memory read before it is written shows itself."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill below acts only in this mode
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)

"""Which backend computes: a test asks for one by name (`backend`), or says what the default stands for (`auto`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest

from kernels import selected
from taylor_attention.ops import backends, compiled

decoding = import_module("taylor_attention.ops.decode")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, given a row of a table of backends: "torch", "cpu", "cpu, avx2"."""
    with selected(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def auto(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" computes with: what the test's parameter says (see `kernels.EITHER`), else the machine's best."""
    monkeypatch.setattr(decoding, "_known", {})  # decoding remembers who computes
    monkeypatch.setattr(decoding, "_last", {})
    wanted: str = getattr(request, "param", "auto")
    if wanted == "torch":
        monkeypatch.setattr(compiled, "declines", lambda device: "the kernels are set aside for a test")
        monkeypatch.setattr(backends, "_tell_once", lambda reason: None)
    return wanted

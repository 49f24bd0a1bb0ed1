"""Who computes: the compiled CPU kernels where they apply, else PyTorch's own products, which run on any device."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import BackendWarning, expect
from . import chunked, compiled
from .problem import Gradients, Inputs, Problem

NAMES = ("auto", "cpu", "torch")


class Backend(Protocol):
    """What computes whole problems; see `chunked` for the arithmetic."""

    def forward(self, inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[N | Z] as [B, Hq, Tq, E], and if kept the moments at the end with their compensation, [B, Hkv, E, M]."""

    def backward(
        self, inputs: Inputs, problem: Problem, grad: Tensor, grad_end: Tensor | None, out: Tensor, end: Tensor | None
    ) -> Gradients:
        """Gradients, given those of `forward`'s results (grad_end None if unused) and the results themselves."""


def pick(name: str, device: torch.device) -> Backend:
    """The backend of this name, or the fastest one for tensors on a device.

    Raises:
        ArgumentError: the one asked for by name cannot compute this, and why. It is never replaced silently.
    """
    return cast(Backend, compiled if uses_kernels(name, device) else chunked)


def uses_kernels(name: str, device: torch.device) -> bool:
    """Whether the compiled kernels compute on this device under this choice of backend."""
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return False
    declined = compiled.declines(device)
    if name == "auto":
        if declined:
            _tell_once(declined)
        return not declined
    expect(not declined, "backend", "one that can compute here", f"'cpu': {declined}")
    return True


@lru_cache(maxsize=1)
def _tell_once(reason: str) -> None:
    warnings.warn(f"{reason}; attention runs on PyTorch's own products, which is slower", BackendWarning, stacklevel=2)

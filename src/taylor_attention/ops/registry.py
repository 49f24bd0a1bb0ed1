"""How an operator of this package is made known to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Registered piece by piece: the decorator torch.library.custom_op imports the whole compiler at the first call, which
# takes longer than most calls ever will.
LIBRARY = torch.library.Library("taylor_attention", "DEF")


def register(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define taylor_attention::name by what computes it and by what a tracer sees; the operator itself."""
    schema = torch.library.infer_schema(compute, mutates_args=())
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"taylor_attention::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.taylor_attention, name).default


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Make taylor_attention::name differentiable."""
    torch.library.register_autograd(f"taylor_attention::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Accumulation keeps its dtype whatever the caller's autocast says."""
    return torch.autocast(tensor.device.type, enabled=False)

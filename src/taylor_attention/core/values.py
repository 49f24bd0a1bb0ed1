"""What numbers may be: checks of tensors that come from a file, where no call has looked at them yet."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import expect

_ROUNDING = 1e-3  # of a log decay that is the difference of two long sums


def check_finite(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless every number of x [B, ...] is finite; needs no memory of its size while all are."""
    if x.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(x)):
        spoilt = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        expect(False, name, "finite numbers", f"NaN or infinity in sequences {spoilt}")


def check_log_decay(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless every number is <= 0, up to rounding; minus infinity is: everything is forgotten."""
    expect(bool((x <= _ROUNDING).all()), name, "numbers <= 0", "others")

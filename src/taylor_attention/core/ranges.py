"""What sums can hold: tokens and states beyond it are refused, so that no state ever holds NaN or infinity.

A token enters moments of |key|^degree |value| at most. Up to 2^96 in float32, 2^960 in float64, 2^30 such tokens can be
added up before a sum comes near the end of the dtype, and products with queries have room besides. Whole states may
reach a quarter of the largest number: what is added to them then has to be as large again three times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import expect

_LARGEST_EXPONENT = {torch.float32: 96, torch.float64: 960}


def token_limit(dtype: torch.dtype) -> float:
    """The largest `token_sizes` that sums of a dtype take."""
    return 2.0 ** _LARGEST_EXPONENT[dtype]


def moment_limit(dtype: torch.dtype) -> float:
    """The largest moment of a state to go on from."""
    return torch.finfo(dtype).max / 4


def exponent(degree: int | None) -> int:
    """The power of the key in `token_sizes`: without a degree, or with one of 0, keys are kept all the same."""
    return max(1, degree or 0)


def token_sizes(key: Tensor, value: Tensor, degree: int | None) -> Tensor:
    """|key|^degree |value| of tokens [B, H, T, ...] by their largest entries, each at least 1: [B, H, T]."""
    size, factor = _at_least_one(value), _at_least_one(key)
    for _ in range(exponent(degree)):  # as the kernels multiply, to the last bit
        size = size * factor
    return size


def _at_least_one(x: Tensor) -> Tensor:
    """The largest size of an entry, or 1 if that is larger; NaN if an entry is."""
    return pad(x.detach().abs(), (0, 1), value=1.0).amax(-1)


def check_tokens(key: Tensor, value: Tensor, visible: Tensor | None, degree: int | None) -> None:
    """Refuse tokens whose moments might not be finite; nothing where there are no numbers to look at.

    Args:
        key, value: [B, H, T, ...] of the dtype of the sums.
        visible: bool [B, T]; others may hold anything. None: all are.
        degree: of the moments, None if there are none.

    Raises:
        ArgumentError: naming key or value, and the first such token.
    """
    if torch.compiler.is_compiling() or key.is_meta:
        return
    refused = ~(token_sizes(key, value, degree) <= token_limit(key.dtype))
    if visible is not None:
        refused = refused & visible[:, None]
    if bool(refused.any()):
        _refuse(key, value, refused, exponent(degree))


def _refuse(key: Tensor, value: Tensor, refused: Tensor, power: int) -> None:
    batch, head, token = refused.nonzero()[0].tolist()
    where = f"in sequence {batch}, head {head}, token {token}"
    for name, x in (("key", key), ("value", value)):
        bad = x[batch, head, token][~x[batch, head, token].isfinite()]
        expect(bad.numel() == 0, name, "finite numbers", f"{bad[:1].tolist()} {where}")
    size, factor = (_at_least_one(x[batch, head, token]).item() for x in (value, key))
    name = "key" if power * math.log(factor) >= math.log(size) else "value"
    limit = f"2^{_LARGEST_EXPONENT[key.dtype]}"
    expect(
        False,
        name,
        f"|key|^{power} |value| <= {limit} for moments in {key.dtype}",
        f"|key| up to {factor:.3g} and |value| up to {size:.3g} {where}",
    )


def find_excess(moments: Tensor) -> str:
    """What is too large in moments to go on from, or not finite, in words; empty if nothing is."""
    limit, largest = moment_limit(moments.dtype), _largest(moments)
    return "" if largest <= limit else f"moments up to {largest:.3g} in {moments.dtype} (at most {limit:.3g})"


def find_token_excess(key: Tensor, value: Tensor, degree: int | None) -> str:
    """The same for tokens [B, H, T, ...] that join moments later, or are only kept."""
    limit, largest = token_limit(key.dtype), _largest(token_sizes(key, value, degree))
    kept = f"tokens with |key|^{exponent(degree)} |value| up to {largest:.3g} in {key.dtype}"
    return "" if largest <= limit else f"{kept} (at most {limit:.3g})"


def _largest(x: Tensor) -> float:
    """The largest size of a number, NaN if one is."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.aminmax(x.detach())
    return max(-low.item(), high.item())

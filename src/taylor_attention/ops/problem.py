"""One problem of attention as the backends see it: settings, tensors, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.state import wide_dtype

FULL_RESET = -1e3
"""A log decay below this forgets everything in either precision; clamping to it keeps differences of sums finite."""

FORGOTTEN = -745.0
"""A log decay below this is no weight at all, even where there is no other: exp of it is 0 in float64."""


@dataclass(frozen=True)
class Problem:
    """What to compute, besides the tensors: series coefficients, causal or not, the chunk asked for, keep the end."""

    coefficients: tuple[float, ...]
    causal: bool
    chunk: int | None
    keep: bool


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem, all of the accumulating dtype.

    query [B, Hq, Tq, d], key [B, Hkv, Tk, d], value [B, Hkv, Tk, dv], visible bool [B, Tk], log_decay [B, Hkv, T],
    and the moments at the start with their compensation, [B, Hkv, E, M]. history [B, Hkv, chunks - 1, E, M]: the
    moments before every chunk but the first, which the forward pass writes and the backward one reads; None: rebuilt.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    log_decay: Tensor | None
    sums: Tensor | None
    compensation: Tensor | None
    history: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of a problem's inputs, shaped like them."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    sums: Tensor | None


def gradients(
    inputs: Inputs,
    by_query: Tensor,
    by_key: Tensor,
    by_value: Tensor,
    by_one: Tensor,
    by_start: Tensor | None,
    at_out: tuple[Tensor, Tensor],
    at_end: tuple[Tensor, Tensor] | None,
) -> Gradients:
    """What a backward pass found, in its final form: nothing for hidden keys, and the gradient of the log decay.

    Args:
        by_value: gradient by values; by_one: by the 1 beside each, [B, Hkv, Tk].
        at_out: the gradient by the forward pass's [N | Z] and that result itself, [B, Hq, Tq, E].
        at_end: the same for the moments at the end, [B, Hkv, E, M], if they count.
    """
    hidden = None if inputs.visible is None else ~inputs.visible[:, None]
    by_key, by_value = _hide(by_key, hidden), _hide(by_value, hidden)
    by_decay = None
    if inputs.log_decay is not None:
        by_one = by_one if hidden is None else by_one.masked_fill(hidden, 0)
        by_decay = _by_log_decay(inputs.value, by_value, by_one, at_out, at_end)
        by_decay = by_decay if hidden is None else by_decay.masked_fill(hidden, 0)
    return Gradients(by_query.contiguous(), by_key.contiguous(), by_value.contiguous(), by_decay, by_start)


def _hide(x: Tensor, hidden: Tensor | None) -> Tensor:
    """Zeros where hidden [B, 1, T], in x [B, H, T, entries]."""
    return x if hidden is None else x.masked_fill(hidden[..., None], 0)


def _by_log_decay(
    value: Tensor,
    by_value: Tensor,
    by_one: Tensor,
    at_out: tuple[Tensor, Tensor],
    at_end: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Gradient of the log decay, [B, Hkv, T].

    Key j acts on query i through exp(L_i - L_j) alone, so that d/dL_i is what the output of i feels of its own size,
    less what key i as a whole feels of its own; the moments at the end carry exp(L_T). L is a running sum: sum back.
    """
    heads = value.shape[1]
    by_total = torch.linalg.vecdot(*at_out).unflatten(1, (heads, -1)).sum(2)
    by_total -= torch.linalg.vecdot(by_value, value) + by_one
    if at_end is not None:
        by_total[..., -1:] += (at_end[0] * at_end[1]).sum((2, 3))[..., None]
    return by_total.to(wide_dtype(value.device)).flip(-1).cumsum(-1).flip(-1).to(value.dtype)

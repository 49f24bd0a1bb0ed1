"""The operator that divides [N | Z]: its backward is one pass, where autograd would make one of each of its pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import register, register_autograd


def _divide(out: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """N / Z [B, H, T, dv] from [N | Z], and what was divided by [B, H, T]: Z, 1 where `empty`, NaN where not >= 0."""
    z = out[..., -1]
    z = torch.where(empty, 1, z + z.sqrt() * 0)  # 0 times the root of what is negative or infinite is NaN
    return out[..., :-1] / z.unsqueeze(-1), z


def _divide_backward(grad: Tensor, y: Tensor, z: Tensor, empty: Tensor) -> Tensor:
    """The gradient by [N | Z], given that by N / Z."""
    by_out = grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)
    by_numerator = torch.div(grad, z.unsqueeze(-1), out=by_out[..., :-1])
    by_out[..., -1] = (by_numerator * y).sum(-1).neg_().masked_fill_(empty, 0)
    return by_out


def _fake_divide_backward(grad, y, z, empty):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, inputs[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    return None if grad is None else divide_backward(grad, *ctx.saved_tensors), None


divide_backward = register("divide_backward", _divide_backward, _fake_divide_backward)
divide = register("divide", _divide, _divide)
register_autograd("divide", _backward, _setup_context)

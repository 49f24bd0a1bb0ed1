"""How well a model predicts a text: its loss per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ArgumentError, expect, expect_int, shown
from ..nn.transformer import LanguageModel, expect_model
from ..ops.validation import expect_tensor
from .data import expect_bytes, to_tensor


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per byte over `tokens` predicted bytes."""

    loss: float
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """The same loss in bits per byte."""
        return self.loss / math.log(2)


def evaluate(
    model: LanguageModel,
    data: bytes | Tensor,
    *,
    sequence_length: int = 512,
    windows: int | None = None,
    batch_size: int = 16,
) -> Evaluation:
    """Mean loss over fixed windows of a text, each read from its beginning without what came before.

    Args:
        model: the model.
        data: the text, bytes or uint8 [N].
        sequence_length: bytes per window (a shorter text is one window).
        windows: how many, spread evenly over the text; None for all that fit, side by side.
        batch_size: windows computed at once; the result does not depend on it beyond rounding.

    Raises:
        ArgumentError: the text is shorter than two bytes, or an argument is not as above.
    """
    expect_model(model)
    counts = {
        "sequence_length": sequence_length,
        "windows": 1 if windows is None else windows,
        "batch_size": batch_size,
    }
    for name, number in counts.items():
        expect_int(name, number, 1)
    text = data if isinstance(data, Tensor) else to_tensor(data)
    expect_bytes("data", text)
    expect(len(text) >= 2, "data", "at least two bytes", len(text))
    length = min(sequence_length, len(text) - 1)
    available = (len(text) - 1) // length
    count = available if windows is None else min(windows, available)
    starts = torch.arange(count) * available // count * length
    device = model.embedding.weight.device
    total = 0.0
    for chosen in starts.split(batch_size):
        rows = text[chosen[:, None] + torch.arange(length + 1)].long().to(device)
        with torch.no_grad():
            total += float(next_byte_loss(model, rows[:, :-1], rows[:, 1:], "sum"))
    return Evaluation(loss=total / (count * length), tokens=count * length)


def next_byte_loss(model: LanguageModel, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy, in nats, of targets [B, T] under the model's predictions for inputs [B, T]; "mean" or "sum"."""
    expect(reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'", shown(reduction))
    expect_model(model)
    expect_tensor("targets", targets, 2, "[B, T]")
    logits = model(inputs)
    expect(targets.shape == inputs.shape, "targets", f"shape {tuple(inputs.shape)} as inputs", tuple(targets.shape))
    expect(targets.device == logits.device, "targets", f"the model's device {logits.device}", str(targets.device))
    expect(targets.dtype == torch.int64, "targets", "dtype torch.int64", targets.dtype)
    try:
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
    except IndexError as error:
        raise ArgumentError(f"targets: expected values in 0..{logits.shape[2] - 1}, got others") from error

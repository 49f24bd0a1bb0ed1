"""RMS normalisation that computes in its weight's dtype, whatever autocast made of its input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    """x / RMS(x) * gain over the last axis, of `width`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape, in the gain's dtype."""
        gain = self.weight
        return functional.rms_norm(x.to(gain.dtype), gain.shape, gain, self.eps)

"""A short convolution before the heads: every channel is mixed with its own latest values, and what that must remember.

It lets a key stand for the token before its value's, which is what a layer needs to find "what came after this" (an
induction head) and what two layers must be spent on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.values import check_finite
from ..errors import ArgumentError, StorageError, expect, expect_int, shown

MAX_CONV = 2**12
"""A short convolution is no wider."""

_RECENT = "recent"


class ShortConvolution(nn.Module):
    """Causal depthwise convolutions over the latest `width` tokens, one each for queries, keys and values.

    Training starts where they change nothing: weight 1 on the newest token, 0 on the others.
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        weight = torch.zeros(3, d_model, width)
        weight[..., -1] = 1.0
        self.weight = nn.Parameter(weight)

    @property
    def remembered(self) -> int:
        """Earlier tokens that a new one is mixed with."""
        return self.weight.shape[2] - 1

    def before(self, x: Tensor) -> Tensor:
        """What is remembered before the first token of x [B, T, d_model]: zeros [B, width - 1, d_model]."""
        return x.new_zeros(x.shape[0], self.remembered, x.shape[2])

    def forward(self, x: Tensor, recent: Tensor | None, key_padding_mask: Tensor | None) -> tuple[Tensor, ...]:
        """x [B, T, d_model] after `recent` [B, width - 1, d_model] -> what queries, keys and values are made of.

        Padding is left out: a token follows the attended one before it.
        """
        joined = self._join(x, recent)
        if key_padding_mask is None:
            return self._convolve(joined)
        packed, places = self._pack(joined, key_padding_mask)
        at = (places[:, self.remembered :] - self.remembered)[..., None].expand_as(x)  # [B, T, d_model]
        return tuple(each.gather(1, at) for each in self._convolve(packed))

    def remember(self, x: Tensor, recent: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """The latest tokens, [B, width - 1, d_model], after x followed `recent`."""
        if key_padding_mask is None:
            return self._join(x[:, -self.remembered :], recent)[:, -self.remembered :]
        packed, _ = self._pack(self._join(x, recent), key_padding_mask)
        first = key_padding_mask.sum(1)[:, None] + torch.arange(self.remembered, device=x.device)  # [B, width - 1]
        return packed.gather(1, first[..., None].expand(-1, -1, x.shape[2]))

    def _join(self, x: Tensor, recent: Tensor | None) -> Tensor:
        return torch.cat([self.before(x) if recent is None else recent.to(x.dtype), x], dim=1)

    def _pack(self, joined: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is remembered and the attended tokens side by side, padding last; and where each slot went, [B, N]."""
        padding = functional.pad(~key_padding_mask, (self.remembered, 0))  # [B, N]
        order = padding.int().argsort(dim=1, stable=True)
        return joined.gather(1, order[..., None].expand_as(joined)), order.argsort(dim=1)

    def _convolve(self, joined: Tensor) -> tuple[Tensor, ...]:
        """[B, width - 1 + T, d_model] -> three of [B, T, d_model]; as an image one row high, channels lie innermost."""
        image = joined.mT[:, :, None]  # [B, d_model, 1, N], in the memory format that depthwise kernels are fast in
        weights = self.weight.to(joined.dtype)[:, :, None, None]  # 3 x [d_model, 1, 1, width]
        return tuple(functional.conv2d(image, each, groups=len(each))[:, :, 0].mT for each in weights)


@dataclass(eq=False)
class ConvolvedState:
    """The state of a layer with a short convolution: what attention keeps, and the latest inputs.

    Attributes:
        recent: [B, width - 1, d_model], the newest last; zeros before the first token.
        attention: a `State` or a `KeyValueCache`.
    """

    recent: Tensor
    attention: Any

    @property
    def tokens(self) -> Tensor:
        """Attended tokens of each sequence, int64 [B]."""
        tokens: Tensor = self.attention.tokens
        return tokens

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.recent.shape[0]

    @property
    def layout(self) -> dict[str, object]:
        """What a state must have in common with the layer that goes on with it."""
        own = {"recent": tuple(self.recent.shape[1:]), "recent dtype": self.recent.dtype}
        return {**self.attention.layout, **own}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return int(self.attention.nbytes) + self.recent.nbytes

    def clone(self) -> ConvolvedState:
        """An independent copy."""
        return ConvolvedState(self.recent.clone(), self.attention.clone())

    def detach(self) -> ConvolvedState:
        """The same values without their graph; memory is shared."""
        return ConvolvedState(self.recent.detach(), self.attention.detach())

    def select(self, indices: Tensor) -> ConvolvedState:
        """The sequences at `indices` int64 [N] of the batch, in that order, as an independent copy."""
        chosen = self.attention.select(indices)
        return ConvolvedState(self.recent.index_select(0, indices.to(self.recent.device)), chosen)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ConvolvedState:
        """Move the state, or change its dtype, as far as attention's own state does."""
        return ConvolvedState(self.recent.to(device=device, dtype=dtype), self.attention.to(device, dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What a file needs; with `metadata` the input of `from_tensors`."""
        return {**self.attention.tensors(), _RECENT: self.recent}

    def metadata(self) -> dict[str, str]:
        """What the tensors do not say, as text."""
        stored: dict[str, str] = self.attention.metadata()
        return stored

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], metadata: Mapping[str, str], attention: Callable[[Any, Any], Any]
    ) -> ConvolvedState:
        """The state that `tensors` and `metadata` describe; `attention` makes its part of it.

        Raises:
            StorageError: something is missing, does not fit or is not finite.
        """
        own = attention({name: tensor for name, tensor in tensors.items() if name != _RECENT}, metadata)
        try:
            expect(_RECENT in tensors, _RECENT, "the latest inputs, as this model convolves them", "none")
            recent = tensors[_RECENT]
            shape = (own.batch_size, "width - 1", "d_model")
            expect(recent.ndim == 3 and len(recent) == own.batch_size, _RECENT, f"shape {shape}", tuple(recent.shape))
            expect(recent.is_floating_point(), _RECENT, "a floating-point tensor", recent.dtype)
            check_finite(_RECENT, recent)
        except ArgumentError as error:
            raise StorageError(f"state: {error}") from error
        return ConvolvedState(recent.clone(), own)  # written to in place


def check_conv(conv: int, causal: bool = True) -> None:
    """Raise ArgumentError for a width that is none, or where nothing may come before anything."""
    good = isinstance(conv, int) and not isinstance(conv, bool) and (conv == 0 or conv >= 2)
    expect(good, "conv", "0 or an int >= 2", shown(conv))
    expect_int("conv", conv, 0, MAX_CONV)
    expect(causal or conv == 0, "conv", "0 in a layer that is not causal", conv)

"""Learned forgetting: the log decays that weigh older keys down, the same for Taylor and softmax attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SHORTEST_HALF_LIFE = 16.0
"""Half-life, in tokens, of the most forgetful key/value head when training starts."""

LONGEST_HALF_LIFE = 4096.0
"""Half-life, in tokens, of the least forgetful key/value head when training starts."""


class Decay(nn.Module):
    """Log decays logsigmoid(bias + gate(x)) <= 0 per token and key/value head; a gate where they depend on the token.

    The biases start as half-lives spread geometrically from `SHORTEST_HALF_LIFE` to `LONGEST_HALF_LIFE` over the heads.
    """

    def __init__(self, d_model: int, num_kv_heads: int, per_token: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(_initial_bias(num_kv_heads))
        self.gate = nn.Linear(d_model, num_kv_heads, bias=False) if per_token else None

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Log decays [B, Hkv, T] of x [B, T, d_model], in float32 at least; zero at padding, which ages nothing."""
        logits = self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))
        if self.gate is not None:
            logits = logits + self.gate(x).to(logits.dtype)  # added here: bfloat16 would round the long half-lives away
        log_decay = functional.logsigmoid(logits).expand(*x.shape[:2], -1).transpose(1, 2)  # [B, Hkv, T]
        return log_decay if key_padding_mask is None else log_decay * key_padding_mask[:, None]


def _initial_bias(num_kv_heads: int) -> Tensor:
    """The b with sigmoid(b) = 2^(-1/half-life), so logit(2^(-1/h)) = -log(2^(1/h) - 1), for each head's half-life."""
    ratio = LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE
    steps = torch.linspace(1.0, 0.0, num_kv_heads, dtype=torch.float64)
    half_lives = SHORTEST_HALF_LIFE * ratio**steps
    return -torch.expm1(math.log(2.0) / half_lives).log().to(torch.get_default_dtype())

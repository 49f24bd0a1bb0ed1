"""Tiny models of our own in transformers, with the options that change what a state is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taylor_attention import hf

SIZES: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "far": {"decay": None},
    "near and far": {"window": 4, "sinks": 1, "heavy": 2, "decay": None},
    "convolved, far keys": {
        "conv": 3,
        "decay": "token",
        "num_kv_heads": 1,
        "window": 3,
        "rope": "near",
        "far_dim": 2,
        "far_layers": 1,
    },
    "softmax": {"attention": "softmax", "conv": 2},
}


def build(name: str = "near and far", dtype: torch.dtype = torch.float64, **more: Any) -> hf.TaylorForCausalLM:
    torch.manual_seed(1)
    return hf.TaylorForCausalLM(hf.TaylorConfig(**SIZES | OPTIONS[name] | more)).to(dtype).eval()


def text(batch: int, length: int) -> Tensor:
    return torch.randint(250, (batch, length))


def pad_left(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and the mask of them, of sequences [T_i]."""
    length = max(map(len, sequences))
    tokens = torch.full((len(sequences), length), 255)
    mask = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = 1
    return tokens, mask

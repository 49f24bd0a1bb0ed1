"""The contestants: one small model for all, in which nothing differs but how values are mixed by queries and keys."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...core.cost import cache_size, state_size
from ...nn.norm import RMSNorm
from ...ops.attention import attention
from .rivals_linear import attend_delta, attend_elu

LAYERS = 2
WIDTH = 64
_TAPS = 4  # of the short convolutions: the token's own and three before it
_HIDDEN = 2 * WIDTH
_FLOAT = 4  # bytes


class Near(TypedDict):
    """How many tokens are near, of each kind."""

    window: int
    sinks: int
    heavy: int


@dataclass(frozen=True)
class Mixer:
    """How values are mixed.

    Attributes:
        kind: "softmax", "taylor" (with near tokens or without), "window" (near tokens alone), "elu" or "delta".
        head_dim: of queries, keys and values; there are WIDTH / head_dim heads.
        degree, window, sinks, heavy: as `attention` takes them.
    """

    kind: str
    head_dim: int = 16
    degree: int | None = None
    window: int = 0
    sinks: int = 0
    heavy: int = 0

    @property
    def name(self) -> str:
        """For people: what differs, and the size of a head."""
        near = [f"{word} {size}" for word, size in self.near.items() if size]
        far = [] if self.degree is None else [f"Taylor {self.degree}"]
        words = {"softmax": ["softmax"], "elu": ["elu + 1"], "delta": ["delta rule"]}.get(self.kind, near + far)
        return f"{' + '.join(words)}, d = {self.head_dim}"

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return WIDTH // self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """What a case holds of it."""
        return asdict(self)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the float32 states of one sequence after so many tokens, all layers: what equations count.

        The inputs of the short convolutions, 2.3 KB in every contestant, are left out.
        """
        if self.kind == "softmax":
            elements = cache_size(tokens, self.head_dim, kv_heads=self.heads)
        elif self.kind in ("elu", "delta"):
            elements = self.heads * self.head_dim * (self.head_dim + (self.kind == "elu"))
        else:
            elements = state_size(self.head_dim, self.degree, kv_heads=self.heads, **self.near)
        return LAYERS * _FLOAT * elements

    def with_window_of(self, nbytes: int) -> Mixer:
        """A sliding window that takes as many bytes."""
        token = LAYERS * _FLOAT * cache_size(1, self.head_dim, kv_heads=self.heads)
        return replace(self, kind="window", degree=None, window=max(1, nbytes // token), sinks=0, heavy=0)

    @property
    def near(self) -> Near:
        """The numbers of near tokens, as `attention` takes them."""
        return {"window": self.window, "sinks": self.sinks, "heavy": self.heavy}


class Mixing(nn.Module):
    """A layer's mixing: projections, short convolutions and normalised queries and keys as in all, then its own way."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.taps = nn.Parameter(torch.randn(2, _TAPS, WIDTH) * _TAPS**-0.5)  # of queries and of keys
        self.query_norm, self.key_norm = RMSNorm(mixer.head_dim), RMSNorm(mixer.head_dim)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.value.weight)
        with torch.no_grad():
            self.output.weight.copy_(self.value.weight.T)  # to copy a symbol is easy from the first step on
        hybrid = mixer.degree is not None and mixer.window > 0
        self.far_log_gain = nn.Parameter(torch.zeros(mixer.heads)) if hybrid else None
        if mixer.kind == "delta":
            self.rate, self.output_norm = nn.Linear(WIDTH, mixer.heads), RMSNorm(mixer.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, WIDTH] -> the same shape."""
        padded = functional.pad(x, (0, 0, _TAPS - 1, 0))
        query = self.query_norm(self._split(self.query(_convolve(padded, self.taps[0]))))
        key = self.key_norm(self._split(self.key(_convolve(padded, self.taps[1]))))
        y = self._mix(x, query, key, self._split(self.value(x)))
        return self.output(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.mixer.heads, -1)).transpose(1, 2)  # [B, H, T, d]

    def _mix(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixer = self.mixer
        if mixer.kind == "softmax":
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        if mixer.kind == "elu":
            return attend_elu(query, key, value)
        if mixer.kind == "delta":
            rate = self.rate(x).sigmoid().transpose(1, 2)  # [B, H, T]
            return self.output_norm(attend_delta(query, key, value, rate))
        return attention(query, key, value, degree=mixer.degree, far_gain=self.far_log_gain, **mixer.near)


def _convolve(padded: Tensor, taps: Tensor) -> Tensor:
    """Each channel over a token and those before it: [B, T + taps - 1, C] -> [B, T, C]."""
    length = padded.shape[1] - len(taps) + 1
    y = padded[:, :length] * taps[0]
    for i in range(1, len(taps)):
        y = torch.addcmul(y, padded[:, i : i + length], taps[i])
    return y


class RecallModel(nn.Module):
    """Embedding, two blocks of mixing and MLP, and the embedding again as the head; no positions."""

    def __init__(self, mixer: Mixer, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.embedding_norm, self.norm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.mixing = nn.ModuleList(Mixing(mixer) for _ in range(LAYERS))
        self.mixing_norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(_make_mlp() for _ in range(LAYERS))
        nn.init.normal_(self.embedding.weight, std=0.05)  # small logits; what enters the blocks is normalised

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits [N, symbols] at the N places of tokens [B, T] where `asked`, bool [B, T], is set."""
        x = self.embedding_norm(self.embedding(tokens))
        for mixing, norm, mlp in zip(self.mixing, self.mixing_norms, self.mlps, strict=True):
            x = x + mixing(norm(x))
            x = x + mlp(x)
        return functional.linear(self.norm(x[asked]), self.embedding.weight)


def _make_mlp() -> nn.Sequential:
    return nn.Sequential(RMSNorm(WIDTH), nn.Linear(WIDTH, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, WIDTH))

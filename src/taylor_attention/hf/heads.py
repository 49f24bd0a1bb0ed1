"""Attention of a layer whose key/value heads may keep different things: those that keep the same go together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..core.state import State
from ..errors import expect
from ..nn.cache import KeyValueCache
from ..nn.softmax import softmax_attention
from ..ops.attention import attention
from ..ops.decode import decode_
from .settings import HeadSettings, ModelSettings

Memory = State | KeyValueCache
"""What a group of heads keeps of the tokens before."""


class Inputs(NamedTuple):
    """What one layer attends with; the queries belong to the last n of the S keys where it is causal."""

    query: Tensor  # [B, Hq, n, d]
    key: Tensor  # [B, Hkv, S, d]
    value: Tensor  # [B, Hkv, S, d_V]
    visible: Tensor | None  # bool [B, S], True = attend
    scale: float
    causal: bool = True
    far_query: Tensor | None = None  # [B, Hq, n, f], of learned maps
    far_key: Tensor | None = None  # [B, Hkv, S, f]
    far_gain: Tensor | None = None  # [Hq]

    def far(self, settings: HeadSettings, earlier: int = 0) -> dict[str, Any]:
        """What `attention` and `decode_` take of the maps, for so many more queries in the beginning."""
        if settings.far_dim is None:
            return {}
        there = self.far_query is not None and self.far_query.shape[3] == settings.far_dim
        expect(there, "model", f"far maps of {settings.far_dim} entries (see set_far_maps)", "others or none")
        assert self.far_query is not None  # there
        query = functional.pad(self.far_query, (0, 0, earlier, 0))
        return {"far_query": query, "far_key": self.far_key, "far_gain": self.far_gain}


class Plan:
    """Which key/value heads of a layer are computed together, made once.

    Args:
        settings: of the model.
        layer: from 0.
        kv_heads: of the layer.
    """

    def __init__(self, settings: ModelSettings, layer: int, kv_heads: int) -> None:
        self.kv_heads = kv_heads
        self.groups = settings.groups(layer, kv_heads)
        placed = [head for _, heads in self.groups for head in heads]
        self._order = [placed.index(head) for head in range(kv_heads)]

    def attend(self, inputs: Inputs) -> Tensor:
        """Attention over the given keys and nothing before them, y [B, Hq, n, d_V]."""
        return self._join([_attend(settings, self._take(inputs, heads)) for settings, heads in self.groups])

    def attend_after(self, inputs: Inputs, before: list[Memory] | None) -> tuple[Tensor, list[Memory]]:
        """Causal attention over what each group remembers and the given keys: y [B, Hq, n, d_V], and what is kept.

        Without gradients the memories may be changed in place; with gradients they are left as they are.
        """
        parts, after = [], []
        for number, (settings, heads) in enumerate(self.groups):
            past = None if before is None else before[number]
            part, kept = _attend_after(settings, self._take(inputs, heads), past)
            parts.append(part)
            after.append(kept)
        return self._join(parts), after

    def _take(self, inputs: Inputs, heads: tuple[int, ...]) -> Inputs:
        """The inputs of some key/value heads."""
        if len(heads) == self.kv_heads:
            return inputs
        taken: dict[str, Any] = {}
        for name in ("key", "value", "far_key"):
            x = getattr(inputs, name)
            taken[name] = None if x is None else _select(x, heads)
        for name, dim in {"query": 1, "far_query": 1, "far_gain": 0}.items():
            taken[name] = self._queries(getattr(inputs, name), heads, dim)
        return inputs._replace(**taken)

    def _queries(self, x: Tensor | None, heads: tuple[int, ...], dim: int) -> Tensor | None:
        """The query heads, along dim, of some key/value heads."""
        if x is None:
            return None
        grouped = x.unflatten(dim, (self.kv_heads, -1))
        return _select(grouped, heads).flatten(1, 2) if dim else grouped[list(heads)].flatten()

    def _join(self, parts: list[Tensor]) -> Tensor:
        """The outputs of all heads in their own order, from those of the groups."""
        if len(parts) == 1:
            return parts[0]
        together = [part.unflatten(1, (len(heads), -1)) for part, (_, heads) in zip(parts, self.groups, strict=True)]
        return _select(torch.cat(together, 1), tuple(self._order)).flatten(1, 2)


def _select(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of [B, H, ...]: a view where they follow each other."""
    first = heads[0]
    if heads == tuple(range(first, first + len(heads))):
        return x[:, first : first + len(heads)]
    return x.index_select(1, torch.tensor(heads, device=x.device))


def _attend(settings: HeadSettings, x: Inputs) -> Tensor:
    if settings.is_softmax:
        return softmax_attention(x.query, x.key, x.value, scale=x.scale, causal=x.causal, key_padding_mask=x.visible)
    exact = settings.window or settings.sinks or settings.reading != "taylor"
    possible = "window=0, sinks=0 and reading='taylor', or window=None, in a layer that is not causal"
    expect(x.causal or not exact, "settings", possible, str(settings))
    query, earlier = x.query, 0
    if x.causal and x.key.shape[2] > x.query.shape[2]:
        earlier = x.key.shape[2] - x.query.shape[2]
        expect(
            settings.heavy == 0,
            "past_key_values",
            "a TaylorCache: heavy tokens are chosen by queries that other caches do not keep",
            "another cache",
        )
        query = functional.pad(query, (0, 0, earlier, 0))  # what earlier queries ask changes nothing for later ones
    y = attention(
        query,
        x.key,
        x.value,
        **settings.layout,
        reading=settings.reading,
        causal=x.causal,
        scale=x.scale,
        key_padding_mask=x.visible,
        **x.far(settings, earlier),
    )
    return y[:, :, earlier:]


def _attend_after(settings: HeadSettings, x: Inputs, past: Memory | None) -> tuple[Tensor, Memory]:
    in_place = not torch.is_grad_enabled()
    if settings.is_softmax:
        cache = _new_cache(x) if past is None else past
        assert isinstance(cache, KeyValueCache)  # made here
        if in_place:
            cache.append_(x.key, x.value, None, x.visible)
        else:
            cache = cache.extended(x.key, x.value, None, x.visible)
        y = softmax_attention(x.query, cache.keys, cache.values, scale=x.scale, key_padding_mask=cache.attended)
        return y, cache
    assert past is None or isinstance(past, State)  # made here
    if past is not None and in_place and x.query.shape[2] == 1:
        options: dict[str, Any] = {"scale": x.scale, "reading": settings.reading, "key_padding_mask": x.visible}
        y = decode_(x.query, x.key, x.value, past, **options, **x.far(settings))
        return y, past
    return attention(
        x.query,
        x.key,
        x.value,
        **settings.layout,
        reading=settings.reading,
        scale=x.scale,
        key_padding_mask=x.visible,
        **x.far(settings),
        state=past,
        return_state=True,
    )


def _new_cache(x: Inputs) -> KeyValueCache:
    batch, heads, _, head_dim = x.key.shape
    value_dim = x.value.shape[3]
    return KeyValueCache.zeros(batch, heads, head_dim, value_dim, dtype=x.key.dtype, device=x.key.device)

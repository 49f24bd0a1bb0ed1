"""Seeing what every layer attends with: queries and keys as they meet (after RoPE), values, and who sees whom.

A model whose attention implementation is `NAME` computes what "sdpa" does, and hands what it computed from to the
observer that `observing` put on its modules: an attention function gets the module, so nothing global is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import expect

NAME = "taylor_profile"
_OBSERVER = "_taylor_profile_observer"
_OTHERS = ("softcap", "s_aux", "position_bias", "sliding_window")
"""Arguments of attention functions that make another attention of it."""


@dataclass(frozen=True)
class Observation:
    """What one layer attends with, for one sequence.

    Attributes:
        layer: its number, from 0.
        query: [Hq, T, d]; key: [Hkv, T, d]; value: [Hkv, T, dv].
        scale: factor on q . k.
        causal: whether a query sees no later key.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool


class Observer:
    """Hands each layer's observation to a function, and numbers the layers that have no number of their own."""

    def __init__(self, receive: Callable[[Observation], None]) -> None:
        self._receive = receive
        self._modules: list[torch.nn.Module] = []

    def see(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> None:
        """Take in what a module attends with, [1, H, T, d] each."""
        if module not in self._modules:
            self._modules.append(module)
        own = getattr(module, "layer_idx", None)
        layer = self._modules.index(module) if own is None else int(own)
        expect(len(query) == 1, "model", "attention over one sequence at a time", f"a batch of {len(query)}")
        scale, causal = float(how["scale"]), bool(how["causal"])
        self._receive(Observation(layer, query[0], key[0], value[0], scale, causal))


@contextmanager
def observing(model: Any, receive: Callable[[Observation], None]) -> Iterator[None]:
    """Hand each layer's observation to `receive` in every forward pass inside the block (in order, no gradients).

    Sequences are to come one at a time, whole and without padding.

    Raises:
        ArgumentError: the model's attention does not go through the interface of transformers, or (in the block) is
            another than plain softmax, causal or over all keys.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    good = model.config._attn_implementation == NAME
    expect(good, "model", "attention through the interface of transformers", type(model).__name__)
    observer = Observer(receive)
    for module in model.modules():
        setattr(module, _OBSERVER, observer)
    try:
        yield
    finally:
        for module in model.modules():
            delattr(module, _OBSERVER)
        model.set_attn_implementation(before)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as "sdpa" computes it, seen by the module's observer."""
    observer = getattr(module, _OBSERVER, None)
    expect(observer is not None, "model", "attention inside `observing`", type(module).__name__)
    assert isinstance(observer, Observer)
    for name in _OTHERS:
        expect(others.get(name) is None, "model", f"attention without {name}", f"layers of {type(module).__name__}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check_mask(attention_mask, query.shape[2], key.shape[2], causal)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    observer.see(module, query.detach(), key.detach(), value.detach(), scale=scale, causal=causal)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)


def _check_mask(mask: Tensor | None, queries: int, keys: int, causal: bool) -> None:
    """Refuse what is not plain causal attention, or attention to all keys."""
    expect(queries == keys, "model", "whole sequences", f"{queries} queries of {keys} keys")
    if mask is None:
        return
    expect(mask.dtype == torch.bool, "model", "a mask of bools, or none", str(mask.dtype))
    plain = mask.new_ones(queries, keys)
    plain = plain.tril() if causal else plain
    kind = "causal attention" if causal else "attention to all keys"
    expect(
        bool((mask == plain).all()), "model", f"plain {kind}", "another mask (a sliding window, padding, or packing)"
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

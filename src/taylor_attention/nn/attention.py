"""Attention layers: the Taylor one and its softmax twin, identical but for exp against its truncated series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.state import State, check_reach
from ..errors import expect
from ..ops.attention import attention
from ..ops.decode import decode_
from .cache import KeyValueCache
from .layer import Attention, Heads
from .softmax import softmax_attention


class TaylorAttention(Attention):
    """Attention whose exp is cut after `degree`: constant memory and constant cost per token, whatever the context.

    Takes the arguments of `Attention`, and:

    Args:
        degree: of the truncated series; an even one is positive everywhere, and the one to train with. None, with a
            window or sinks: what is not near is forgotten.
        window, sinks: latest and first tokens that are attended to exactly (causal layers only).
    """

    _state_type = State

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        *,
        degree: int | None = 2,
        window: int = 0,
        sinks: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, num_kv_heads, head_dim, value_dim, **options)
        check_reach(degree, window, sinks)
        expect(self.causal or window + sinks == 0, "causal", "True with a window or sinks", self.causal)
        self.degree, self.window, self.sinks = degree, window, sinks

    def new_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state of `batch_size` sequences before their first token: float32, or float64 in a float64 layer."""
        weight = self.key.weight
        return State.zeros(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            self.degree,
            window=self.window,
            sinks=self.sinks,
            scale=self.scale,
            dtype=torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def _mix(self, heads: Heads, state: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        options: dict[str, Any] = {
            "degree": self.degree,
            "window": self.window,
            "sinks": self.sinks,
            "causal": self.causal,
            "scale": self.scale,
            "key_padding_mask": heads.key_padding_mask,
            "log_decay": heads.log_decay,
            "state": state,
        }
        if return_state:
            return attention(*heads[:3], return_state=True, **options)
        return attention(*heads[:3], **options), None

    def _mix_(self, heads: Heads, state: State) -> Tensor:
        mask, log_decay = heads.key_padding_mask, heads.log_decay
        return decode_(*heads[:3], state, scale=self.scale, key_padding_mask=mask, log_decay=log_decay)


class SoftmaxAttention(Attention):
    """The twin: exact softmax with a key/value cache that grows with context. Takes the arguments of `Attention`."""

    _state_type = KeyValueCache

    def new_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueCache:
        """An empty cache for `batch_size` sequences, in the layer's dtype unless told."""
        weight = self.key.weight
        return KeyValueCache.zeros(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            decay=self.decay is not None,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def _mix(
        self, heads: Heads, state: KeyValueCache | None, return_state: bool
    ) -> tuple[Tensor, KeyValueCache | None]:
        if state is None and not return_state:  # training: no cache
            sums = None if heads.log_decay is None else heads.log_decay.double().cumsum(-1)
            return self._attend(heads.query, heads.key, heads.value, sums, heads.key_padding_mask), None
        past = (
            self.new_state(len(heads.key), device=heads.key.device, dtype=heads.key.dtype) if state is None else state
        )
        after = past.extended(*heads[1:])
        return self._attend_cache(heads.query, after), after

    def _mix_(self, heads: Heads, state: KeyValueCache) -> Tensor:
        state.append_(*heads[1:])
        return self._attend_cache(heads.query, state)

    def _attend_cache(self, query: Tensor, cache: KeyValueCache) -> Tensor:
        return self._attend(query, cache.keys, cache.values, cache.cumulative_decay, cache.attended)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, cumulative_decay: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        return softmax_attention(
            query,
            key,
            value,
            scale=self.scale,
            causal=self.causal,
            cumulative_decay=cumulative_decay,
            key_padding_mask=mask,
        )

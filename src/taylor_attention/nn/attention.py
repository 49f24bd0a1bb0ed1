"""Attention layers: the Taylor one and its softmax twin, identical but for exp against its truncated series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.state import State, check_far_dim, check_reach
from ..errors import expect, expect_bool, shown
from ..ops.attention import attention
from ..ops.decode import decode_
from ..ops.validation import check_reading, expect_state
from .cache import KeyValueCache
from .layer import Attention, Heads
from .rotary import Rotation
from .softmax import softmax_attention


class TaylorAttention(Attention):
    """Attention whose exp is cut after `degree`: constant memory and constant cost per token, whatever the context.

    Takes the arguments of `Attention`, and:

    Args:
        degree: of the truncated series; an even one is positive everywhere, and the one to train with. None, with a
            window or sinks: what is not near is forgotten.
        window, sinks, heavy: latest, first and weightiest tokens that are attended to exactly (causal layers only).
        reading: how the others' scores are read, "taylor" or (causal layers only) "fitted": see `attention`.
        center_keys: subtract a learned vector per key/value head, `key_center`, from the keys (after norm and
            rotation). To softmax it is nothing, as all scores of a query change alike; a series it moves to where the
            scores are.
        far_gain: multiply the weights of the far tokens by exp of a learned number per query head, `far_log_gain`, 0 at
            first; only with near tokens and a degree.
        far_dim: entries of the queries and keys that far tokens are scored by. They are made of the head's by learned
            matrices, `far_query_map` and `far_key_map`, which at first take its first entries; the moments are of this
            size. None: the head's own. Only with near tokens and a degree.

    `rope="near"` (see `Attention`), too, needs near tokens and a degree, and goes without `center_keys`. With it, or
    with a far_dim, each near token stands in the state with its far key beside its near one, and single tokens are
    decoded by PyTorch's products instead of the compiled kernels.
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
        heavy: int = 0,
        reading: str = "taylor",
        center_keys: bool = False,
        far_gain: bool = False,
        far_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, num_kv_heads, head_dim, value_dim, **options)
        check_far(degree, window, sinks, heavy, self.head_dim, far_dim)
        expect(self.causal or window + sinks == 0, "causal", "True with a window or sinks", self.causal)
        check_reading(reading, None, self.causal)
        check_center_keys(center_keys)
        check_far_gain(far_gain, degree, window, sinks)
        check_near_rope(self.rope, degree, window, sinks, center_keys)
        self._keeps_still = self.rope == "near"
        self.far_dim = self.head_dim if far_dim is None and self._keeps_still else far_dim
        self.degree, self.window, self.sinks, self.heavy, self.reading = degree, window, sinks, heavy, reading
        self.key_center = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_dim)) if center_keys else None
        self.far_log_gain = nn.Parameter(torch.zeros(self.num_heads)) if far_gain else None
        self.far_query_map, self.far_key_map = None, None
        if far_dim is not None:
            first = (self.head_dim / far_dim) ** 0.25 * torch.eye(self.head_dim, far_dim)  # scores as large as before
            self.far_query_map = nn.Parameter(first.repeat(self.num_heads, 1, 1))
            self.far_key_map = nn.Parameter(first.repeat(self.num_kv_heads, 1, 1))

    def _new_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> State:
        weight = self.key.weight
        return State.zeros(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            self.degree,
            window=self.window,
            sinks=self.sinks,
            heavy=self.heavy,
            far_dim=self.far_dim,
            scale=self.scale,
            dtype=torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def _check_own(self, state: State) -> None:
        wanted = (self.degree, self.window, self.sinks, self.heavy, self.far_dim, self.scale)
        got = (state.degree, state.window, state.sinks, state.heavy, state.far_dim, state.scale)
        expect(got == wanted, "state", f"(degree, window, sinks, heavy, far_dim, scale) = {wanted}", got)
        expect_state(state)

    def _project(
        self, x: Tensor, state: Any, key_padding_mask: Tensor | None, rotation: Rotation | None = None
    ) -> Heads:
        heads = super()._project(x, state, key_padding_mask, rotation)
        if self.key_center is None:
            return heads
        return heads._replace(key=heads.key - self.key_center[:, None].to(heads.key.dtype))  # [B, Hkv, T, d]

    def _mix(self, heads: Heads, state: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        options: dict[str, Any] = {
            "degree": self.degree,
            "window": self.window,
            "sinks": self.sinks,
            "heavy": self.heavy,
            "reading": self.reading,
            "causal": self.causal,
            "scale": self.scale,
            "key_padding_mask": heads.key_padding_mask,
            "log_decay": heads.log_decay,
            "far_gain": self.far_log_gain,
            "state": state,
            **self._far(heads),
        }
        if return_state:
            return attention(*heads[:3], return_state=True, **options)
        return attention(*heads[:3], **options), None

    def _mix_(self, heads: Heads, state: State) -> Tensor:
        return decode_(
            *heads[:3],
            state,
            scale=self.scale,
            reading=self.reading,
            key_padding_mask=heads.key_padding_mask,
            log_decay=heads.log_decay,
            far_gain=self.far_log_gain,
            **self._far(heads),
        )

    def _far(self, heads: Heads) -> dict[str, Any]:
        """What `attention` takes for the far part's scores, where they are not the near ones."""
        if self.far_dim is None:
            return {}
        query, key = heads.query, heads.key
        if heads.still_query is not None and heads.still_key is not None:
            query, key = heads.still_query, heads.still_key
        if self.far_query_map is not None and self.far_key_map is not None:
            query, key = query @ self.far_query_map.to(query.dtype), key @ self.far_key_map.to(key.dtype)
        return {"far_query": self.scale * query, "far_key": key}  # [B, H, T, f] each


def check_center_keys(center_keys: bool) -> None:
    """Raise ArgumentError for what is neither True nor False."""
    expect_bool("center_keys", center_keys)


def check_far(
    degree: int | None, window: int, sinks: int, heavy: int, head_dim: int, far_dim: int | None = None
) -> None:
    """Raise ArgumentError for what is no choice of near tokens, or a degree that the far part cannot have."""
    check_reach(degree, window, sinks, heavy)
    check_far_dim(far_dim, degree, window + sinks > 0)
    check_reach(degree, window, sinks, heavy, head_dim if far_dim is None else far_dim)


def check_far_gain(far_gain: bool, degree: int | None, window: int, sinks: int) -> None:
    """Raise ArgumentError for what is neither True nor False, and for a gain where nothing or everything is far."""
    expect_bool("far_gain", far_gain)
    useful = degree is not None and window + sinks > 0
    expect(useful or not far_gain, "far_gain", "False without a degree, or without a window or sinks", far_gain)


def check_near_rope(rope: bool | str, degree: int | None, window: int, sinks: int, center_keys: bool) -> None:
    """Raise ArgumentError for positions of near tokens alone where nothing or everything is far, or keys are moved."""
    if rope == "near":
        useful = degree is not None and window + sinks > 0
        expect(useful, "rope", "True or False without a degree, or without a window or sinks", shown(rope))
        expect(not center_keys, "center_keys", "False with rope='near', where it would move far scores alone", True)


class SoftmaxAttention(Attention):
    """The twin: exact softmax with a key/value cache that grows with context. Takes the arguments of `Attention`."""

    _state_type = KeyValueCache

    def _new_state(
        self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> KeyValueCache:
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

    def _check_own(self, state: KeyValueCache) -> None:
        wanted, got = self.decay is not None, state.decay_buffer is not None
        expect(got == wanted, "state", f"a cache {'with' if wanted else 'without'} decays, as this layer", "the other")
        dtype, kept = self.key.weight.dtype, state.key_buffer.dtype
        expect(torch.is_autocast_enabled(state.device.type) or kept == dtype, "state", f"a cache in {dtype}", kept)

    def _mix(
        self, heads: Heads, state: KeyValueCache | None, return_state: bool
    ) -> tuple[Tensor, KeyValueCache | None]:
        if state is None and not return_state:  # training: no cache
            sums = None if heads.log_decay is None else heads.log_decay.double().cumsum(-1)
            return self._attend(heads.query, heads.key, heads.value, sums, heads.key_padding_mask), None
        past = self._new_state(len(heads.key), heads.key.device, heads.key.dtype) if state is None else state
        after = past.extended(*heads.cached)
        return self._attend_cache(heads.query, after), after

    def _mix_(self, heads: Heads, state: KeyValueCache) -> Tensor:
        state.append_(*heads.cached)
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

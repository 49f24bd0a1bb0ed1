"""What Taylor and softmax attention layers share: everything except how scores become weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import expect, expect_bool, expect_int, is_number, shown
from ..ops.validation import expect_tensor
from .convolution import ConvolvedState, ShortConvolution, check_conv
from .decay import Decay
from .norm import RMSNorm
from .rotary import Rotation, positions, rotate, rotation

MAX_WIDTH = 2**20
"""Of anything in a model; what is asked to be wider was not meant."""


class Heads(NamedTuple):
    """What is mixed: x projected, normalised and rotated."""

    query: Tensor  # [B, Hq, T, d]
    key: Tensor  # [B, Hkv, T, d]
    value: Tensor  # [B, Hkv, T, d_V]
    log_decay: Tensor | None  # [B, Hkv, T], <= 0
    key_padding_mask: Tensor | None  # bool [B, T], True = attend
    still_query: Tensor | None = None  # [B, Hq, T, d], before it was rotated, where the far part needs that
    still_key: Tensor | None = None  # [B, Hkv, T, d]

    @property
    def cached(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a key/value cache takes in: key, value, log_decay, key_padding_mask."""
        return self.key, self.value, self.log_decay, self.key_padding_mask


class Attention(nn.Module):
    """What the twins share: projections, QK-norm, rotary positions, decay and the calls; a subclass mixes the values.

    Args:
        d_model: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of `num_heads` (grouped queries); default `num_heads`.
        head_dim: width of queries and keys; default d_model / num_heads.
        value_dim: width of values; default `head_dim`.
        qk_norm: RMS-normalise queries and keys over head_dim, with learned gains. A score is then a learned temperature
            times a cosine, of order 1 when training starts: what a truncated series approximates well.
        rope: rotate queries and keys by their positions, which go on from the state's token counts; "near": for the
            scores of near tokens alone, so that what is far is found by what it is, wherever it stands. To softmax all
            tokens are near.
        rope_base: base of the rotation's wavelengths.
        decay: None; "head" (one learned constant per key/value head); "token" (a gate computed from the input).
        conv: width of a short causal convolution, one weight per channel, of what queries, keys and values are each
            made of: a token's own input and the conv - 1 before it; 0 for none. The state remembers those inputs.
        bias: whether the projections have biases.
        causal: whether a token sees only itself and what came before.
        scale: multiplies the scores; default head_dim ** -0.5.

    Raises:
        ArgumentError: a size or an option is not one of these.
    """

    _state_type: type = object
    _keeps_still = False  # whether queries and keys are also handed over as they were before they were rotated

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        *,
        qk_norm: bool = True,
        rope: bool | str = True,
        rope_base: float = 10000.0,
        decay: str | None = None,
        conv: int = 0,
        bias: bool = False,
        causal: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        for name, flag in {"qk_norm": qk_norm, "bias": bias, "causal": causal}.items():
            expect_bool(name, flag)
        check_rope(rope)
        check_decay(decay, causal)
        check_conv(conv, causal)
        check_rope_base(rope_base)
        expect(scale is None or (is_number(scale) and scale > 0), "scale", "a number > 0", shown(scale))
        self.d_model, self.num_heads = d_model, num_heads
        sizes = resolve_sizes(d_model, num_heads, num_kv_heads, head_dim, value_dim, bool(rope))
        self.num_kv_heads, self.head_dim, self.value_dim = sizes
        self.rope, self.rope_base = rope, rope_base if rope else None
        self.causal = causal
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(d_model, num_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(d_model, self.num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, self.num_kv_heads * self.value_dim, bias=bias)
        self.output = nn.Linear(num_heads * self.value_dim, d_model, bias=bias)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.decay = None if decay is None else Decay(d_model, self.num_kv_heads, per_token=decay == "token")
        self.conv = ShortConvolution(d_model, conv) if conv else None

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        return_state: bool = False,
        key_padding_mask: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Any:
        """Attend over x, after what `state` holds.

        Args:
            x: [B, T, d_model].
            state: what came before, from `new_state` or from an earlier call; it is not changed.
            return_state: whether to return the state after x as well.
            key_padding_mask: bool [B, T], True = attend; padding on the left or on the right.
            rotation: what `rotation` gives for these tokens, where layers share it; computed if not given.

        Returns:
            y [B, T, d_model], or (y, state).

        Raises:
            ArgumentError: the input or the state does not fit this layer.
        """
        self._check(x, state, key_padding_mask, rotation)
        expect_bool("return_state", return_state)
        heads, past = self._project(x, state, key_padding_mask, rotation), _attention_state(state)
        mixed, after = self._mix(heads, past, return_state)
        y = self._merge_heads(mixed)
        if not return_state:
            return y
        return y, after if self.conv is None else ConvolvedState(self._remember(x, state, key_padding_mask), after)

    @torch.no_grad()
    def decode_(
        self, x: Tensor, state: Any, *, key_padding_mask: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """Attend over n more tokens x [B, n, d_model] and append them to `state` in place, without gradients.

        Returns y [B, n, d_model]. Raises ArgumentError as `forward`.
        """
        expect(self.causal, "decode_", "a causal layer", "causal=False")
        expect(state is not None, "state", "a state, from new_state(batch_size)", None)
        self._check(x, state, key_padding_mask, rotation)
        heads = self._project(x, state, key_padding_mask, rotation)
        mixed = self._mix_(heads, _attention_state(state))
        if self.conv is not None:
            state.recent.copy_(self._remember(x, state, key_padding_mask))
        return self._merge_heads(mixed)

    def rotation(self, x: Tensor, *, state: Any = None, key_padding_mask: Tensor | None = None) -> Rotation | None:
        """The turn of queries and keys at the positions of x, the same in every layer of a model; None without rope.

        In float32 at least. Takes and raises what `forward` does.
        """
        self._check(x, state, key_padding_mask)
        return self._rotation(x, state, key_padding_mask)

    def new_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state of `batch_size` sequences before their first token, on this layer's device unless told.

        Numbers are in the layer's dtype unless told, moments in float32 at least.
        """
        state, weight = self._new_state(batch_size, device, dtype), self.key.weight
        if self.conv is None:
            return state
        x = weight.new_empty(batch_size, 0, self.d_model, dtype=dtype, device=device)
        return ConvolvedState(self.conv.before(x), state)

    def _new_state(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
        """What `new_state` gives, of attention alone."""
        raise NotImplementedError

    def _mix(self, heads: Heads, state: Any, return_state: bool) -> tuple[Tensor, Any]:
        """Weigh values by scores: y [B, Hq, T, d_V], and the state afterwards (None unless asked for)."""
        raise NotImplementedError

    def _mix_(self, heads: Heads, state: Any) -> Tensor:
        """Weigh values by scores, y [B, Hq, n, d_V], and append the tokens to `state` in place."""
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        """Raise ArgumentError unless x [B, T, d_model] is one that this layer computes with."""
        weight = self.query.weight
        expect_tensor("x", x, 3, f"[B, T, {self.d_model}]")
        expect(x.shape[-1] == self.d_model, "x", f"shape [B, T, {self.d_model}]", tuple(x.shape))
        expect(x.device == weight.device, "x", f"the layer's device {weight.device}", str(x.device))
        cast = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        expect(cast or x.dtype == weight.dtype, "x", f"the layer's dtype {weight.dtype}", x.dtype)

    def check_state(self, state: Any, sequences: int) -> None:
        """Raise ArgumentError unless a state is one that this layer can go on with, for so many sequences."""
        if self.conv is not None:
            convolved = isinstance(state, ConvolvedState)
            expect(convolved, "state", "a ConvolvedState from new_state", type(state).__name__)
            latest = (sequences, self.conv.remembered, self.d_model)
            expect(state.recent.shape == latest, "state", f"latest inputs {list(latest)}", list(state.recent.shape))
            state = _attention_state(state)
        kind = self._state_type
        expect(isinstance(state, kind), "state", f"a {kind.__name__} from new_state", type(state).__name__)
        wanted = (sequences, self.num_kv_heads, self.head_dim, self.value_dim)
        got = (state.batch_size, state.kv_heads, state.head_dim, state.value_dim)
        expect(got == wanted, "state", f"(sequences, kv heads, head_dim, value_dim) = {wanted}", got)
        device = self.key.weight.device
        expect(state.device == device, "state", f"the layer's device {device}", str(state.device))
        self._check_own(state)

    def _check_own(self, state: Any) -> None:
        """As `check_state`, for what only this kind of state has."""
        raise NotImplementedError

    def _check(self, x: Tensor, state: Any, mask: Tensor | None, rotation: Rotation | None = None) -> None:
        self.check_input(x)
        if mask is not None:
            expect_tensor("key_padding_mask", mask, 2, "[B, T]")
            expected = f"torch.bool {list(x.shape[:2])}, as x"
            fits = mask.dtype == torch.bool and mask.shape == x.shape[:2] and mask.device == x.device
            expect(fits, "key_padding_mask", expected, f"{mask.dtype} {list(mask.shape)} on {mask.device}")
        if state is not None:
            self.check_state(state, x.shape[0])
        if rotation is not None:
            pair = rotation if isinstance(rotation, tuple) else ()
            shapes = [each.shape[-2:] for each in pair if isinstance(each, Tensor)]
            good = shapes == [(x.shape[1], self.head_dim)] * 2
            expect(good, "rotation", "what `rotation` gives here", type(rotation))

    def _rotation(self, x: Tensor, state: Any, key_padding_mask: Tensor | None) -> Rotation | None:
        if self.rope_base is None:
            return None
        at = positions(x.shape[1], None if state is None else state.tokens, key_padding_mask, x.device)
        return rotation(at, self.head_dim, self.rope_base, torch.promote_types(self.query.weight.dtype, torch.float32))

    def _project(
        self, x: Tensor, state: Any, key_padding_mask: Tensor | None, rotation: Rotation | None = None
    ) -> Heads:
        for_query, for_key, for_value = (x, x, x)
        if self.conv is not None:
            for_query, for_key, for_value = self.conv(x, _recent(state), key_padding_mask)
        query = self.query_norm(_split_heads(self.query(for_query), self.head_dim))
        key = self.key_norm(_split_heads(self.key(for_key), self.head_dim))
        value = _split_heads(self.value(for_value), self.value_dim)
        still = (query.to(value.dtype), key.to(value.dtype)) if self._keeps_still else (None, None)
        turn = self._rotation(x, state, key_padding_mask) if rotation is None else rotation
        if turn is not None:
            cosines, sines = (each.to(query.dtype) for each in turn)
            query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        log_decay = None if self.decay is None else self.decay(x, key_padding_mask)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the norms are float32
        return Heads(query, key, value, log_decay, key_padding_mask, *still)

    def _remember(self, x: Tensor, state: Any, key_padding_mask: Tensor | None) -> Tensor:
        """What the convolution needs of x and of what came before it."""
        assert self.conv is not None
        return self.conv.remember(x, _recent(state), key_padding_mask)

    def _merge_heads(self, mixed: Tensor) -> Tensor:
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, T, d_model]


def _attention_state(state: Any) -> Any:
    """What attention keeps, of a layer's state."""
    return state.attention if isinstance(state, ConvolvedState) else state


def _recent(state: Any) -> Tensor | None:
    """The latest inputs, of the state of a layer that convolves; None before the first token."""
    return None if state is None else state.recent


def _split_heads(x: Tensor, width: int) -> Tensor:
    """[B, T, H * width] -> [B, H, T, width]."""
    return x.view(*x.shape[:2], x.shape[2] // width, width).transpose(1, 2)


def check_decay(decay: str | None, causal: bool = True) -> None:
    """Raise ArgumentError for a decay that is none of ours."""
    expect(decay in (None, "head", "token"), "decay", "None, 'head' or 'token'", shown(decay))
    expect(causal or decay is None, "decay", "None in a layer that is not causal", shown(decay))


def check_rope(rope: bool | str) -> None:
    """Raise ArgumentError for a choice of what to rotate that is none of ours."""
    good = isinstance(rope, bool) or (isinstance(rope, str) and rope == "near")
    expect(good, "rope", "True, False or 'near'", shown(rope))


def check_rope_base(rope_base: float) -> None:
    """Raise ArgumentError for what is no base of wavelengths."""
    expect(is_number(rope_base) and rope_base > 0, "rope_base", "a number > 0", shown(rope_base))


def resolve_sizes(
    d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, value_dim: int | None, rope: bool
) -> tuple[int, int, int]:
    """(num_kv_heads, head_dim, value_dim) with their defaults; raises ArgumentError for sizes that do not fit."""
    _check_size("d_model", d_model)
    _check_size("num_heads", num_heads)
    kv_heads = _check_kv_heads(num_heads, num_kv_heads)
    key_dim = _check_head_dim(d_model, num_heads, head_dim, rope)
    return kv_heads, key_dim, _check_size("value_dim", key_dim if value_dim is None else value_dim)


def _check_size(name: str, size: int) -> int:
    expect_int(name, size, 1, MAX_WIDTH)
    return size


def _check_kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    size = _check_size("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
    expect(num_heads % size == 0, "num_kv_heads", f"a divisor of num_heads = {num_heads}", size)
    return size


def _check_head_dim(d_model: int, num_heads: int, head_dim: int | None, rope: bool) -> int:
    given = head_dim is not None or d_model % num_heads == 0
    expect(given, "head_dim", f"a size, as num_heads = {num_heads} does not divide d_model = {d_model}", head_dim)
    size = _check_size("head_dim", d_model // num_heads if head_dim is None else head_dim)
    expect(not rope or size % 2 == 0, "head_dim", "an even size, as rope rotates pairs", size)
    return size

"""The state of a sequence: a fixed number of bytes, whatever its length.

It holds the raw moments of all tokens so far (no series coefficient is in them), what rounding dropped from them, and a
short tail: the latest tokens of token-by-token decoding, kept exact and folded into the moments in blocks, so that a
step reads the moments without rewriting them. Where the latest or first tokens are attended to exactly, these stand
beside the moments (see `near`), and all else is of the others. A state is a value: passed in and out, merged, selected,
saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, StorageError, expect, expect_int, is_number, shown
from .basis import check_degree, expand, feature_count
from .moments import accumulate_, add_compensated, add_compensated_, fade
from .near import Near, Tokens
from .ranges import find_excess, find_token_excess
from .storage import read_tensors, write_tensors
from .values import check_finite, check_log_decay

KIND = "state"

MAX_STATE_BYTES = 4 * 2**30
"""States above this many bytes are refused unless the caller allows more."""

_MAX_SIZE = 2**16  # of a head, a value, a degree: files with larger ones are refused before anything is made of them
_MAX_TOKENS = 2**62  # so that counting on never overflows

_TENSORS = ("sums", "compensation", "tokens", "log_decay", "tail_key", "tail_value", "tail_log_decay")
_OWN_DTYPE = ("tokens", "log_decay", "tail_log_decay")  # whatever the dtype of the moments


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type for long sums of log decay: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


MAX_NEAR = 2**48
"""Longer windows are refused: so that sums of them are ints of 64 bits everywhere."""

_FOLD_TOGETHER = 2**22  # elements of the moments that are folded at once


def moment_count(head_dim: int, degree: int | None) -> int:
    """Moments per entry of a value: none without a degree."""
    return 0 if degree is None else feature_count(head_dim, degree)


def tail_size(head_dim: int, value_dim: int, degree: int | None) -> int:
    """Tokens in the tail: a power of two >= 16, large enough to make folding rare, small beside the moments."""
    if degree is None:
        return 0
    balance = feature_count(head_dim, degree) * (value_dim + 1) // (2 * (head_dim + value_dim + 1))
    most = 64 if balance < 1024 else 128  # moments beyond a core's caches take long to be read and written
    return min(most, max(16, 1 << balance.bit_length() - 1 if balance else 16))


def check_reach(degree: int | None, window: int, sinks: int, heavy: int = 0, head_dim: int | None = None) -> None:
    """Refuse what is no choice of tokens to attend to, or a degree that heads of this size cannot have."""
    for name, size in {"window": window, "sinks": sinks, "heavy": heavy}.items():
        expect_int(name, size, 0, MAX_NEAR)
    expect(heavy == 0 or window > 0, "heavy", "0 without a window, in which a token shows its weight", heavy)
    if degree is None:
        expect(window + sinks > 0, "degree", "an int >= 0 (None: only with a window or sinks)", degree)
    elif head_dim is None:
        expect_int("degree", degree, 0)
    else:
        check_degree(head_dim, degree)


def check_far_dim(far_dim: int | None, degree: int | None, near: bool) -> None:
    """Refuse far keys of no size, or where nothing is far."""
    if far_dim is None:
        return
    expect_int("far_dim", far_dim, 1, _MAX_SIZE)
    expect(near, "far_dim", "None without a window or sinks, where all keys are far", far_dim)
    expect(degree is not None, "far_dim", "None without a degree, where nothing is far", far_dim)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q . k: the one given, or 1 / sqrt(head_dim)."""
    if scale is None:
        return float(head_dim**-0.5)
    expect(is_number(scale), "scale", "a finite number or None", shown(scale))
    return float(scale)


def check_device(device: torch.device | str | None) -> None:
    """Refuse what is no device of PyTorch, or none that this machine has."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # the latter where PyTorch was built without it
        raise ArgumentError(f"device: expected a device that PyTorch has here, got {shown(device)}") from error


def check_indices(indices: Tensor, batch_size: int) -> None:
    """Refuse what does not select sequences of a batch."""
    good = isinstance(indices, Tensor) and indices.ndim == 1 and indices.dtype == torch.int64
    good = good and indices.layout == torch.strided and not indices.is_meta
    expect(good, "indices", "an int64 tensor [N]", shown(indices))
    inside = indices.numel() == 0 or (int(indices.min()) >= 0 and int(indices.max()) < batch_size)
    expect(inside, "indices", f"values in 0..{batch_size - 1}", "" if inside else shown(indices.tolist()))


def needed_bytes(
    rows: int,
    head_dim: int,
    columns: int,
    degree: int | None,
    near: tuple[int, int, int],
    dtype: torch.dtype,
    far_dim: int | None = None,
) -> int:
    """Bytes of the moments with their compensation, and of near tokens: window, sinks and heavy ones.

    Rows are batch x key/value heads, one for an empty batch; a sink has one float64 beside its key and value, the
    others two; all have their far key too, if it is another.
    """
    window, sinks, heavy = near
    slots, numbers = sum(near), 2 * window + sinks + 2 * heavy
    moments = 2 * columns * moment_count(head_dim if far_dim is None else far_dim, degree)
    elements = moments + slots * (head_dim + (far_dim or 0) + columns)
    return max(1, rows) * (dtype.itemsize * elements + 8 * numbers)


def check_state_bytes(needed: int, allowed: int, degree: int | None) -> None:
    """Refuse a state of more bytes than allowed."""
    expect_int("max_state_bytes", allowed, 0)
    if needed > allowed:
        expected = f"a degree whose state fits in max_state_bytes={allowed:,} bytes"
        expect(False, "degree", expected, f"{degree}, which needs {needed:,} bytes (raise max_state_bytes to allow it)")


@dataclass(eq=False)
class State:
    """The moments of one batch of sequences; make one with `State.zeros` or `attention(..., return_state=True)`.

    Attributes:
        sums: raw moments sum_t Phi(k_t) [v_t, 1], [B, Hkv, E, M] with E = value_dim + 1, without the tail's tokens.
        compensation: what rounding dropped from `sums`, same shape.
        tokens: tokens seen per sequence (hidden ones not counted), int64 [B].
        log_decay: log decay since the start, summed, float64 [B, Hkv] (float32 on devices without it).
        tail_key: latest keys, tokens last, [B, Hkv, d, W]; tail_value: their [v, 1], faded to now, [B, Hkv, E, W].
        tail_log_decay: log decay since the tail began, still to be applied to `sums`, float64 [B, Hkv].
        tail_length: tokens in the tail.
        degree: highest degree of the moments; None: there are none, and tokens that are not near are forgotten.
        scale: factor on q . k that the sequence is read with.
        near: the tokens that are attended to exactly; None: none are.
    """

    sums: Tensor
    compensation: Tensor
    tokens: Tensor
    log_decay: Tensor
    tail_key: Tensor
    tail_value: Tensor
    tail_log_decay: Tensor
    tail_length: int
    degree: int | None
    scale: float
    near: Near | None = None
    _fits: bool = field(default=False, init=False, repr=False)

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        degree: int | None,
        *,
        window: int = 0,
        sinks: int = 0,
        heavy: int = 0,
        far_dim: int | None = None,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        max_state_bytes: int = MAX_STATE_BYTES,
    ) -> State:
        """The state before the first token.

        Args:
            degree, window, sinks, heavy: as `attention` takes them.
            far_dim: entries of a far key, if the far part has its own (`far_key` of `attention`).
            scale: factor on q . k; 1 / sqrt(head_dim) if None.
            dtype: float32 or float64.

        Raises:
            ArgumentError: a size is not positive, the dtype is another, or the state would take too many bytes.
        """
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            expect_int(name, size, 1)
        expect_int("batch_size", batch_size, 0)
        check_reach(degree, window, sinks, heavy)
        check_far_dim(far_dim, degree, window + sinks > 0)
        moment_dim = head_dim if far_dim is None else far_dim
        check_reach(degree, window, sinks, heavy, moment_dim)
        expect(dtype in (torch.float32, torch.float64), "dtype", "torch.float32 or torch.float64", shown(dtype))
        scale = check_scale(scale, head_dim)
        check_device(device)
        columns = value_dim + 1
        shape = (batch_size, kv_heads, columns, moment_count(moment_dim, degree))
        near = (window, sinks, heavy)
        needed = needed_bytes(batch_size * kv_heads, head_dim, columns, degree, near, dtype, far_dim)
        check_state_bytes(needed, max_state_bytes, degree)
        sums = torch.zeros(shape, dtype=dtype, device=device)
        tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        state = cls.from_sums(sums, torch.zeros_like(sums), tokens, None, moment_dim, degree, scale)
        if window or sinks:
            state.near = Near.zeros(sums, state.log_decay, head_dim + (far_dim or 0), *near)
        return state

    @classmethod
    def from_sums(
        cls,
        sums: Tensor,
        compensation: Tensor,
        tokens: Tensor,
        log_decay: Tensor | None,
        moment_dim: int,
        degree: int | None,
        scale: float,
        near: Near | None = None,
    ) -> State:
        """A state of moments [B, Hkv, E, M] of keys of this size, with an empty tail.

        log_decay [B, Hkv] is the decay since the start.
        """
        batch, heads, columns, _ = sums.shape
        width = tail_size(moment_dim, columns - 1, degree)
        none = torch.zeros(batch, heads, dtype=wide_dtype(sums.device), device=sums.device)
        return cls(
            sums,
            compensation,
            tokens,
            none if log_decay is None else log_decay,
            sums.new_zeros(batch, heads, moment_dim, width),
            sums.new_zeros(batch, heads, columns, width),
            none.clone(),
            0,
            degree,
            scale,
            near,
        )

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.sums.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.sums.shape[1]

    @property
    def head_dim(self) -> int:
        """Size of a key, d_K."""
        far_dim = self.far_dim
        return self.moment_dim if far_dim is None or self.near is None else self.near.key.shape[2] - far_dim

    @property
    def moment_dim(self) -> int:
        """Size of the keys that the moments are made of: far ones, if the far part has its own."""
        return self.tail_key.shape[2]

    @property
    def far_dim(self) -> int | None:
        """Size of a far key; None if the far part has no keys of its own."""
        if self.near is None or self.near.key.shape[2] == self.moment_dim:
            return None
        return self.moment_dim

    @property
    def value_dim(self) -> int:
        """Size of a value, d_V."""
        return self.sums.shape[2] - 1

    @property
    def window(self) -> int:
        """Latest tokens that are attended to exactly."""
        return 0 if self.near is None else self.near.window

    @property
    def sinks(self) -> int:
        """First tokens that are attended to exactly."""
        return 0 if self.near is None else self.near.sinks

    @property
    def heavy(self) -> int:
        """Tokens that are attended to exactly for their weight."""
        return 0 if self.near is None else self.near.heavy

    @property
    def dtype(self) -> torch.dtype:
        """Type of the moments."""
        return self.sums.dtype

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.sums.device

    @property
    def layout(self) -> dict[str, object]:
        """What a state must have in common with the layer, or the state, that goes on with it."""
        names = ("kv_heads", "head_dim", "value_dim", "degree", "window", "sinks", "heavy", "far_dim", "scale", "dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the same for any number of tokens."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def is_contiguous(self) -> bool:
        """Whether every tensor is contiguous, as those of `State.zeros` and of `attention` are."""
        return (  # one by one: every decoding step asks
            self.sums.is_contiguous()
            and self.compensation.is_contiguous()
            and self.tokens.is_contiguous()
            and self.log_decay.is_contiguous()
            and self.tail_key.is_contiguous()
            and self.tail_value.is_contiguous()
            and self.tail_log_decay.is_contiguous()
            and (self.near is None or self.near.is_contiguous)
        )

    @property
    def moments(self) -> Tensor:
        """Raw moments of all tokens that are not near, the tail's too, [B, Hkv, E, M]."""
        return self.folded().sums

    def folded(self) -> State:
        """The same state with an empty tail; itself if the tail is empty."""
        if self.tail_length == 0:
            return self
        # Fading is done here, since folding in place records no gradient.
        sums, compensation = fade(self.sums, self.compensation, self.tail_log_decay.exp()[..., None, None])
        copy = replace(
            self.clone(),
            sums=sums,
            compensation=compensation,
            tail_log_decay=torch.zeros_like(self.tail_log_decay),
        )
        copy.fold_()
        return copy

    @torch.no_grad()
    def fold_(self) -> None:
        """Add the tail's tokens to the moments in place, a few heads at a time, and empty it."""
        if self.tail_length == 0 or self.degree is None:
            return
        factors = self.tail_log_decay.exp().view(-1, 1, 1)
        fades = torch.compiler.is_compiling() or bool(self.tail_log_decay.any())
        sums, compensation = self.sums.view(-1, *self.sums.shape[2:]), self.compensation.view(-1, *self.sums.shape[2:])
        keys, values = (x.flatten(0, 1)[..., : self.tail_length] for x in (self.tail_key, self.tail_value))
        together = max(1, _FOLD_TOGETHER // sums[0].numel()) if len(sums) else 1
        for start in range(0, len(sums), together):
            part = slice(start, start + together)
            increment = torch.zeros_like(sums[part])
            with torch.autocast(self.device.type, enabled=False):
                accumulate_(increment, keys[part], values[part], self.degree)
            if fades:
                sums[part], compensation[part] = fade(sums[part], compensation[part], factors[part])
            add_compensated_(sums[part], compensation[part], increment)
        self.empty_tail_()

    def empty_tail_(self) -> None:
        """Forget the tail's tokens, which the moments now hold."""
        for tail in (self.tail_key, self.tail_value, self.tail_log_decay):
            tail.zero_()
        self.tail_length = 0

    def append_(self, key: Tensor, value: Tensor, log_decay: Tensor | None, visible: Tensor | None) -> None:
        """Append one token in place: key [B, Hkv, d], value [B, Hkv, E] with its last entry 1, log_decay [B, Hkv].

        Where visible bool [B] is False nothing is appended.
        """
        if self.degree is not None and self.tail_length == self.tail_key.shape[-1]:
            self.fold_()
        if visible is not None:
            hidden = ~visible[:, None]
            key, value = key.masked_fill(hidden[..., None], 0), value.masked_fill(hidden[..., None], 0)
            log_decay = None if log_decay is None else log_decay.masked_fill(hidden, 0)
        if log_decay is not None:
            self.tail_value *= self._fading(log_decay)[..., None, None]
            self.log_decay += log_decay
            self.tail_log_decay += log_decay
        if self.near is not None:
            leaving = self.near.push_(Tokens(key, value, self.log_decay), self.tokens, visible)
            faded = (self.log_decay - leaving.log_decay).exp().to(self.dtype)
            key, value = leaving.key, leaving.value * faded[..., None]
        if self.degree is not None:
            self.tail_key[..., self.tail_length] = self._far_part(key, 2)
            self.tail_value[..., self.tail_length] = value
            self.tail_length += 1
        self.tokens += 1 if visible is None else visible

    def _far_part(self, key: Tensor, dim: int) -> Tensor:
        """What the moments take of keys as near tokens have them, along dim: all, or the far keys behind them."""
        return key.narrow(dim, key.shape[dim] - self.moment_dim, self.moment_dim)

    def _fading(self, log_decay: Tensor) -> Tensor:
        """What a gate does to the tail, [B, Hkv]: as a quotient, so that the product over a tail is right.

        Factors near 1, each rounded for itself, would all be wrong to the same side.
        """
        before, after = (x.exp().to(self.dtype) for x in (self.tail_log_decay, self.tail_log_decay + log_decay))
        return torch.where(before > 1e-30, after / before, log_decay.exp().to(self.dtype))

    def assign_(self, other: State) -> None:
        """Take over the content of another state of the same shape, in place."""
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name))
        if self.near is not None and other.near is not None:
            self.near.assign_(other.near)
        self.tail_length = other.tail_length

    def merge(self, later: State) -> State:
        """The state of this sequence followed by `later`'s, a new one; both stay as they are.

        Raises:
            ArgumentError: the two differ in shape, degree, scale, dtype or device, have more tokens together than are
                counted, or have sinks or heavy tokens: those of `later` were not chosen among all; or their moments
                together are too large.
        """
        expect(isinstance(later, State), "later", "a State", type(later).__name__)
        for name in ("batch_size", *self.layout, "device"):
            mine, other = getattr(self, name), getattr(later, name)
            expect(mine == other, "later", f"a state of {name} {mine}", other)
        chosen = self.sinks + self.heavy
        expect(chosen == 0, "later", "a state without sinks and heavy tokens", f"{self.sinks} and {self.heavy}")
        first, second = self.folded(), later.folded()
        tokens, log_decay = first.tokens + second.tokens, first.log_decay + second.log_decay
        counted = bool((tokens >= 0).all())  # or the sum went round
        expect(counted, "later", f"at most {torch.iinfo(torch.int64).max:,} tokens together", "more")
        faded, dropped = fade(first.sums, first.compensation, second.log_decay.exp()[..., None, None])
        dropped = dropped + second.compensation.detach()
        sums, compensation = add_compensated(second.sums, dropped, faded)
        near = None
        if first.near is not None and second.near is not None:
            near, left = first.near.followed_by(second.near, first.tokens, second.tokens, first.log_decay)
            since = (log_decay[..., None] - left.log_decay).exp().to(self.dtype)
            if self.degree is not None:
                increment = (left.value * since[..., None, :]) @ expand(self._far_part(left.key, 2).mT, self.degree)
                sums, compensation = add_compensated(sums, compensation, increment)
        both = State.from_sums(sums, compensation, tokens, log_decay, self.moment_dim, self.degree, self.scale, near)
        excess = both.excess()
        expect(not excess, "later", "a state whose moments can be added to this one's", excess)
        return both

    def excess(self) -> str:
        """What is too large to go on from, or not finite, in words (see `ranges`); empty if nothing is.

        Tokens of the tail and exact ones count as the moments that they are going to join. Nothing is looked at while a
        tracer looks.
        """
        if torch.compiler.is_compiling() or self.device.type == "meta":
            return ""
        found = find_excess(self.sums)
        if self.tail_length and not found:
            key, value = (x[..., : self.tail_length].mT for x in (self.tail_key, self.tail_value))
            found = find_token_excess(key, value, self.degree)
        if self.near is not None and not found:
            key, value, _ = self.near.exact()
            found = find_token_excess(self._far_part(key, 2).mT, value.mT, self.degree)
            found = found or find_excess(self.near.received)
        return found

    def clone(self) -> State:
        """An independent copy: a fork of the sequence."""
        return self._each(lambda tensor: tensor.clone())

    def detach(self) -> State:
        """An independent copy without the gradient history."""
        return self._each(lambda tensor: tensor.detach().clone())

    def select(self, indices: Tensor) -> State:
        """The sequences at these places of the batch (int64 [N], repeats allowed), a new state: for beams and batches.

        Raises:
            ArgumentError: indices are not a one-dimensional int64 tensor within the batch.
        """
        check_indices(indices, self.batch_size)
        return self._each(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """An independent copy elsewhere, or with its moments in float32 / float64.

        Raises:
            ArgumentError: another dtype, or one that cannot hold the moments, or no device.
        """
        wanted = self.dtype if dtype is None else dtype
        expect(wanted in (torch.float32, torch.float64), "dtype", "torch.float32 or torch.float64", shown(wanted))
        check_device(device)
        target = self.device if device is None else torch.device(device)
        narrow: dict[str, Any] = {
            name: getattr(self, name).to(wide_dtype(target)) for name in ("log_decay", "tail_log_decay")
        }
        near = None if self.near is None else self.near.convert(target, wanted, wide_dtype(target))
        moved = replace(self, near=None, **narrow)._each(lambda tensor: tensor.to(target, copy=True))
        changed: dict[str, Any] = {name: getattr(moved, name).to(wanted) for name in _TENSORS if name not in _OWN_DTYPE}
        converted = replace(moved, near=near, **changed)
        excess = converted.excess() if wanted != self.dtype else ""
        expect(not excess, "dtype", "one that holds the state", excess)
        return converted

    def _each(self, function: Callable[[Tensor], Tensor]) -> State:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, near=None if self.near is None else self.near.each(function), **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, for files that hold several states."""
        own = {name: getattr(self, name) for name in _TENSORS}
        return own if self.near is None else own | self.near.tensors()

    def all_tensors(self) -> tuple[Tensor, ...]:
        """The same without names: every decoding step asks."""
        own = (
            self.sums,
            self.compensation,
            self.tokens,
            self.log_decay,
            self.tail_key,
            self.tail_value,
            self.tail_log_decay,
        )
        return own if self.near is None else (*own, *self.near.all_tensors())

    def metadata(self) -> dict[str, str]:
        """What the tensors do not say, as text."""
        return {"degree": str(self.degree), "scale": self.scale.hex(), "tail_length": str(self.tail_length)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> State:
        """The state that gave these `tensors()` and this `metadata()`.

        Raises:
            StorageError: they do not fit together, or hold what no state can: NaN, for one.
        """
        try:
            degree = None if metadata["degree"] == "None" else int(metadata["degree"])
            tail_length, scale = int(metadata["tail_length"]), float.fromhex(metadata["scale"])
            own, near = {name: tensors[name] for name in _TENSORS}, Near.from_tensors(tensors)
            state = cls(**own, tail_length=tail_length, degree=degree, scale=scale, near=near)
            state.check_layout_anew()
            state._check_values()
        except (KeyError, ValueError, OverflowError, IndexError, TypeError) as error:
            raise StorageError(f"state: expected the tensors and metadata of a State, got {error}") from error
        return state

    def check_layout(self) -> None:
        """Raise `ArgumentError` for a state put together by hand whose parts do not fit; each is looked at once."""
        if not self._fits:
            self.check_layout_anew()
            self._fits = True

    def check_layout_anew(self) -> None:
        """Raise `ArgumentError` unless types, shapes and devices are those of a state of this degree."""
        for name in _TENSORS:
            tensor = getattr(self, name)
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            expect(dense, name, "a dense tensor", tensor)
            expect(tensor.device == self.device, name, f"a tensor on {self.device}, as sums is", str(tensor.device))
        for name in ("sums", "tail_key"):
            expect(getattr(self, name).ndim == 4, name, "four axes", tuple(getattr(self, name).shape))
        expect(self.near is None or isinstance(self.near, Near), "near", "a Near or None", type(self.near))
        if self.degree is not None:
            check_degree(self.moment_dim, self.degree)
        expect_int("tail_length", self.tail_length, 0)
        own = self.tensors().values()
        expect(len({id(x) for x in own}) == len(own), "state", "a tensor of its own in each place", "one in several")
        batch, heads, columns, features = self.sums.shape
        moment_dim, width = self.moment_dim, self.tail_key.shape[3]
        sizes = {"heads": heads, "head_dim": moment_dim, "columns": columns, "degree + 1": (self.degree or 0) + 1}
        for name, size in sizes.items():
            expect(1 <= size <= _MAX_SIZE, name, f"1..{_MAX_SIZE}", size)
        shapes = {
            "compensation": (batch, heads, columns, features),
            "tokens": (batch,),
            "log_decay": (batch, heads),
            "tail_key": (batch, heads, moment_dim, tail_size(moment_dim, columns - 1, self.degree)),
            "tail_value": (batch, heads, columns, width),
            "tail_log_decay": (batch, heads),
        }
        for name, shape in shapes.items():
            expect(getattr(self, name).shape == shape, name, f"shape {shape}", tuple(getattr(self, name).shape))
        expect(features == moment_count(moment_dim, self.degree), "sums", f"degree {self.degree}", features)
        expect(self.degree is not None or self.near is not None, "degree", "an int without near tokens", self.degree)
        expect(self.dtype in (torch.float32, torch.float64), "sums", "float32 or float64", self.dtype)
        wide = wide_dtype(self.device)
        wanted = {"tokens": torch.int64, "log_decay": wide, "tail_log_decay": wide}
        for name in _TENSORS:
            expect(
                getattr(self, name).dtype == wanted.get(name, self.dtype), name, "its dtype", getattr(self, name).dtype
            )
        expect(0 <= self.tail_length <= width, "tail_length", f"0..{width}", self.tail_length)
        expect(is_number(self.scale), "scale", "a finite number", shown(self.scale))
        if self.near is not None:
            self.near.check_layout(self.sums, moment_dim, wide)
            good = self.degree is not None or self.far_dim is None
            expect(good, "near_key", f"shape [B, Hkv, {moment_dim}, W] without a degree", tuple(self.near.key.shape))

    def _check_values(self) -> None:
        """Raise `ValueError` for values that attention never leaves in a state."""
        counts = bool(((self.tokens >= 0) & (self.tokens <= _MAX_TOKENS)).all())
        expect(counts, "tokens", f"counts from 0 to {_MAX_TOKENS}", self.tokens.tolist())
        for name in ("sums", "compensation", "tail_key", "tail_value"):
            check_finite(name, getattr(self, name))
        for name in ("log_decay", "tail_log_decay"):
            check_log_decay(name, getattr(self, name))
        for name in ("tail_key", "tail_value"):  # kernels read whole vectors of them
            unused = getattr(self, name)[..., self.tail_length :]
            expect(not bool(unused.any()), name, f"zeros after its {self.tail_length} tokens", "others")
        if self.near is not None:
            self.near.check_values()

    def __copy__(self) -> State:
        """As `clone`: two states that shared tensors, each with its own `tail_length`, would spoil each other."""
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """As `clone`, so that a state with a gradient history can be copied too."""
        return self.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is its tensors and text, without a gradient history; unpickled, they are checked as a file is."""
        return State.from_tensors, (self.detach().tensors(), self.metadata())

    def save(self, path: str | Path) -> None:
        """Write the state to a file, replacing it atomically (needs safetensors).

        Raises:
            StorageError: the file cannot be written, or the state holds what `load` would refuse, as NaN; what stood
                there before still stands.
        """
        state = self._each(lambda tensor: tensor.detach()).to("cpu")
        tensors, metadata = state.tensors(), state.metadata()
        State.from_tensors(tensors, metadata)  # refuses what could not be read again
        write_tensors(path, tensors, kind=KIND, metadata=metadata)

    @staticmethod
    def load(path: str | Path, device: torch.device | str | None = None) -> State:
        """Read a state that `save` wrote.

        Raises:
            StorageError: the file is missing, damaged, of another kind or of another layout version, or holds no state.
        """
        check_device(device)
        tensors, metadata = read_tensors(path, kind=KIND)
        try:
            state = State.from_tensors(tensors, metadata)
        except StorageError as error:
            raise StorageError(f"{path}: {error}") from error
        return state if device is None else state.to(device)

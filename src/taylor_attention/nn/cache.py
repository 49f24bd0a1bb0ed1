"""The key/value cache of softmax attention: grows with context, by amortised doubling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.state import check_device, check_indices
from ..core.values import check_finite, check_log_decay
from ..errors import ArgumentError, StorageError, expect, expect_bool, expect_int, shown
from ..ops.validation import expect_float, expect_tensor

_FIRST_CAPACITY = 64
_TYPE = "key-value-cache"
_AXES = {"key": 4, "value": 4, "log_decay": 3, "key_padding_mask": 2}


@dataclass(eq=False)
class KeyValueCache:
    """Keys, values and cumulative log decays of all tokens so far; `length` slots of the buffers are in use.

    Attributes:
        tokens: int64 [B], the attended tokens of each sequence (padding takes a slot but is not a token).
        key_buffer: [B, Hkv, capacity, d].
        value_buffer: [B, Hkv, capacity, d_V].
        attended_buffer: bool [B, capacity], False at padding.
        decay_buffer: float64 [B, Hkv, capacity], running sums of the log decays, or None without decay.
        length: slots in use, the same for all sequences.
        padded: whether any slot in use is padding.
    """

    tokens: Tensor
    key_buffer: Tensor
    value_buffer: Tensor
    attended_buffer: Tensor
    decay_buffer: Tensor | None
    length: int = 0
    padded: bool = False

    @staticmethod
    def zeros(
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        decay: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KeyValueCache:
        """An empty cache for `batch_size` sequences; ArgumentError for sizes, a dtype or a device that are none."""
        expect_int("batch_size", batch_size, 0)
        for name, size in {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}.items():
            expect_int(name, size, 1)
        expect_bool("decay", decay)
        _expect_float_dtype(dtype)
        check_device(device)
        slots = (batch_size, kv_heads, _FIRST_CAPACITY)
        return KeyValueCache(
            tokens=torch.zeros(batch_size, dtype=torch.int64, device=device),
            key_buffer=torch.empty(*slots, head_dim, dtype=dtype, device=device),
            value_buffer=torch.empty(*slots, value_dim, dtype=dtype, device=device),
            attended_buffer=torch.empty(batch_size, _FIRST_CAPACITY, dtype=torch.bool, device=device),
            decay_buffer=torch.empty(*slots, dtype=torch.float64, device=device) if decay else None,
        )

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, length, d], a view."""
        return self.key_buffer[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, length, d_V], a view."""
        return self.value_buffer[:, :, : self.length]

    @property
    def attended(self) -> Tensor | None:
        """bool [B, length], True = attend, a view; None when nothing is padding."""
        return self.attended_buffer[:, : self.length] if self.padded else None

    @property
    def cumulative_decay(self) -> Tensor | None:
        """float64 [B, Hkv, length], a view; None without decay."""
        return None if self.decay_buffer is None else self.decay_buffer[:, :, : self.length]

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.tokens.device

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.key_buffer.shape[1]

    @property
    def head_dim(self) -> int:
        """Width of the keys."""
        return self.key_buffer.shape[3]

    @property
    def value_dim(self) -> int:
        """Width of the values."""
        return self.value_buffer.shape[3]

    @property
    def layout(self) -> dict[str, object]:
        """What a cache must have in common with the layer that goes on with it."""
        sizes = {name: getattr(self, name) for name in ("kv_heads", "head_dim", "value_dim")}
        return {**sizes, "dtype": self.key_buffer.dtype, "decay": self.decay_buffer is not None}

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return sum(tensor.nbytes for tensor in self._all().values())

    def append_(self, key: Tensor, value: Tensor, log_decay: Tensor | None, key_padding_mask: Tensor | None) -> None:
        """Append n tokens in place: key [B, Hkv, n, d], value [B, Hkv, n, d_V], log_decay [B, Hkv, n], mask [B, n].

        Raises:
            ArgumentError: one of them is of another shape; the cache is unchanged.
        """
        self._check(key, value, log_decay, key_padding_mask)
        end = self.length + key.shape[2]
        decay = self._continue_decay(log_decay)
        if end > self.key_buffer.shape[2]:
            self._grow(max(end, 2 * self.key_buffer.shape[2]))
        new = slice(self.length, end)
        if self.decay_buffer is not None and decay is not None:
            self.decay_buffer[:, :, new] = decay
        self.key_buffer[:, :, new] = key
        self.value_buffer[:, :, new] = value
        self.attended_buffer[:, new] = True if key_padding_mask is None else key_padding_mask
        self.tokens += key.shape[2] if key_padding_mask is None else key_padding_mask.sum(-1)
        self.padded |= key_padding_mask is not None
        self.length = end

    def extended(
        self, key: Tensor, value: Tensor, log_decay: Tensor | None, key_padding_mask: Tensor | None
    ) -> KeyValueCache:
        """A new cache with n more tokens, through which gradients flow; this one is unchanged. As `append_`."""
        self._check(key, value, log_decay, key_padding_mask)
        count = key.shape[2]
        mask = key.new_ones(self.batch_size, count, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        past, decay = self.cumulative_decay, self._continue_decay(log_decay)
        return KeyValueCache(
            tokens=self.tokens + mask.sum(-1),
            key_buffer=torch.cat([self.keys, key], dim=2),
            value_buffer=torch.cat([self.values, value], dim=2),
            attended_buffer=torch.cat([self.attended_buffer[:, : self.length], mask], dim=1),
            decay_buffer=None if past is None or decay is None else torch.cat([past, decay], dim=2),
            length=self.length + count,
            padded=self.padded or key_padding_mask is not None,
        )

    def clone(self) -> KeyValueCache:
        """An independent copy."""
        return self._map(Tensor.clone)

    def detach(self) -> KeyValueCache:
        """An independent copy without the graph."""
        return self._map(lambda tensor: tensor.detach().clone())

    def select(self, indices: Tensor) -> KeyValueCache:
        """The sequences at `indices` int64 [N] of the batch, in that order, as an independent copy."""
        check_indices(indices, self.batch_size)
        return self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An independent copy elsewhere; `dtype` changes keys and values only, since counts and decays need theirs."""
        check_device(device)
        if dtype is not None:
            _expect_float_dtype(dtype)
        moved = self._map(lambda tensor: tensor.to(device=device, copy=True))
        keys, values = moved.key_buffer.to(dtype=dtype), moved.value_buffer.to(dtype=dtype)
        return replace(moved, key_buffer=keys, value_buffer=values)

    def tensors(self) -> dict[str, Tensor]:
        """What a file needs, without the spare capacity; with `metadata` the input of `from_tensors`."""
        attended = self.attended_buffer[:, : self.length]
        used = {"tokens": self.tokens, "keys": self.keys, "values": self.values, "attended": attended}
        decay = self.cumulative_decay
        return used if decay is None else {**used, "cumulative_decay": decay}

    def metadata(self) -> dict[str, str]:
        """Text for a file beside `tensors`."""
        return {"type": _TYPE}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> KeyValueCache:
        """The cache that `tensors` and `metadata` describe.

        Raises:
            StorageError: something is missing, the tensors do not fit each other, or they hold what no cache can: NaN.
        """
        if metadata.get("type") != _TYPE:
            raise StorageError(f"type: expected {_TYPE!r}, got {metadata.get('type')!r}")
        missing = {"tokens", "keys", "values", "attended"} - tensors.keys()
        if missing:
            raise StorageError(f"tensors of a key/value cache: expected {sorted(missing)} too, got {sorted(tensors)}")
        decay = tensors.get("cumulative_decay")
        _check_fit(tensors)
        try:
            _check_values(tensors)
        except ArgumentError as error:
            raise StorageError(f"tensors of a key/value cache: {error}") from error
        attended = tensors["attended"]
        return KeyValueCache(
            tokens=tensors["tokens"].clone(),  # counted up in place; the other buffers are replaced before a write
            key_buffer=tensors["keys"],
            value_buffer=tensors["values"],
            attended_buffer=attended,
            decay_buffer=decay,
            length=tensors["keys"].shape[2],
            padded=not bool(attended.all()),
        )

    def _check(self, key: Tensor, value: Tensor, log_decay: Tensor | None, mask: Tensor | None) -> None:
        """Raise ArgumentError unless these are tokens for this cache."""
        optional = {"log_decay": log_decay, "key_padding_mask": mask}
        given = {"key": key, "value": value} | {name: x for name, x in optional.items() if x is not None}
        for name, x in given.items():
            expect_tensor(name, x, _AXES[name], "for this cache")
            expect(x.device == self.device, name, f"a tensor on {self.device}, as the cache is", str(x.device))
            if name != "key_padding_mask":
                expect_float(name, x)
        start, count = (self.batch_size, self.kv_heads), key.shape[2]
        shapes: dict[str, tuple[int, ...]] = {
            "key": (*start, count, self.head_dim),
            "value": (*start, count, self.value_dim),
            "log_decay": (*start, count),
            "key_padding_mask": (self.batch_size, count),
        }
        for name, x in given.items():
            expect(x.shape == shapes[name], name, f"shape {shapes[name]}", tuple(x.shape))
        expect(mask is None or mask.dtype == torch.bool, "key_padding_mask", "dtype torch.bool", mask)

    def _all(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("tokens", "key_buffer", "value_buffer", "attended_buffer")}
        return named if self.decay_buffer is None else {**named, "decay_buffer": self.decay_buffer}

    def _map(self, function: Callable[[Tensor], Tensor]) -> KeyValueCache:
        decay = self.decay_buffer
        return replace(
            self,
            tokens=function(self.tokens),
            key_buffer=function(self.key_buffer),
            value_buffer=function(self.value_buffer),
            attended_buffer=function(self.attended_buffer),
            decay_buffer=None if decay is None else function(decay),
        )

    def _grow(self, capacity: int) -> None:
        for name, tensor in self._all().items():
            if name == "tokens":
                continue
            axis = 1 if name == "attended_buffer" else 2
            shape = (*tensor.shape[:axis], capacity, *tensor.shape[axis + 1 :])
            larger = tensor.new_empty(shape)
            larger.narrow(axis, 0, self.length).copy_(tensor.narrow(axis, 0, self.length))
            setattr(self, name, larger)

    def _continue_decay(self, log_decay: Tensor | None) -> Tensor | None:
        """Running sums [B, Hkv, n] in float64: float32 would lose the newest steps beside a long past."""
        past = self.cumulative_decay
        expected = "None, as this cache keeps none" if past is None else "a tensor, as this cache keeps decays"
        expect((past is None) == (log_decay is None), "log_decay", expected, type(log_decay).__name__)
        if past is None or log_decay is None:
            return None
        sums = log_decay.double().cumsum(-1)
        return sums + past[:, :, -1:] if self.length else sums


def _expect_float_dtype(dtype: torch.dtype) -> None:
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    expect(floating, "dtype", "a floating-point dtype", shown(dtype))


def _check_fit(tensors: Mapping[str, Tensor]) -> None:
    """Raise StorageError unless the shapes agree; a file's digest is no proof that its writer was sane."""
    keys, values = tensors["keys"], tensors["values"]
    if keys.ndim != 4 or values.ndim != 4:
        raise StorageError(f"keys, values: expected 4 axes, got {tuple(keys.shape)} and {tuple(values.shape)}")
    batch_size, _, length, _ = keys.shape
    wanted = {"tokens": (batch_size,), "values": (*keys.shape[:3], values.shape[3]), "attended": (batch_size, length)}
    if "cumulative_decay" in tensors:
        wanted["cumulative_decay"] = keys.shape[:3]
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise StorageError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensors[name].shape)}")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    keys, attended, tokens = tensors["keys"], tensors["attended"], tensors["tokens"]
    dtypes = {"tokens": torch.int64, "attended": torch.bool, "values": keys.dtype, "cumulative_decay": torch.float64}
    for name, dtype in dtypes.items():
        if name in tensors:
            expect(tensors[name].dtype == dtype, name, str(dtype), tensors[name].dtype)
    expect(keys.is_floating_point(), "keys", "a floating-point tensor", keys.dtype)
    for name in ("keys", "values"):
        check_finite(name, tensors[name])
    if "cumulative_decay" in tensors:
        check_log_decay("cumulative_decay", tensors["cumulative_decay"])
    expect(bool((tokens == attended.sum(-1)).all()), "tokens", "as many as are attended to", tokens.tolist())

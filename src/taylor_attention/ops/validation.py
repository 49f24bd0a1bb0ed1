"""Checks of what callers pass to attention: one clear error before anything is computed or changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.series import EXP, Series
from ..core.state import State
from ..errors import expect, expect_bool, shown
from . import backends
from .reading import READINGS

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shapes:
    """The sizes of one problem, and the dtype and device of its sums."""

    sequences: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    sum_dtype: torch.dtype
    device: torch.device
    far_dim: int | None = None

    @property
    def moment_dim(self) -> int:
        """Size of the keys that moments are made of."""
        return self.head_dim if self.far_dim is None else self.far_dim


class Optional(NamedTuple):
    """The tensors that a caller may leave out."""

    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    log_decay: Tensor | None


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, optional: Optional, causal: bool, *, near: bool = False
) -> Shapes:
    """Check everything about the tensors that needs no look at the data; the sizes found.

    Args:
        near: whether some tokens are attended to exactly.
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        expect_tensor(name, x, 4, "[B, H, T, d]")
        expect_float(name, x)
        expect(x.dtype == query.dtype, name, f"the query's dtype {query.dtype}", x.dtype)
        expect(x.device == query.device, name, f"the query's device {query.device}", x.device)
        _expect_same(name, x.shape[0], query.shape[0], "batch {} as the query")
    batch, heads, keys, head_dim = key.shape
    expect(head_dim >= 1, "key", "a head size >= 1", head_dim)
    _expect_same("query", query.shape[3], head_dim, "head size {} as the key")
    _expect_same("value", value.shape[1], heads, "{} heads as the key")
    _expect_same("value", value.shape[2], keys, "{} tokens as the key")
    if not (heads >= 1 and query.shape[1] % heads == 0 and query.shape[1] >= 1):
        expect(False, "query", f"a multiple of the {heads} key/value heads", query.shape[1])
    expect_bool("causal", causal)
    expect(causal or not near, "causal", "True with a window or sinks", causal)
    if causal or optional.cu_seqlens is not None:
        _expect_same("query", query.shape[2], keys, "{} tokens as the key (causal or packed)")
    _check_optional(optional, key, causal)
    sequences = batch if optional.cu_seqlens is None else optional.cu_seqlens.shape[0] - 1
    sum_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return Shapes(
        sequences, query.shape[1], heads, query.shape[2], keys, head_dim, value.shape[3], sum_dtype, query.device
    )


def _check_optional(optional: Optional, key: Tensor, causal: bool) -> None:
    batch, heads, keys, _ = key.shape
    key_padding_mask, cu_seqlens, log_decay = optional
    for name, x in zip(Optional._fields, optional, strict=True):
        if isinstance(x, Tensor):
            expect(x.device == key.device, name, f"the query's device {key.device}", x.device)
    if key_padding_mask is not None:
        expect_tensor("key_padding_mask", key_padding_mask, 2, "[B, Tk]")
        expect(key_padding_mask.dtype == torch.bool, "key_padding_mask", "dtype torch.bool", key_padding_mask.dtype)
        _expect_shape("key_padding_mask", key_padding_mask, (batch, keys))
    if log_decay is not None:
        expect_tensor("log_decay", log_decay, 3, "[B, Hkv, T]")
        expect(causal, "log_decay", "causal attention", "causal=False")
        expect_float("log_decay", log_decay)
        _expect_shape("log_decay", log_decay, (batch, heads, keys))
    if cu_seqlens is not None:
        expect_tensor("cu_seqlens", cu_seqlens, 1, "[N + 1]")
        expect(cu_seqlens.dtype == torch.int32, "cu_seqlens", "dtype torch.int32", cu_seqlens.dtype)
        expect(batch == 1, "cu_seqlens", "batch 1 with packed sequences", batch)
        expect(cu_seqlens.shape[0] >= 1, "cu_seqlens", "at least one border", cu_seqlens.shape[0])


def check_gain(far_gain: Tensor | None, shapes: Shapes, degree: int | None, near: bool) -> None:
    """Check by what the far part is to be multiplied; near: whether some tokens are attended to exactly."""
    if far_gain is None:
        return
    expect(near, "far_gain", "None without a window or sinks, where it would cancel", type(far_gain))
    expect(degree is not None, "far_gain", "None without a degree, where nothing is far", type(far_gain))
    expect_tensor("far_gain", far_gain, 1, "[Hq]")
    expect_float("far_gain", far_gain)
    expect(far_gain.device == shapes.device, "far_gain", f"the query's device {shapes.device}", far_gain.device)
    _expect_shape("far_gain", far_gain, (shapes.query_heads,))


def check_far(
    far_query: Tensor | None, far_key: Tensor | None, query: Tensor, key: Tensor, degree: int | None, near: bool
) -> int | None:
    """Check the far part's own queries and keys, if it has them; their size."""
    if far_query is None and far_key is None:
        return None
    pairs = {"far_query": (far_query, query), "far_key": (far_key, key)}
    for name, (x, beside) in pairs.items():
        expect_tensor(name, x, 4, "[B, H, T, f], as both of far_query and far_key or neither")
        assert x is not None
        expect_float(name, x)
        expect(x.dtype == query.dtype, name, f"the query's dtype {query.dtype}", x.dtype)
        expect(x.device == query.device, name, f"the query's device {query.device}", x.device)
        if x.shape[:3] != beside.shape[:3]:
            expect(False, name, f"shape {tuple(beside.shape[:3])} and its own size", tuple(x.shape))
    assert far_query is not None and far_key is not None
    expect(far_key.shape[3] >= 1, "far_key", "a size >= 1", far_key.shape[3])
    _expect_same("far_query", far_query.shape[3], far_key.shape[3], "size {} as far_key")
    expect(near, "far_key", "None without a window or sinks, where all keys are far", tuple(far_key.shape))
    expect(degree is not None, "far_key", "None without a degree, where nothing is far", tuple(far_key.shape))
    return far_key.shape[3]


def expect_tensor(name: str, x: Any, ndim: int, layout: str) -> None:
    """Refuse what is no dense tensor of so many axes; `layout` names them."""
    if not isinstance(x, Tensor):
        expect(False, name, f"a tensor {layout}", type(x))
    if x.is_nested or x.layout != torch.strided:
        expect(False, name, f"a dense tensor {layout}", "a nested one" if x.is_nested else x.layout)
    if x.ndim != ndim:
        expect(False, name, f"a tensor {layout}", f"shape {tuple(x.shape)}")


def check_choices(backend: str, chunk_size: int | None) -> None:
    """Check how the caller wants it computed."""
    named = isinstance(backend, str) and backend in backends.NAMES
    expect(named, "backend", f"one of {backends.NAMES}", shown(backend))
    good = chunk_size is None or (isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1)
    expect(good, "chunk_size", "an int >= 1 or None", shown(chunk_size))


def check_reading(reading: str, series: Series | None, causal: bool) -> None:
    """Check how far scores are to be read."""
    expect(isinstance(reading, str) and reading in READINGS, "reading", f"one of {READINGS}", shown(reading))
    if reading == "fitted":
        expect(series is None or series == EXP, "series", "exp with reading='fitted'", shown(series))
        expect(causal, "causal", "True with reading='fitted'", causal)


def check_series(series: Series | None) -> Series:
    """The series given, or exp."""
    expect(series is None or isinstance(series, Series), "series", "a Series or None", shown(series))
    return EXP if series is None else series


def check_state(
    state: State,
    shapes: Shapes,
    degree: int | None,
    scale: float,
    window: int,
    sinks: int,
    heavy: int,
    in_place: tuple[Tensor | None, ...] = (),
) -> None:
    """Refuse a state of another problem; for a change in place, also gradients."""
    expect_state(state)
    wanted = {
        "batch_size": shapes.sequences,
        "kv_heads": shapes.kv_heads,
        "head_dim": shapes.head_dim,
        "value_dim": shapes.value_dim,
        "degree": degree,
        "window": window,
        "sinks": sinks,
        "heavy": heavy,
        "far_dim": shapes.far_dim,
        "scale": scale,
        "dtype": shapes.sum_dtype,
        "device": shapes.device,
    }
    for name, value in wanted.items():
        found = getattr(state, name)
        if found != value:
            expect(False, "state", f"{name} {value}", found)
    if in_place and torch.is_grad_enabled():
        recorded = any(x is not None and x.requires_grad for x in (*in_place, state.sums))
        expect(not recorded, "state", "no gradients where it is changed in place", "tensors that require gradients")


def expect_state(state: State) -> None:
    """Refuse what is no state, or one put together by hand that does not hold together."""
    expect(isinstance(state, State), "state", "a State", type(state))
    if not torch.compiler.is_compiling():
        state.check_layout()


def check_data(cu_seqlens: Tensor | None, log_decay: Tensor | None, tokens: int) -> None:
    """Check what only the data tells; not possible while a tracer looks, or where there is none."""
    if log_decay is not None and not log_decay.is_meta:
        expect(bool((log_decay <= 0).all()), "log_decay", "values <= 0 (logarithms of factors in [0, 1])", "others")
    if cu_seqlens is not None and not cu_seqlens.is_meta:
        borders = cu_seqlens.tolist()
        rising = all(a <= b for a, b in pairwise(borders))
        good = rising and borders[0] == 0 and borders[-1] == tokens
        expect(good, "cu_seqlens", f"non-decreasing borders from 0 to {tokens}", borders)


def expect_float(name: str, x: Tensor) -> None:
    """Refuse a tensor of numbers that attention does not compute with."""
    if x.dtype not in _FLOATS:
        expect(False, name, "a floating-point tensor of 16, 32 or 64 bits", x.dtype)


def _expect_same(name: str, found: int, wanted: int, expected: str) -> None:
    if found != wanted:  # written out only then: a tracer would pin a size down to write it
        expect(False, name, expected.format(wanted), found)


def _expect_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        expect(False, name, f"shape {shape}", tuple(x.shape))

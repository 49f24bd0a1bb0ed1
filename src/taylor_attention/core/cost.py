"""What attention costs, exactly: state elements, bytes, FLOPs per token, and the context where the state wins.

Everything is an integer and counts what the equations count: the state is eq. 13's (an allocated `State` also holds
rounding compensation: see `State.nbytes`), and one multiplication or one addition is one FLOP. With P = degree + 1
terms there are M = C(head_dim + degree, degree) monomials.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from math import comb, isfinite

import torch

from ..errors import expect, expect_int, shown
from .basis import feature_count
from .series import DEGREE_LIMIT, EXP, Series
from .series import error_bound as bound_error
from .state import check_reach


def state_size(
    head_dim: int,
    degree: int | None,
    *,
    value_dim: int | None = None,
    kv_heads: int = 1,
    window: int = 0,
    sinks: int = 0,
    heavy: int = 0,
) -> int:
    """Return the elements of the state of one sequence in one layer: eq. 13, and the keys and values of near tokens.

    That is kv_heads * ((value_dim + 1) * M + (window + sinks + heavy) * (head_dim + value_dim)).

    Args:
        head_dim: entries of a query or key, d_K.
        degree: where the series is cut; None, with a window or sinks: no moments.
        value_dim: entries of a value, d_V; head_dim if None.
        kv_heads: key/value heads, each with a state of its own.
        window, sinks, heavy: latest, first and weightiest tokens that are attended to exactly.
    """
    monomials, value_dim = _count_monomials(head_dim, degree), _default(value_dim, head_dim, "value_dim")
    expect_int("kv_heads", kv_heads, 1)
    check_reach(degree, window, sinks, heavy)
    near = cache_size(window + sinks + heavy, head_dim, value_dim=value_dim, kv_heads=kv_heads)
    return kv_heads * (value_dim + 1) * monomials + near


def update_flops(head_dim: int, degree: int, *, value_dim: int | None = None) -> int:
    """Return the FLOPs that add one key and value to the state of one key/value head.

    Eq. 15 charges each monomial of degree p with p + 1 multiplications, (P d_K + 1)/(d_K + 1) on average, and each
    state element with 2 FLOPs (its normaliser with 1). It is symmetric in key and query: half of it is the update,
    half the read, and the halves sum to it exactly.
    """
    monomials, value_dim = _count_monomials(head_dim, degree), _default(value_dim, head_dim, "value_dim")
    multiplications = (degree + 1) * monomials - (comb(head_dim + degree, degree - 1) if degree else 0)
    return (2 * value_dim + 1) * monomials + multiplications


def read_flops(head_dim: int, degree: int, *, value_dim: int | None = None) -> int:
    """Return the FLOPs of one query of one query head against the state: the other half of eq. 15."""
    return update_flops(head_dim, degree, value_dim=value_dim)


def flops_per_token(
    head_dim: int,
    degree: int | None,
    *,
    value_dim: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    window: int = 0,
    sinks: int = 0,
    heavy: int = 0,
) -> int:
    """Return the FLOPs per token of one layer: an update per key/value head and a read per query head.

    Ungrouped, that is eq. 15 per head: (4 d_V + 2 (P d_K + 1)/(d_K + 1) + 2) * C(d_K + P - 1, P - 1).

    Args:
        head_dim: entries of a query or key, d_K.
        degree: where the series is cut, P - 1; None, with a window or sinks: no far part.
        value_dim: entries of a value, d_V; head_dim if None.
        heads: query heads.
        kv_heads: key/value heads, a divisor of heads; heads if None.
        window, sinks, heavy: near tokens, each of which costs a query what a cached one does.
    """
    kv_heads = _expect_heads(heads, kv_heads)
    check_reach(degree, window, sinks, heavy)
    near = cache_flops_per_token(window + sinks + heavy, head_dim, value_dim=value_dim, heads=heads)
    if degree is None:
        return near
    update = update_flops(head_dim, degree, value_dim=value_dim)
    return kv_heads * update + heads * read_flops(head_dim, degree, value_dim=value_dim) + near


def cache_size(context: int, head_dim: int, *, value_dim: int | None = None, kv_heads: int = 1) -> int:
    """Return the elements of a key/value cache of `context` tokens: context * kv_heads * (d_K + d_V)."""
    expect_int("context", context, 0)
    expect_int("head_dim", head_dim, 1)
    expect_int("kv_heads", kv_heads, 1)
    return context * kv_heads * (head_dim + _default(value_dim, head_dim, "value_dim"))


def cache_flops_per_token(context: int, head_dim: int, *, value_dim: int | None = None, heads: int = 1) -> int:
    """Return the FLOPs of one token's softmax attention over a cache: heads * context * (2 d_K + 2 d_V + 3).

    That is the score, the weighted sum, and 3 for the softmax: subtract the maximum, exponentiate, add to the
    normaliser. As in eq. 15, dividing by the normaliser is not counted.
    """
    expect_int("context", context, 0)
    expect_int("head_dim", head_dim, 1)
    expect_int("heads", heads, 1)
    return heads * context * (2 * head_dim + 2 * _default(value_dim, head_dim, "value_dim") + 3)


def break_even_context(
    head_dim: int,
    degree: int | None,
    *,
    value_dim: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    window: int = 0,
    sinks: int = 0,
    heavy: int = 0,
    by: str = "memory",
    dtype: torch.dtype | str = "float32",
    cache_dtype: torch.dtype | str | None = None,
) -> int:
    """Return the smallest context, in tokens, at which a key/value cache costs at least as much as the state.

    Args:
        head_dim: entries of a query or key, d_K.
        degree: where the series is cut.
        value_dim: entries of a value, d_V; head_dim if None.
        heads: query heads; only FLOPs depend on them.
        kv_heads: key/value heads, a divisor of heads; heads if None.
        window, sinks, heavy: latest, first and weightiest tokens that are attended to exactly.
        by: "memory" (bytes) or "flops" (per decoded token).
        dtype: of the state, by name ("float32") or as a torch.dtype.
        cache_dtype: of the cache; the state's if None.

    Raises:
        ArgumentError: for an argument outside these descriptions.
    """
    expect(by in ("memory", "flops"), "by", "'memory' or 'flops'", shown(by))
    kv_heads = _expect_heads(heads, kv_heads)
    near = {"window": window, "sinks": sinks, "heavy": heavy}
    if by == "flops":
        ours = flops_per_token(head_dim, degree, value_dim=value_dim, heads=heads, kv_heads=kv_heads, **near)
        per_context_token = cache_flops_per_token(1, head_dim, value_dim=value_dim, heads=heads)
    else:
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        elements = state_size(head_dim, degree, value_dim=value_dim, kv_heads=kv_heads, **near)
        ours = elements * _to_dtype(dtype).itemsize
        cached = cache_size(1, head_dim, value_dim=value_dim, kv_heads=kv_heads)
        per_context_token = cached * _to_dtype(cache_dtype, "cache_dtype").itemsize
    return -(-ours // per_context_token)


@dataclass(frozen=True)
class Plan:
    """A whole model's attention in numbers, for one sequence: what was asked, then what it costs.

    Bytes are totals over layers unless named otherwise; FLOPs are per decoded token, over all layers; break-even
    contexts are in tokens. `error_bound` is the relative error of a weight at the score radius, None without one.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    degree: int | None
    window: int
    sinks: int
    heavy: int
    context: int
    dtype: str
    cache_dtype: str
    radius: float | None
    state_elements_per_layer: int
    state_elements: int
    state_bytes_per_layer: int
    state_bytes: int
    cache_bytes_per_layer: int
    cache_bytes: int
    flops_per_token: int
    cache_flops_per_token: int
    break_even_memory: int
    break_even_flops: int
    error_bound: float | None

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the fields by name, ready for JSON: an error bound beyond float64's range becomes None."""
        fields = asdict(self)
        if self.error_bound is not None and not isfinite(self.error_bound):
            fields["error_bound"] = None
        return fields


def plan(
    *,
    heads: int,
    head_dim: int,
    degree: int | None,
    context: int,
    window: int = 0,
    sinks: int = 0,
    heavy: int = 0,
    layers: int = 1,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype | str = "float32",
    cache_dtype: torch.dtype | str | None = None,
    radius: float | None = None,
    series: Series = EXP,
) -> Plan:
    """Gather the costs of a model's attention beside those of a key/value cache of `context` tokens.

    Args:
        heads: query heads of a layer.
        head_dim: entries of a query or key, d_K.
        degree: where the series is cut; None, with a window or sinks: no far part.
        context: tokens in the cache, >= 0.
        window, sinks, heavy: latest, first and weightiest tokens that are attended to exactly.
        layers: attention layers.
        kv_heads: key/value heads, a divisor of heads; heads if None.
        value_dim: entries of a value, d_V; head_dim if None.
        dtype: of the state, by name ("float32") or as a torch.dtype.
        cache_dtype: of the cache; the state's if None.
        radius: the largest |scaled score|, if an error bound is wanted.
        series: the kernel that the error bound is for.

    Raises:
        ArgumentError: for an argument outside these descriptions.
    """
    expect_int("layers", layers, 1)
    kv_heads, value_dim = _expect_heads(heads, kv_heads), _default(value_dim, head_dim, "value_dim")
    state_dtype = _to_dtype(dtype)
    kept_dtype = state_dtype if cache_dtype is None else _to_dtype(cache_dtype, "cache_dtype")
    near = {"window": window, "sinks": sinks, "heavy": heavy}
    elements = state_size(head_dim, degree, value_dim=value_dim, kv_heads=kv_heads, **near)
    cached_bytes = cache_size(context, head_dim, value_dim=value_dim, kv_heads=kv_heads) * kept_dtype.itemsize
    flops = flops_per_token(head_dim, degree, value_dim=value_dim, heads=heads, kv_heads=kv_heads, **near)
    cache_flops = cache_flops_per_token(context, head_dim, value_dim=value_dim, heads=heads)
    bound = (
        None if radius is None else bound_error(radius, degree or 0, series)
    )  # refuses a radius without a degree too
    break_even = partial(
        break_even_context,
        head_dim,
        degree,
        value_dim=value_dim,
        heads=heads,
        kv_heads=kv_heads,
        dtype=state_dtype,
        cache_dtype=kept_dtype,
        window=window,
        sinks=sinks,
        heavy=heavy,
    )
    return Plan(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        degree=degree,
        window=window,
        sinks=sinks,
        heavy=heavy,
        context=context,
        dtype=_name(state_dtype),
        cache_dtype=_name(kept_dtype),
        radius=radius,
        state_elements_per_layer=elements,
        state_elements=layers * elements,
        state_bytes_per_layer=elements * state_dtype.itemsize,
        state_bytes=layers * elements * state_dtype.itemsize,
        cache_bytes_per_layer=cached_bytes,
        cache_bytes=layers * cached_bytes,
        flops_per_token=layers * flops,
        cache_flops_per_token=layers * cache_flops,
        break_even_memory=break_even(by="memory"),
        break_even_flops=break_even(by="flops"),
        error_bound=None if bound is None or degree is None else bound,
    )


def _count_monomials(head_dim: int, degree: int | None) -> int:
    expect_int("head_dim", head_dim, 1)
    if degree is None:
        return 0
    expect_int("degree", degree, 0, DEGREE_LIMIT)
    return feature_count(head_dim, degree)


def _default(value: int | None, otherwise: int, argument: str) -> int:
    if value is None:
        return otherwise
    expect_int(argument, value, 1)
    return value


def _expect_heads(heads: int, kv_heads: int | None) -> int:
    """Return the number of key/value heads that goes with these query heads."""
    expect_int("heads", heads, 1)
    kv_heads = _default(kv_heads, heads, "kv_heads")
    expect(heads % kv_heads == 0, "kv_heads", f"a divisor of heads = {heads}", kv_heads)
    return kv_heads


def _to_dtype(dtype: torch.dtype | str, argument: str = "dtype") -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    floating = isinstance(found, torch.dtype) and found.is_floating_point
    expect(floating, argument, "a floating-point dtype such as 'float32' or torch.bfloat16", shown(dtype))
    assert isinstance(found, torch.dtype)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

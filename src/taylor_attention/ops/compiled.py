"""The compiled CPU kernels (sources in `kernels/`): whole sweeps, decoding and folding, in float32 and float64.

Tensors are handed over as addresses and strides, in the order in which `kernels/module.cpp` reads them. What changes in
place is reported to autograd, as PyTorch's own operations do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core.basis import feature_count, reading_weights
from ..core.near import Near
from ..core.ranges import token_limit
from ..core.state import State
from .normaliser import SAFE_SHARE
from .problem import FULL_RESET, Gradients, Inputs, Problem, gradients
from .reading import fit_limits
from .tiling import KERNELS, Tiling, choose

_PLAIN_CHUNKS = 16
"""Sums of more chunks than this are compensated."""

_HISTORY = 2
"""Moments before chunks are kept for the backward pass if they take at most so many times the inputs' memory."""

_PARALLEL_WORK = 2**20
"""Multiplications of whole sequences below which waking another thread costs more than it brings."""

_PARALLEL_READ = 2**16
"""The same for elements of the state read by one decoding step."""


@cache
def _load() -> ModuleType | None:
    try:
        from . import _kernels  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _kernels


def declines(device: torch.device) -> str:
    """Why the kernels cannot compute on a device; empty if they can."""
    if device.type != "cpu":
        return f"the compiled kernels run on CPUs, not on {device.type}"
    if _load() is None:
        return "the compiled kernels are not installed (no wheel for this platform and no C++ compiler at installation)"
    return ""


def kernels() -> ModuleType:
    """The compiled module; ImportError where there is none."""
    module = _load()
    if module is None:
        raise ImportError(declines(torch.device("cpu")))
    return module


def sees_tensors() -> bool:
    """Whether the kernels can look into tensors: PyTorch has a table of functions for this from 2.10 on."""
    module = _load()
    return module is not None and _exchanges(module)


@cache
def _exchanges(module: ModuleType) -> bool:
    return bool(module.exchange(getattr(Tensor, "__dlpack_c_exchange_api__", None)))


def describe(tensors: tuple[Tensor | None, ...]) -> Hashable:
    """What is the same for two rows of dense tensors only if their types, devices, shapes and strides are."""
    found: Hashable = kernels().describe(*tensors) if sees_tensors() else None
    if found is None:
        return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)
    return found


def history_shape(query: Tensor, key: Tensor, value: Tensor, problem: Problem, started: bool) -> tuple[int, ...]:
    """Of `Inputs.history` for inputs like these; (0,) where the backward pass does as well or better without."""
    tiling = _tiling(query, key, value, problem, started)
    chunks = -(-int(key.shape[2]) // tiling.chunk)
    shape = (
        *map(int, key.shape[:2]),
        chunks - 1,
        value.shape[3] + 1,
        feature_count(key.shape[3], len(problem.coefficients) - 1),
    )
    inputs = query.numel() + key.numel() + value.numel()
    return shape if problem.causal and 0 < math.prod(shape) <= _HISTORY * inputs else (0,)


def forward(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `chunked.forward`."""
    call = _Call(inputs, problem, problem.keep, True)
    batch, heads, queries, _ = inputs.query.shape
    out = inputs.query.new_empty(batch, heads, queries, call.columns)
    kernels().forward(*call.numbers, out.data_ptr())
    if call.poisoned is not None:
        by_query = call.poisoned.repeat_interleave(heads // inputs.key.shape[1], 1)  # [B, Hq, Tk]
        reached = by_query.cumsum(-1) > 0 if problem.causal else by_query.any(-1, keepdim=True)
        out.masked_fill_(reached[..., None], torch.nan)
        if problem.keep and call.sums is not None:
            call.sums.masked_fill_(call.poisoned.any(-1)[..., None, None], torch.nan)
    return (out, call.sums, call.compensation) if problem.keep else (out, None, None)


def backward(
    inputs: Inputs, problem: Problem, grad: Tensor, grad_end: Tensor | None, out: Tensor, end: Tensor | None
) -> Gradients:
    """As `chunked.backward`."""
    call = _Call(inputs, problem, grad_end is not None, False)
    grad, grad_end = grad.contiguous(), None if grad_end is None else grad_end.contiguous()
    by_query, by_key = (x.new_empty(x.shape) for x in (inputs.query, inputs.key))
    by_value, by_one = inputs.value.new_empty(inputs.value.shape), inputs.value.new_empty(inputs.value.shape[:3])
    by_start = None if inputs.sums is None else inputs.sums.new_empty(inputs.sums.shape)
    results = (by_query, by_key, by_value, by_one, by_start)
    kernels().backward(*call.numbers, *map(address, (grad, grad_end, *results)))
    at_end = None if grad_end is None or end is None else (grad_end, end)
    return gradients(inputs, *results, (grad, out), at_end)


class _Call:
    """The arguments that both passes share, and the tensors that have to live as long as the call."""

    def __init__(self, inputs: Inputs, problem: Problem, keep: bool, forward: bool) -> None:
        query, key, value = map(entries_together, (inputs.query, inputs.key, inputs.value))
        batch, heads, keys, head_dim = key.shape
        queries, group, degree = query.shape[2], query.shape[1] // heads, len(problem.coefficients) - 1
        self.columns = value.shape[3] + 1
        visible, self.poisoned = _visible(inputs)
        log_decay = None if inputs.log_decay is None else inputs.log_decay.contiguous()
        tiling = _tiling(query, key, value, problem, inputs.sums is not None)
        wanted = forward and (keep or keys > _PLAIN_CHUNKS * tiling.chunk)
        self.sums, self.compensation = _moments_at_start(inputs, problem, wanted)
        moments = keep or inputs.sums is not None or not tiling.direct
        coefficients, weights = _constants(head_dim, problem.coefficients, key.dtype, moments)
        self._alive = (query, key, value, visible, log_decay, coefficients, weights)
        work = batch * heads * (keys + queries * group) * feature_count(head_dim, degree) * self.columns
        self.numbers: tuple[int, ...] = (
            key.dtype == torch.float64,
            head_dim,
            degree,
            batch,
            heads,
            group,
            queries,
            keys,
            self.columns,
            tiling.chunk,
            problem.causal,
            tiling.direct,
            inputs.sums is not None,
            keep,
            count_threads(work),
            *strided(query),
            *strided(key),
            *strided(value),
            *map(address, (visible, log_decay, coefficients, weights, self.sums, self.compensation, inputs.history)),
        )


def _tiling(query: Tensor, key: Tensor, value: Tensor, problem: Problem, started: bool) -> Tiling:
    """The same for both passes; a tracer's unknown sizes are pinned down."""
    batch, heads, keys, head_dim = map(int, key.shape)
    group, queries, columns = int(query.shape[1]) // heads, int(query.shape[2]), int(value.shape[3]) + 1
    return choose(
        max(1, batch * heads),
        group,
        queries,
        keys,
        head_dim,
        columns,
        len(problem.coefficients) - 1,
        causal=problem.causal,
        has_state=started,
        keep_state=problem.keep,
        chunk=problem.chunk and int(problem.chunk),
        costs=KERNELS,
    )


def entries_together(x: Tensor) -> Tensor:
    """The same with contiguous entries."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _visible(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Which keys count, bool [B, Hkv, Tk] (None: all), and which hold NaN or Inf (None: none does).

    Those are hidden from the kernels, so that they cannot reach rows before them. A sum is one look at the data; where
    it is not finite, a closer look decides.
    """
    shape = inputs.key.shape[:3]
    visible = None if inputs.visible is None else inputs.visible[:, None].expand(shape)
    if bool((inputs.key.sum() + inputs.value.sum()).isfinite()):
        return (None if visible is None else visible.contiguous()), None
    whole = inputs.key.isfinite().all(-1) & inputs.value.isfinite().all(-1)
    poisoned = ~whole if visible is None else visible & ~whole
    visible = whole if visible is None else visible & whole
    return visible.contiguous(), poisoned if bool(poisoned.any()) else None


def _moments_at_start(inputs: Inputs, problem: Problem, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Moments for the kernels to change, [B, Hkv, E, M]; None where they need not outlive the call."""
    if inputs.sums is not None and inputs.compensation is not None:
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in (inputs.sums, inputs.compensation))  # type: ignore[return-value]
    if not wanted:
        return None, None
    batch, heads, _, head_dim = inputs.key.shape
    features = feature_count(head_dim, len(problem.coefficients) - 1)
    sums = inputs.key.new_zeros(batch, heads, inputs.value.shape[3] + 1, features)
    return sums, torch.zeros_like(sums)


def count_threads(work: int, least: int = _PARALLEL_WORK) -> int:
    """Threads for so much work: one, if it is less than `least`, or where the pool's threads were lost in a fork."""
    return torch.get_num_threads() if work >= least and not _forked else 1


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # GNU OpenMP would wait for the parent's threads for ever
    os.register_at_fork(after_in_child=_note_fork)


def address(x: Tensor | None) -> int:
    """Where a tensor's data lies, 0 if there is none."""
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor) -> tuple[int, ...]:
    """A tensor [batch, heads, tokens, entries] as the kernels read it: address and strides."""
    return x.data_ptr(), *x.stride()[:3]


@lru_cache(maxsize=256)
def _constants(
    head_dim: int, coefficients: tuple[float, ...], dtype: torch.dtype, moments: bool
) -> tuple[Tensor, Tensor]:
    """Coefficients and reading weights as tensors that stay; the latter are empty where no moments are read."""
    with torch.inference_mode(False):
        given = torch.tensor(coefficients, dtype=dtype, device="cpu")
        return given, reading_weights(head_dim, coefficients, dtype) if moments else given[:0]


class Step(NamedTuple):
    """What all decoding steps of the same sizes, types and strides hand over."""

    plan: object  # what the kernel keeps of them
    tail: int | None  # tokens in a full tail; None: no far part
    shape: tuple[int, ...]  # of the output
    as_they_are: bool  # whether the kernels can read the inputs without a copy
    constants: tuple[Tensor, Tensor]  # whose addresses are among the numbers


def plan_step(
    tensors: tuple[Tensor | None, ...],
    state: State,
    coefficients: tuple[float, ...],
    fitted: bool,
    safe_share: float | None,
) -> Step:
    """Prepare decoding steps for tensors and states like these.

    Args:
        tensors: as for `decode_`.
        coefficients: of the series; none without a far part.
        fitted: read far scores by `reading.fit`; of the coefficients only their number counts then.
        safe_share: normalisers below this share of what the visible keys give at score zero make NaN; None: no check.
    """
    query, key, value, visible, log_decay, far_gain = tensors
    assert query is not None and key is not None and value is not None
    inputs = query, key, value
    batch, heads, columns, features = state.sums.shape
    slots = state.window + state.sinks + state.heavy
    query_heads, (_, _, head_dim, width) = query.shape[1], state.tail_key.shape
    degree = len(coefficients) - 1
    fitted = fitted and degree >= 0
    powers = (1.0,) * (degree + 1) if fitted else coefficients
    constants = _constants(head_dim, powers, state.dtype, bool(coefficients))
    gate_strides = (0, 0) if log_decay is None else log_decay.stride()[:2]
    numbers = (
        state.dtype == torch.float64,
        head_dim,
        degree,
        batch,
        heads,
        query_heads // heads,
        columns,
        width,
        count_threads(batch * heads * (columns * features + slots * (head_dim + columns)), _PARALLEL_READ),
        state.scale,
        -1.0 if safe_share is None else safe_share,
        token_limit(state.dtype),
        *map(address, constants),
        *(fit_limits(degree) if fitted else (-1.0, 0.0, 0.0)),
        *(stride for x in inputs for stride in x.stride()[:2]),
        0 if visible is None else visible.stride(0),
        log_decay is not None and log_decay.dtype == torch.float64,
        *gate_strides,
        FULL_RESET,
        state.window,
        state.sinks,
        state.heavy,
        SAFE_SHARE,
    )
    together = all((x.stride(3) == 1 or x.shape[3] <= 1) and x.dtype == state.dtype for x in inputs)
    gates = log_decay is None or log_decay.dtype in (torch.float32, torch.float64)
    gain = far_gain is None or (far_gain.dtype == state.dtype and far_gain.is_contiguous())
    plan = kernels().plan(_readable(tensors), _readable(state.all_tensors()), *numbers)
    tail, shape = width if coefficients else None, (batch, query_heads, 1, columns - 1)
    return Step(plan, tail, shape, together and gates and gain, constants)


def decode_(step: Step, tensors: tuple[Tensor | None, ...], state: State) -> tuple[Tensor, int] | None:
    """Append one token to a state in place and attend; also how many normalisers are not safely positive.

    Args:
        step: what `plan_step` made, for tensors that the kernels can read as they are.
        tensors: query [B, Hq, 1, d]; key, value [B, Hkv, 1, ...]; which are visible, bool [B, 1], log_decay
            [B, Hkv, 1], and far_gain [Hq], or None.

    Returns:
        y [B, Hq, 1, dv], and the number of rows that are NaN for the reason above; -1 if nothing was done because a
        log decay is not <= 0 or a token is not in range. None if nothing was done because the step is for other
        tensors, as far as the kernels can see.
    """
    if not isinstance(tensors[0], Tensor):
        return None
    out, append = tensors[0].new_empty(step.shape), kernels().decode
    given, own, (place,) = _readable(tensors), _readable(state.all_tensors()), _readable((out,))
    if state.tail_length == step.tail:  # judged before the tail is folded: what is refused changes nothing
        unsafe = append(step.plan, given, own, step.tail, place)
        if unsafe is None or unsafe < 0:
            return None if unsafe is None else (out, -1)
        fold_(state)
    unsafe = append(step.plan, given, own, state.tail_length, place)
    if unsafe is None:
        return None
    if unsafe >= 0:
        near = state.near
        if step.tail is not None:
            state.tail_length += 1
        increment_version((state.tail_key, state.tail_value, state.log_decay, state.tail_log_decay, state.tokens))
        if near is not None:
            increment_version(_near_tensors(near))
    return out, unsafe


def _readable(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | int | None, ...]:
    """As the kernels take them: as they are, or their addresses."""
    return tensors if sees_tensors() else tuple(map(address, tensors))


def _near_tensors(near: Near) -> tuple[Tensor, ...]:
    """What a step changes."""
    tensors = (near.key, near.value, near.log_decay, near.sink_key, near.sink_value, near.sink_log_decay)
    if near.heavy == 0:
        return tensors
    return (
        *tensors,
        near.heavy_key,
        near.heavy_value,
        near.heavy_log_decay,
        near.received,
        near.heavy_priority,
    )


def fold_(state: State) -> None:
    """As `State.fold_`."""
    batch, heads, columns, features = state.sums.shape
    tensors: Sequence[Tensor] = (
        state.sums,
        state.compensation,
        state.tail_key,
        state.tail_value,
        state.tail_log_decay,
    )
    kernels().fold(
        state.dtype == torch.float64,
        state.head_dim,
        state.degree,
        batch * heads,
        columns,
        state.tail_key.shape[3],
        state.tail_length,
        count_threads(batch * heads * columns * features * state.tail_length),
        *map(address, tensors),
    )
    increment_version((state.sums, state.compensation))
    state.empty_tail_()

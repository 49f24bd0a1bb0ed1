"""Attention problems for the tests of core and ops: seeded inputs, the float64 oracle, ways to compute in pieces."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import taylor_attention as ta
from taylor_attention.core.basis import expand, reading_weights
from taylor_attention.core.series import EXP
from taylor_attention.ops.reference import attention_reference
from tolerances import relative_error


@dataclass(frozen=True)
class Problem:
    """One call of attention. `along` holds what is cut together with the tokens: key_padding_mask, log_decay,
    far_query and far_key.

    `options` holds the rest: causal, scale, series, window, sinks, heavy, reading, far_gain. The oracle knows no heavy
    tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    degree: int | None
    options: dict[str, Any] = field(default_factory=dict)
    along: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.key.shape[2]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        along = (self.along[name] for name in ("log_decay", "far_query", "far_key") if name in self.along)
        return (self.query, self.key, self.value, *along)

    def solve(self, **more: Any) -> Any:
        return ta.attention(*self.arguments, degree=self.degree, **self.options, **self.along, **more)

    def oracle(self) -> Tensor:
        return attention_reference(*self.arguments, degree=self.degree, **self.options, **self.along)

    def decode_(self, state: ta.State, **more: Any) -> Tensor:
        given = self._given("scale", "series", "reading", "far_gain")
        return ta.decode_(*self.arguments, state, **given, **self.along, **more)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def part(self, start: int, stop: int) -> Problem:
        """The tokens start..stop alone."""
        query, key, value = (x[:, :, start:stop] for x in self.arguments)
        along = {name: x[:, :, start:stop] if x.ndim == 4 else x[..., start:stop] for name, x in self.along.items()}
        return replace(self, query=query, key=key, value=value, along=along)

    def each(self, function: Any) -> Problem:
        """The same problem with a function applied to its floating-point tensors."""
        query, key, value = map(function, self.arguments)
        along = {name: function(x) if x.is_floating_point() else x for name, x in self.along.items()}
        return replace(self, query=query, key=key, value=value, along=along)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.each(lambda x: x.detach().to(dtype))

    def recorded(self) -> Problem:
        """The same numbers as fresh leaves that record gradients."""
        return self.each(lambda x: x.detach().clone().requires_grad_())

    def new_state(self) -> ta.State:
        """The state before the first token."""
        batch, heads, _, head_dim = self.key.shape
        dtype = torch.float64 if self.key.dtype == torch.float64 else torch.float32
        given = self._given("scale", "window", "sinks", "heavy")
        if "far_key" in self.along:
            given["far_dim"] = self.along["far_key"].shape[3]
        return ta.State.zeros(batch, heads, head_dim, self.value.shape[3], self.degree, dtype=dtype, **given)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: self.options[name] for name in names if name in self.options}


def make(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    length: int = 37,
    queries: int | None = None,
    head_dim: int = 4,
    value_dim: int = 3,
    degree: int | None = 2,
    radius: float | None = None,
    mask: str | None = None,
    decay: str | None = None,
    far_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem whose scores stay within +-radius; by default where exp's truncated series is positive."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    queries = length if queries is None else queries
    radius = (0.9 if degree is not None and degree % 2 else 2.0) if radius is None else radius

    def ball(heads: int, tokens: int, dim: int = head_dim, scale: float | None = None) -> Tensor:
        x = torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
        size = 0.3 + 0.7 * torch.rand(batch, heads, tokens, 1, generator=generator, dtype=torch.float64)
        scale = options.get("scale", head_dim**-0.5) if scale is None else scale
        return x / x.norm(dim=-1, keepdim=True) * size * math.sqrt(radius / scale)

    along = {}
    if mask is not None:
        along["key_padding_mask"] = _mask(mask, batch, length, generator)
    if decay is not None:
        along["log_decay"] = _decay(decay, batch, kv_heads, length, generator)
    value = torch.randn(batch, kv_heads, length, value_dim, generator=generator, dtype=torch.float64)
    key = ball(kv_heads, length)  # before the query: the same keys whatever is asked
    query = ball(heads, queries)
    if far_dim is not None:
        along |= {"far_query": ball(heads, queries, far_dim, 1.0), "far_key": ball(kv_heads, length, far_dim, 1.0)}
    return Problem(query, key, value, degree, options, along).to(dtype)


def _mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    position, row = torch.arange(length), torch.arange(batch)[:, None]
    hidden = (row + 1) * length // (batch + 2)  # another number in each row
    kinds = {
        "left": position >= hidden,
        "right": position < length - hidden,
        "holes": torch.rand(batch, length, generator=generator) > 0.4,
        "row 0 hidden": (row > 0) & (position % 3 > 0),
    }
    return kinds[kind].expand(batch, length).clone()


def _decay(kind: str, batch: int, heads: int, length: int, generator: torch.Generator) -> Tensor:
    gates = -torch.rand(batch, heads, length, generator=generator, dtype=torch.float64)
    kinds = {
        "soft": 0.1 * gates,
        "hard": 3 * gates,
        "strong": torch.full_like(gates, -10),
        "resets": gates.where(torch.rand(batch, heads, length, generator=generator) > 0.2, -math.inf),
    }
    return kinds[kind]


def one_shot(problem: Problem, **options: Any) -> tuple[Tensor, ta.State]:
    """One call, in one chunk."""
    return problem.solve(return_state=True, chunk_size=max(1, problem.length), **options)


def carry(problem: Problem, borders: Sequence[int], **options: Any) -> tuple[Tensor, ta.State]:
    """Cut at the borders and carry the state from piece to piece."""
    state, outputs = None, []
    for start, stop in pairwise((0, *borders, problem.length)):
        y, state = problem.part(start, stop).solve(state=state, return_state=True, **options)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def decode(problem: Problem, step: int = 1, state: ta.State | None = None, **options: Any) -> tuple[Tensor, ta.State]:
    """Append `step` tokens at a time to a state (a new one by default), in place."""
    state = problem.new_state() if state is None else state
    parts = [problem.part(a, min(a + step, problem.length)) for a in range(0, problem.length, step)]
    return torch.cat([part.decode_(state, **options) for part in parts], 2), state


def mix(problem: Problem, borders: Sequence[int], in_place: Sequence[bool]) -> tuple[Tensor, ta.State]:
    """Cut at the borders; each piece goes token by token into the state, in place, or by attention, as it says."""
    state, outputs = problem.new_state(), []
    for (start, stop), decoding in zip(pairwise((0, *borders, problem.length)), in_place, strict=True):
        part = problem.part(start, stop)
        decoding = decoding and stop > start
        y, state = decode(part, state=state) if decoding else part.solve(state=state, return_state=True)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def sum_up(problem: Problem, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[N | Z] of each query [B, Hq, Tq, E] and the moments at the end [B, Hkv, E, M], by their definition, in float64.

    What `attention_reference` leaves out: values of size 0, the moments, and those at the start [B, Hkv, E, M].
    """
    query, key, value = (x.double() for x in problem.arguments)
    degree, causal = problem.degree, problem.options.get("causal", True)
    coefficients = problem.options.get("series", EXP).coefficients(degree)
    group, length = query.shape[1] // key.shape[1], problem.length
    query = query * problem.options.get("scale", query.shape[3] ** -0.5)
    columns = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)
    shown = problem.along.get("key_padding_mask", torch.ones(len(key), length, dtype=torch.bool))[:, None]
    gates = problem.along.get("log_decay", torch.zeros(key.shape[:3])).double().masked_fill(~shown, 0)
    later = torch.ones(length, length, dtype=torch.bool).tril(-1)  # [t, j]: j < t
    left = torch.where(later, gates[..., None], 0).cumsum(-2).exp() * shown[:, :, None]  # of key j at token t
    seen = left.tril() if causal else shown[:, :, None]

    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2)
    weights = sum((c * scores**p for p, c in enumerate(coefficients)), torch.zeros_like(scores))
    found = (weights * seen.expand(-1, key.shape[1], -1, -1).repeat_interleave(group, 1)) @ columns.repeat_interleave(
        group, 1
    )
    last = left[..., -1, :] if length else left.sum(-2)
    moments = (columns * last[..., None]).transpose(-1, -2) @ expand(key, degree)
    if start is not None:
        read = expand(query, degree) * reading_weights(query.shape[3], coefficients, torch.float64)
        past = read @ start.double().repeat_interleave(group, 1).transpose(-1, -2)
        fading = gates.cumsum(-1).exp()
        found = found + (past * fading.repeat_interleave(group, 1)[..., None] if causal else past)
        moments = moments + start.double() * gates.sum(-1).exp()[..., None, None]
    return found, moments


def differences(actual: ta.State, expected: ta.State) -> list[str]:
    """What is not the same in two states, to the last bit, the tail included; NaN differs from everything."""
    pairs = {name: (tensor, expected.tensors()[name]) for name, tensor in actual.tensors().items()}
    found = [name for name, (mine, other) in pairs.items() if mine.dtype != other.dtype or not torch.equal(mine, other)]
    return found if actual.metadata() == expected.metadata() else [*found, "metadata"]


def errors(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error; NaN if any is."""
    return torch.tensor([relative_error(a, b) for a, b in zip(found, expected, strict=True)]).amax().item()


def gradients(problem: Problem, answer: Callable[[Problem], Tensor], since: int = 0) -> tuple[Tensor, ...]:
    """Of the outputs from token `since` on, in a fixed direction, by every input."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(*problem.query.shape[:3], problem.value.shape[3], generator=generator).double()
    leaves = problem.recorded()
    loss = (answer(leaves).double() * direction)[:, :, since:].sum()
    return torch.autograd.grad(loss, leaves.inputs, materialize_grads=True)


def _saved(state: ta.State, folder: Path) -> ta.State:
    state.save(folder / "state")
    return ta.State.load(folder / "state")


# Ways to copy a state of two sequences in float32, given a folder.
FORKS: dict[str, Callable[[ta.State, Path], ta.State]] = {
    "clone": lambda state, _: state.clone(),
    "detach": lambda state, _: state.clone().detach(),
    "select": lambda state, _: state.select(torch.arange(2)),
    "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
    "tensors": lambda state, _: ta.State.from_tensors(state.clone().tensors(), state.metadata()),
    "file": _saved,
    "to": lambda state, _: state.clone().to("cpu", torch.float32),
}

"""The contestants of a decode step after a long context, which each of them really holds.

A context is a block of random tokens, many times over: its state is the block's, merged with itself until all tokens
are in it; its key/value cache holds every copy. What follows it can then be compared with float64 at any length, since
attention sees the block once, weighted by the number of copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..core.state import State
from ..ops.attention import attention
from ..ops.decode import decode_
from ..ops.reference import attention_reference, softmax_reference
from . import agreement
from .agreement import Reference
from .cases import OURS, RECURRENT, SOFTMAX, Case, DeclinedError, Ready, Settings, count_heads
from .machine import available_bytes
from .rivals import Attend, Factory, KeyValueCache, Memory, Recurrent
from .sequence import Admit, Inputs, decline_if_slow, draw, first_tokens

BLOCK = 256  # tokens that a context consists of
FRESH = 64  # tokens that follow it, over and over
CHECKED = 4  # of these, compared with float64
READING = 10  # times the patience that reading a context may take

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # one token, [1, H, 1, d] each -> [1, H, 1, d]


@dataclass
class Kept:
    """What is costly to make and serves the next context too.

    Attributes:
        memory: of the key/value cache.
        state: ours after `copies` copies of the block of `shape`, head size and degree among it.
    """

    memory: Memory = field(default_factory=Memory)
    shape: tuple[int, ...] = ()
    copies: int = 0
    state: State | None = None


@dataclass(frozen=True)
class Context:
    """A block [1, H, p, d] so many times over, and the tokens after it, [1, H, 1, d] each."""

    block: Inputs
    copies: int
    fresh: list[Inputs]
    degree: int
    settings: Settings
    kept: Kept

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return self.copies * self.block[0].shape[2]

    @property
    def shape(self) -> dict[str, Any]:
        """What a rival's factory is called with."""
        _, heads, _, head_dim = self.block[0].shape
        return {"heads": heads, "head_dim": head_dim, "value_dim": head_dim, "degree": self.degree, "causal": True}

    @cached_property
    def state(self) -> State:
        """Ours after the context: prefilled with the block, or left by a shorter context, and merged with itself."""
        kept, shape = self.kept, (*self.block[0].shape, self.degree)
        if kept.state is None or kept.shape != shape or self.copies % kept.copies:
            kept.state, kept.copies = self._prefill(), 1
        kept.state = repeat(kept.state, self.copies // kept.copies)
        kept.shape, kept.copies = shape, self.copies
        return kept.state

    def _prefill(self) -> State:
        _, state = attention(
            *self.block,
            degree=self.degree,
            return_state=True,
            backend=self.settings.backend,
            chunk_size=self.settings.chunk,
            max_state_bytes=self.settings.max_state_bytes,
        )
        return state

    def expected(self, reference: Reference) -> Tensor:
        """What the first fresh tokens attend to, float64 [1, H, CHECKED, d].

        A log decay of +log(copies) where the fresh tokens begin weighs the block as often as it is there.
        """
        query, key, value = (
            torch.cat([block, *(token[i] for token in self.fresh[:CHECKED])], dim=2)
            for i, block in enumerate(self.block)
        )
        start = self.block[0].shape[2]
        log_decay = torch.zeros(key.shape[:3], dtype=torch.float64)
        log_decay[:, :, start] = math.log(self.copies)
        return reference(query, key, value, causal=True, log_decay=log_decay)[:, :, start:]


def repeat(state: State, times: int) -> State:
    """The state of a sequence so many times over, in about 2 log2(times) merges."""
    found, power = None, state
    while True:
        if times & 1:
            found = power if found is None else found.merge(power)
        times >>= 1
        if not times:
            assert found is not None  # the highest bit is 1
            return found
        power = power.merge(power)


def make_context(case: Case, settings: Settings, kept: Kept) -> Context:
    """A context of the tokens asked for, rounded up to whole blocks."""
    heads, tokens = count_heads(case, settings), min(case.length, BLOCK)
    block = draw(heads, tokens, case.head_dim)
    fresh = zip(*(x.split(1, dim=2) for x in draw(heads, FRESH, case.head_dim)), strict=True)
    after = [(q.clone(), k.clone(), v.clone()) for q, k, v in fresh]
    return Context(block, -(-case.length // tokens), after, case.degree, settings, kept)


def contestants(case: Case, settings: Settings, factories: Mapping[str, Factory], kept: Kept) -> dict[str, Admit]:
    """Who takes part: each function checks its contestant and returns it ready to be timed, or declines."""
    context = make_context(case, settings, kept)
    admit = {OURS: _admit_ours, SOFTMAX: _admit_cache, RECURRENT: _admit_recurrent}
    found: dict[str, Admit] = {name: partial(function, context) for name, function in admit.items()}
    for name, factory in factories.items():
        found[name] = partial(_admit_rival, name, factory, context)
    return found


def _ready(
    name: str,
    context: Context,
    step: Step,
    reference: Reference,
    tolerance: float,
    nbytes: int | None,
    together: int = 1,
) -> Ready:
    """A contestant whose first steps are right; from then on it decodes the fresh tokens over and over.

    Raises:
        DisagreementError: they are wrong.
    """
    got = torch.cat([step(*token) for token in context.fresh[:CHECKED]], dim=2)
    error = agreement.require_agreement(name, [got], [context.expected(reference)], tolerance)
    tokens = itertools.cycle(context.fresh)
    return Ready(lambda: step(*next(tokens)), error, nbytes, together)


def _taylor(context: Context) -> Reference:
    return partial(attention_reference, degree=context.degree)


def _admit_ours(context: Context) -> Ready:
    state = context.state.clone()
    period = state.tail_key.shape[-1]  # the tail is folded into the moments once in so many steps
    step = partial(decode_, state=state, backend=context.settings.backend)
    return _ready(OURS, context, step, _taylor(context), agreement.EXACT, state.nbytes, period)


def _admit_cache(context: Context) -> Ready:
    needed = KeyValueCache.size(context.tokens + FRESH, context.shape["heads"], context.shape["head_dim"])
    available = available_bytes()
    if available is not None and needed > available + context.kept.memory.nbytes:
        raise DeclinedError(f"more memory than there is: a cache of {needed:,} bytes, {available:,} are available")
    cache = KeyValueCache(context.block[1], context.block[2], context.copies, FRESH, context.kept.memory)
    tolerance = agreement.LOOSE * max(1, context.tokens / 2**20)  # its sums lose digits as the context grows
    return _ready(SOFTMAX, context, cache.decode, softmax_reference, tolerance, needed)


def _admit_recurrent(context: Context) -> Ready:
    attend = Recurrent(**context.shape)
    attend.begin_after(context.state)
    step = partial(_continue, attend)
    return _ready(RECURRENT, context, step, _taylor(context), agreement.LOOSE, attend.state.nbytes)


def _admit_rival(name: str, factory: Factory, context: Context) -> Ready:
    """A rival reads the whole context by its own means, unless a few tokens show that this would take too long."""
    attend = factory(**context.shape)

    def make_step(tokens: int) -> Callable[[], object]:
        few = first_tokens(context.block, tokens)
        return lambda: attend(*few, False)

    decline_if_slow(make_step, context.tokens, READING * context.settings.patience)
    for copy in range(context.copies):
        attend(*context.block, copy > 0)
    return _ready(name, context, partial(_continue, attend), _taylor(context), agreement.LOOSE, None)


def _continue(attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, True)

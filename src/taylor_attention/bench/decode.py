"""The contestants of a decode step after a long context, which each of them really holds.

A context is a block of random tokens, many times over: its state is the block's, merged with itself until all tokens
are in it; its key/value cache holds every copy. What follows it can then be compared with float64 at any length, since
attention sees the copies that no window reaches once, weighted by their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from .cases import (
    EARLY,
    EARLY_CONTEXT,
    OURS,
    PURE,
    RECURRENT,
    SLIDING,
    SOFTMAX,
    Case,
    DeclinedError,
    Ready,
    Settings,
    count_heads,
)
from .machine import available_bytes
from .rivals import Attend, Factory, KeyValueCache, Memory, Recurrent, Ring
from .sequence import Admit, Inputs, decline_if_slow, draw, first_tokens

BLOCK = 256  # tokens that a context consists of
FRESH = 64  # tokens that follow it, over and over
CHECKED = 4  # of these, compared with float64
READING = 10  # times the patience that reading a context may take
CLOSE = 3  # turns of ours in one of the others: how flat decoding is takes a close look

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # one token, [1, H, 1, d] each -> [1, H, 1, d]


@dataclass
class Kept:
    """What is costly to make and serves the next context too.

    Attributes:
        memory: of the key/value cache.
        states: ours by window, each after so many copies of the block of `shape`, head size and degree among it.
    """

    memory: Memory = field(default_factory=Memory)
    shape: tuple[int, ...] = ()
    states: dict[int, tuple[int, State]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """A block [1, H, p, d] so many times over, and the tokens after it, [1, H, 1, d] each."""

    block: Inputs
    copies: int
    fresh: list[Inputs]
    degree: int
    window: int
    settings: Settings
    kept: Kept

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return self.copies * self.block[0].shape[2]

    @property
    def latest(self) -> int:
        """Copies that the window may reach."""
        return min(self.copies, -(-self.window // self.block[0].shape[2]))

    @property
    def shape(self) -> dict[str, Any]:
        """What a rival's factory is called with."""
        _, heads, _, head_dim = self.block[0].shape
        return {"heads": heads, "head_dim": head_dim, "value_dim": head_dim, "degree": self.degree, "causal": True}

    @cached_property
    def state(self) -> State:
        """Ours after the context: prefilled with the block, or left by a shorter context, and merged with itself."""
        kept, shape = self.kept, (*self.block[0].shape, self.degree)
        if kept.shape != shape:
            kept.shape, kept.states = shape, {}
        copies, state = kept.states.get(self.window, (0, None))
        if state is None or self.copies % copies:
            copies, state = 1, self._prefill()
        state = repeat(state, self.copies // copies)
        kept.states[self.window] = self.copies, state
        return state

    def _prefill(self) -> State:
        _, state = attention(
            *self.block,
            degree=self.degree,
            window=self.window,
            return_state=True,
            backend=self.settings.backend,
            chunk_size=self.settings.chunk,
            max_state_bytes=self.settings.max_state_bytes,
        )
        return state

    def expected(self, reference: Reference) -> Tensor:
        """What the first fresh tokens attend to, float64 [1, H, CHECKED, d].

        The keys are a block that stands for the copies that no window reaches, the latest copies, and the fresh tokens.
        A log decay of +log(n) after the first block weighs it n times.
        """
        tokens = self.block[0].shape[2]
        fresh = [torch.cat(each, dim=2) for each in zip(*self.fresh[:CHECKED], strict=True)]
        key, value = (torch.cat([self.block[i]] * (1 + self.latest) + [fresh[i]], dim=2) for i in (1, 2))
        log_decay = torch.zeros(1, 1, key.shape[2], dtype=torch.float64)  # the same for all heads
        log_decay[:, :, tokens] = torch.tensor(self.copies - self.latest, dtype=torch.float64).log()
        return reference(fresh[0], key, value, causal=True, log_decay=log_decay)


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
    return Context(block, -(-case.length // tokens), after, case.degree, case.window, settings, kept)


def contestants(case: Case, settings: Settings, factories: Mapping[str, Factory], kept: Kept) -> dict[str, Admit]:
    """Who takes part: each function checks its contestant and returns it ready to be timed, or declines.

    Rivals compute the pure method, so with a window there are others to compare with.
    """
    context = make_context(case, settings, kept)
    found: dict[str, Admit] = {OURS: partial(_admit_ours, OURS, context)}
    if context.tokens > EARLY_CONTEXT:
        early = replace(context, copies=EARLY_CONTEXT // BLOCK, kept=Kept())
        found[EARLY] = partial(_admit_ours, EARLY, early)
    found[SOFTMAX] = partial(_admit_cache, context)
    if case.window:
        pure = replace(context, window=0)
        return found | {PURE: partial(_admit_ours, PURE, pure), SLIDING: partial(_admit_ring, context)}
    found[RECURRENT] = partial(_admit_recurrent, context)
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
) -> Ready:
    """A contestant whose first steps are right; from then on it decodes the fresh tokens over and over.

    Raises:
        DisagreementError: they are wrong.
    """
    got = torch.cat([step(*token) for token in context.fresh[:CHECKED]], dim=2)
    error = agreement.require_agreement(name, [got], [context.expected(reference)], tolerance)
    tokens = itertools.cycle(context.fresh)
    return Ready(lambda: step(*next(tokens)), error, nbytes)


def _taylor(context: Context) -> Reference:
    return partial(attention_reference, degree=context.degree, window=context.window)


def _admit_ours(name: str, context: Context) -> Ready:
    state = context.state.clone()
    period = state.tail_key.shape[-1]  # the tail is folded into the moments once in so many steps
    step = partial(decode_, state=state, backend=context.settings.backend)
    ready = _ready(name, context, step, _taylor(context), agreement.EXACT, state.nbytes)
    return replace(ready, together=period, often=CLOSE)


def _admit_cache(context: Context) -> Ready:
    needed = KeyValueCache.size(context.tokens + FRESH, context.shape["heads"], context.shape["head_dim"])
    available = available_bytes()
    if available is not None and needed > available + context.kept.memory.nbytes:
        raise DeclinedError(f"more memory than there is: a cache of {needed:,} bytes, {available:,} are available")
    cache = KeyValueCache(context.block[1], context.block[2], context.copies, FRESH, context.kept.memory)
    tolerance = agreement.LOOSE * max(1, context.tokens / 2**20)  # its sums lose digits as the context grows
    return _ready(SOFTMAX, context, cache.decode, softmax_reference, tolerance, needed)


def _admit_ring(context: Context) -> Ready:
    key, value = (x.repeat(1, 1, context.latest, 1) for x in context.block[1:])
    ring = Ring(key, value, context.window)
    near = partial(attention_reference, degree=None, window=context.window)
    return _ready(SLIDING, context, ring.decode, near, agreement.LOOSE, ring.key.nbytes + ring.value.nbytes)


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

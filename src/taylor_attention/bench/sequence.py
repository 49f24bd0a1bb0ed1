"""The contestants of a prefill or a training step: who they are, that they are right, and what one step of them is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..ops.attention import attention
from ..ops.reference import attention_reference, softmax_reference
from . import agreement
from .agreement import Reference
from .cases import (
    FORWARD,
    OURS,
    PREFILL,
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
from .machine import working_memory
from .rivals import Attend, Factory, Recurrent, slide

PROBES = (1, 16)  # tokens by which a rival's speed is estimated
OVERHEAD = 0.1  # seconds beyond which one token's time is work, not calls
SPREAD = 0.5
"""Standard deviation of queries and keys: scores of about 0.25, where odd degrees are positive too."""

Admit = Callable[[], Ready]
Inputs = tuple[Tensor, Tensor, Tensor]


def draw(heads: int, tokens: int, head_dim: int) -> Inputs:
    """Random query, key and value, [1, H, T, d] each."""
    query, key, value = torch.randn(3, 1, heads, tokens, head_dim).unbind(0)
    return query * SPREAD, key * SPREAD, value


def first_tokens(inputs: Inputs, tokens: int) -> Inputs:
    """So many tokens, [1, H, tokens, d] each, or all there are."""
    query, key, value = (x[:, :, :tokens] for x in inputs)
    return query, key, value


def contestants(case: Case, settings: Settings, factories: Mapping[str, Factory]) -> dict[str, Admit]:
    """Who takes part: each function checks its contestant and returns it ready to be timed, or declines.

    Rivals compute the pure method, so with a window there are others to compare with.
    """
    inputs = draw(count_heads(case, settings), case.length, case.head_dim)
    taylor = partial(attention_reference, degree=case.degree)

    def own(window: int, query: Tensor, key: Tensor, value: Tensor, continue_sequence: bool) -> Tensor:
        backend, chunk = settings.backend, settings.chunk
        return attention(query, key, value, degree=case.degree, window=window, backend=backend, chunk_size=chunk)

    def ours(name: str, window: int) -> Admit:
        exact = partial(taylor, window=window)
        return lambda: admit(name, case, partial(own, window), inputs, exact, agreement.EXACT)

    found: dict[str, Admit] = {
        OURS: ours(OURS, case.window),
        SOFTMAX: lambda: admit(SOFTMAX, case, _softmax, inputs, softmax_reference, agreement.LOOSE),
    }
    if case.kind != PREFILL:
        found[FORWARD] = lambda: Ready(lambda: own(case.window, *_leaves(inputs), False))
    if case.window:
        near = partial(attention_reference, degree=None, window=case.window)
        sliding = partial(_slide, case.window)
        found[PURE] = ours(PURE, 0)
        found[SLIDING] = lambda: admit(SLIDING, case, sliding, inputs, near, agreement.LOOSE)
        return found
    for name, factory in {RECURRENT: Recurrent, **factories}.items():
        found[name] = partial(_admit_rival, name, case, factory, inputs, taylor, settings.patience)
    return found


def _softmax(query: Tensor, key: Tensor, value: Tensor, continue_sequence: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _slide(window: int, query: Tensor, key: Tensor, value: Tensor, continue_sequence: bool) -> Tensor:
    return slide(query, key, value, window)


def _admit_rival(
    name: str, case: Case, factory: Factory, inputs: Inputs, reference: Reference, patience: float
) -> Ready:
    """As `admit`, unless a few tokens show that the rival would take too long."""
    head_dim = case.head_dim
    attend = factory(heads=inputs[0].shape[1], head_dim=head_dim, value_dim=head_dim, degree=case.degree, causal=True)

    def make_step(tokens: int) -> Callable[[], object]:
        few = first_tokens(inputs, tokens)
        return (lambda: attend(*few, False)) if case.kind == PREFILL else _training_step(attend, few)

    decline_if_slow(make_step, case.length, patience)
    return admit(name, case, attend, inputs, reference, agreement.LOOSE)


def decline_if_slow(make_step: Callable[[int], Callable[[], object]], length: int, patience: float) -> None:
    """Estimate how long a rival takes for so many tokens from steps of a few, each after one that warms up.

    Raises:
        DeclinedError: it is more than the patience, in seconds.
    """
    for tokens in PROBES:
        step = make_step(tokens)
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        estimate = seconds * max(1, length / tokens)
        if estimate > patience and (tokens == PROBES[-1] or seconds > OVERHEAD):
            raise DeclinedError(f"longer than {patience:g} s (--patience): about {estimate:.3g} s")


def admit(name: str, case: Case, attend: Attend, inputs: Inputs, reference: Reference, tolerance: float) -> Ready:
    """Compare the whole result in some rows, and for training the gradients that these rows give to every token.

    Raises:
        DisagreementError: the result is wrong.
    """
    rows = agreement.sample_rows(case.length)
    if case.kind == PREFILL:
        y, nbytes = working_memory(lambda: attend(*inputs, False))
        expected = agreement.reference_rows(*inputs, rows, reference)
        error = agreement.require_agreement(name, [y[:, :, rows]], [expected], tolerance)
        return Ready(lambda: attend(*inputs, False), error, nbytes)
    leaves, exact = _leaves(inputs), _leaves(x.double() for x in inputs)
    direction = torch.randn(1, inputs[0].shape[1], len(rows), inputs[2].shape[3])
    gradients, nbytes = working_memory(
        lambda: torch.autograd.grad(attend(*leaves, False)[:, :, rows], leaves, direction)
    )
    expected = agreement.reference_rows(*exact, rows, reference)
    wanted = torch.autograd.grad(expected, exact, direction.double())
    error = agreement.require_agreement(name, gradients, wanted, tolerance)
    return Ready(_training_step(attend, inputs), error, nbytes)


def _leaves(inputs: Iterable[Tensor]) -> Inputs:
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    return query, key, value


def _training_step(attend: Attend, inputs: Iterable[Tensor]) -> Callable[[], object]:
    """Forward, and backward from a gradient of ones to query, key and value."""
    leaves = _leaves(inputs)
    ones = torch.ones_like(leaves[2])
    return lambda: torch.autograd.grad(attend(*leaves, False), leaves, ones)

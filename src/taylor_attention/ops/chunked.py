"""Taylor attention as GEMMs in PyTorch, on any device, with its backward: [N | Z] before the division.

The sequence is cut into chunks. Inside a chunk the polynomial is evaluated on the scores (see `tiles`); across chunks
queries read the moments of everything before (see `core.moments`). For a query at position i, with
f(s) = sum_p c_p s^p and the cumulative log decay L:

    [N | Z]_i = sum_{j <= i} exp(L_i - L_j) f(q_i . k_j) [v_j, 1]

The backward pass stores nothing but the inputs and the output: one sweep forward rebuilds the moments and gives the
gradient of the queries; one sweep back carries the gradient of the moments and gives those of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..core.moments import RunningMoments, accumulate_, read, read_slope
from .problem import Gradients, Inputs, Problem, gradients
from .tiles import Decay, Run, attend_within, attend_within_backward
from .tiling import choose


def forward(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[N | Z] as [B, Hq, Tq, E], and if kept the moments at the end with their compensation, [B, Hkv, E, M]."""
    whole, poisoned = _guard(_whole(inputs, problem))
    batch, heads = inputs.key.shape[:2]
    sums, compensation = _start(whole, inputs)
    out = whole.u.new_zeros(whole.q.shape[0], whole.u.shape[1], *whole.q.shape[2:])
    sweep = _forward_causal if problem.causal else _forward_all
    for rows, run in _runs(whole):
        sweep(run, _moments(run, sums, compensation, rows), out[rows])
    if poisoned is not None:
        reached = poisoned.cumsum(-1) > 0 if problem.causal else poisoned.any(-1, keepdim=True)
        out.masked_fill_(reached[:, None, None], torch.nan)
        if sums is not None:
            sums.masked_fill_(poisoned.any(-1)[:, None, None], torch.nan)
    result = out.unflatten(0, (batch, heads)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    if sums is None or compensation is None or not problem.keep:
        return result.contiguous(), None, None
    return result.contiguous(), sums.unflatten(0, (batch, heads)), compensation.unflatten(0, (batch, heads))


def backward(
    inputs: Inputs, problem: Problem, grad: Tensor, grad_end: Tensor | None, out: Tensor, end: Tensor | None
) -> Gradients:
    """Gradients, given those of `forward`'s results (grad_end None if unused) and the results themselves."""
    whole = replace(_guard(_whole(inputs, problem))[0], keep=grad_end is not None)
    batch, heads = inputs.key.shape[:2]
    sums, compensation = _start(whole, inputs)
    grads = _inside(grad, heads)
    by_end = None if grad_end is None else grad_end.flatten(0, 1)
    dq, dk, du = torch.zeros_like(whole.q), torch.zeros_like(whole.k), torch.zeros_like(whole.u)
    by_start = None if sums is None or inputs.sums is None else torch.zeros_like(sums)
    sweep = _backward_causal if problem.causal else _backward_all
    for rows, run in _runs(whole):
        moments = _moments(run, sums, compensation, rows)
        by_end_rows = None if by_end is None else by_end[rows]
        found = sweep(run, moments, by_end_rows, grads[rows], (dq[rows], dk[rows], du[rows]))
        if by_start is not None and found is not None:
            by_start[rows] = found
    return gradients(
        inputs,
        dq.unflatten(0, (batch, heads)).permute(0, 1, 3, 4, 2).flatten(1, 2),
        dk.transpose(1, 2).unflatten(0, (batch, heads)),
        du[:, :-1].transpose(1, 2).unflatten(0, (batch, heads)),
        du[:, -1].unflatten(0, (batch, heads)),
        None if by_start is None else by_start.unflatten(0, (batch, heads)),
        (grad, out),
        None if grad_end is None or end is None else (grad_end, end),
    )


def _inside(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, e] -> [B * Hkv, e, g, T], contiguous."""
    return x.unflatten(1, (kv_heads, -1)).permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()


def _whole(inputs: Inputs, problem: Problem) -> Run:
    """All rows of a problem in the inside layout, with hidden keys erased."""
    batch, heads, keys, head_dim = inputs.key.shape
    q = _inside(inputs.query, heads)
    k = inputs.key.transpose(2, 3).flatten(0, 1).contiguous()
    u = k.new_ones(batch * heads, inputs.value.shape[-1] + 1, keys)
    u[:, :-1] = inputs.value.transpose(2, 3).flatten(0, 1)
    log_decay = inputs.log_decay
    if inputs.visible is not None:
        hidden = ~inputs.visible[:, None].expand(-1, heads, -1)  # [B, Hkv, Tk]
        k = k.masked_fill(hidden.flatten(0, 1)[:, None], 0)  # not in place: k may still be the caller's key
        u.masked_fill_(hidden.flatten(0, 1)[:, None], 0)
        log_decay = None if log_decay is None else log_decay.masked_fill(hidden, 0)
    tiling = choose(
        max(1, q.shape[0]),
        q.shape[2],
        q.shape[3],
        keys,
        head_dim,
        u.shape[1],
        len(problem.coefficients) - 1,
        causal=problem.causal,
        has_state=inputs.sums is not None,
        keep_state=problem.keep,
        chunk=problem.chunk,
    )
    decay = None if log_decay is None else log_decay.flatten(0, 1)
    return Run(q, k, u, decay, problem.coefficients, tiling, inputs.sums is not None, problem.keep)


def _guard(run: Run) -> tuple[Run, Tensor | None]:
    """Erase keys that hold NaN or Inf, so that they cannot reach rows before them; also where they were, [n, Tk]."""
    poisoned = ((run.k * 0).sum(1) + (run.u * 0).sum(1)).isnan()
    if not poisoned.any():
        return run, None
    erased = poisoned[:, None]
    return replace(run, k=run.k.masked_fill(erased, 0), u=run.u.masked_fill(erased, 0)), poisoned


def _start(run: Run, inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Copies of the sums at the start, [n, E, M], or zeros where only the end is wanted."""
    if inputs.sums is not None and inputs.compensation is not None:
        return inputs.sums.flatten(0, 1).clone(), inputs.compensation.flatten(0, 1).clone()
    return (run.zeros(), run.zeros()) if run.keep else (None, None)


def _runs(whole: Run) -> Iterator[tuple[slice, Run]]:
    """The problem in groups of rows, small enough to stay near the caches."""
    for a in range(0, whole.q.shape[0], whole.tiling.together):
        rows = slice(a, min(a + whole.tiling.together, whole.q.shape[0]))
        decay = None if whole.log_decay is None else whole.log_decay[rows]
        yield rows, replace(whole, q=whole.q[rows], k=whole.k[rows], u=whole.u[rows], log_decay=decay)


def _moments(run: Run, sums: Tensor | None, compensation: Tensor | None, rows: slice) -> RunningMoments | None:
    """The running moments of some rows, in place on the sums given; None where nothing needs any."""
    if sums is not None and compensation is not None:
        return RunningMoments(sums[rows], compensation[rows], run.degree)
    return None if run.tiling.direct and not run.keep else RunningMoments(run.zeros(), run.zeros(), run.degree)


def _read(run: Run, weighted: Tensor, part: slice) -> Tensor:
    """What the queries of a part read from weighted moments: [n, E, g, C]."""
    return read(run.queries(part), weighted, run.degree).unflatten(2, (run.group, -1))


def _append_(moments: RunningMoments, run: Run, part: slice, decay: Decay | None = None) -> None:
    """Add the keys and values of a part to the moments."""
    u = run.u[:, :, part]
    if decay is not None:
        moments.decay_(decay.whole)
        u = u * decay.to_end
    moments.accumulate_(run.k[:, :, part], u)


def _forward_causal(run: Run, moments: RunningMoments | None, out: Tensor) -> None:
    """Fill out [n, E, g, T] and move the moments to the end if they are kept."""
    chunks = run.chunks(run.k.shape[2])
    for index, part in enumerate(chunks):
        decay = run.decay(part)
        if moments is not None and (index or run.started):
            past = _read(run, moments.weighted(run.weights), part)
            out[..., part] += past if decay is None else past * decay.from_start.unsqueeze(2)
        attend_within(run, part, True, out)
        if moments is not None and (run.keep or index + 1 < len(chunks)):
            _append_(moments, run, part, decay)
    if moments is not None and run.keep:
        moments.settle_()


def _forward_all(run: Run, moments: RunningMoments | None, out: Tensor) -> None:
    """As `_forward_causal`, where every query sees every key and the moments at the start."""
    if run.tiling.direct:
        attend_within(run, slice(0, run.q.shape[3]), False, out)
    if moments is None:
        return
    if run.tiling.direct and run.started:
        _read_all(run, moments, out)
    if run.keep or not run.tiling.direct:
        for part in run.chunks(run.k.shape[2]):
            _append_(moments, run, part)
    if not run.tiling.direct:
        _read_all(run, moments, out)
    if run.keep:
        moments.settle_()


def _read_all(run: Run, moments: RunningMoments, out: Tensor) -> None:
    """Add what all queries read from the moments as they are."""
    weighted = moments.weighted(run.weights)
    for part in run.chunks(run.q.shape[3]):
        out[..., part] += _read(run, weighted, part)


_Grads = tuple[Tensor, Tensor, Tensor]  # of q, k, u, added to in place


def _backward_causal(
    run: Run, moments: RunningMoments | None, by_end: Tensor | None, grad: Tensor, grads: _Grads
) -> Tensor | None:
    """Add the gradients of queries, keys and values; return that of the moments at the start, [n, E, M].

    `moments` are those at the start (moved on here), `by_end` is the gradient of those at the end.
    """
    chunks = run.chunks(run.k.shape[2])
    for index, part in enumerate(chunks):  # with the sequence: rebuild the moments, gradients of queries
        decay = run.decay(part)
        if moments is not None and (index or run.started):
            _read_backward(run, moments.weighted(run.weights), _faded(grad[..., part], decay), part, grads)
        attend_within_backward(run, part, True, grad, grads)
        if moments is not None and index + 1 < len(chunks):
            _append_(moments, run, part, decay)
    if moments is None:
        return None
    by_moments = run.zeros() if by_end is None else by_end.clone()
    for index, part in reversed(list(enumerate(chunks))):  # against it: gradients of keys and values
        decay = run.decay(part)
        if run.keep or index + 1 < len(chunks):
            _append_backward(run, by_moments, part, decay, grads)
        if decay is not None:
            by_moments *= decay.whole.to(by_moments.dtype)
        if index or run.started:
            by_moments += _by_read_moments(run, _faded(grad[..., part], decay), part)
    return by_moments


def _backward_all(
    run: Run, moments: RunningMoments | None, by_end: Tensor | None, grad: Tensor, grads: _Grads
) -> Tensor | None:
    """As `_backward_causal`, for `_forward_all`."""
    queries, keys, direct = run.chunks(run.q.shape[3]), run.chunks(run.k.shape[2]), run.tiling.direct
    if direct:
        attend_within_backward(run, slice(0, run.q.shape[3]), False, grad, grads)
    if moments is None:
        return None
    by_moments = run.zeros() if by_end is None else by_end.clone()
    if direct and run.keep:  # the keys are in the end's moments, and no query read them there
        for part in keys:
            _append_backward(run, by_moments, part, None, grads)
    if not direct:
        for part in keys:
            _append_(moments, run, part)
    if run.started or not direct:
        weighted = moments.weighted(run.weights)
        for part in queries:
            _read_backward(run, weighted, grad[..., part], part, grads)
            by_moments += _by_read_moments(run, grad[..., part], part)
    if not direct:
        for part in keys:
            _append_backward(run, by_moments, part, None, grads)
    return by_moments


def _faded(grad: Tensor, decay: Decay | None) -> Tensor:
    """The gradient as the moments at the chunk's start feel it: [n, E, g, C]."""
    return grad if decay is None else grad * decay.from_start.unsqueeze(2)


def _read_backward(run: Run, weighted: Tensor, grad: Tensor, part: slice, grads: _Grads) -> None:
    """Add the gradient of the queries of a part, from what they read."""
    _, slope = read_slope(run.queries(part), weighted, grad.flatten(2), run.degree)
    grads[0][..., part] += slope.unflatten(2, (run.group, -1))


def _by_read_moments(run: Run, grad: Tensor, part: slice) -> Tensor:
    """The gradient of the moments that the queries of a part read: [n, E, M]."""
    found = run.zeros()
    accumulate_(found, run.queries(part), grad.flatten(2), run.degree)
    return found.mul_(run.weights)


def _append_backward(run: Run, by_moments: Tensor, part: slice, decay: Decay | None, grads: _Grads) -> None:
    """Add the gradients of the keys and values of a part, from the moments that they were added to."""
    u = run.u[:, :, part] if decay is None else run.u[:, :, part] * decay.to_end
    by_u, slope = read_slope(run.k[:, :, part], by_moments, u, run.degree)
    grads[1][:, :, part] += slope
    grads[2][:, :, part] += by_u if decay is None else by_u * decay.to_end

"""How large the terms of the series are, and what half precision and counting in float32 do to their sums.

The paper sets alpha_p = scale^p / p! beside the resolutions of floating-point formats. The term is alpha_p (q . k)^p,
whose root mean square is sqrt((2p - 1)!!) / p! for normal scores of spread 1, however small alpha_p is.
"""

from __future__ import annotations

from itertools import pairwise
from math import factorial
from typing import Any

import torch
from torch import Tensor

from ...core.basis import expand, multiplicities, offsets
from ...core.series import expected_error
from ...core.state import State
from ...ops.attention import attention
from ...ops.decode import decode_
from ...ops.normaliser import watch_normalisers
from ..rivals import Recurrent
from .experiment import Case, Experiment
from .precision_shown import conclusions, pictures, tables

TERMS, HALVES, COUNTING = "terms", "halves", "counting"
HEAD_DIMS = (8, 16, 32, 64)
POWERS = 8
PAIRS = 2**18
"""Queries with keys whose scores are drawn."""
DEGREE = 3
"""The paper's P = 4."""
QUERIES = 512
"""That read the state, in each head."""
WIDTH = 64
STEPS = 5
"""Per decade of tokens at which the state is read."""
BLOCK = 2**16
"""Tokens per call."""
HALF_DTYPES = (torch.float16, torch.bfloat16)
STUCK = 2**24
"""Where adding 1 in float32 changes nothing."""
BEYOND = 1024


def plan(quick: bool) -> list[Case]:
    """Terms for every head size; halves for the sizes whose contexts are long."""
    tokens = 10**5 if quick else 10**6
    return [
        *({"what": TERMS, "head_dim": head_dim} for head_dim in HEAD_DIMS),
        *({"what": HALVES, "head_dim": head_dim, "tokens": tokens} for head_dim in HEAD_DIMS[:2]),
        {"what": COUNTING},
    ]


@torch.no_grad()
def measure(case: Case, seed: int) -> dict[str, Any]:
    """Sizes of terms, or what a format of 16 bits makes of the sums, or how far a counter counts."""
    generator = torch.Generator().manual_seed(seed)
    if case["what"] == TERMS:
        return measure_terms(case["head_dim"], generator)
    if case["what"] == HALVES:
        return {"reads": measure_halves(case["head_dim"], case["tokens"], generator)}
    return measure_counting()


# ---- terms -----------------------------------------------------------------------------------------------------------


def measure_terms(head_dim: int, generator: torch.Generator) -> dict[str, Any]:
    """Per power p: alpha_p, the root mean square of alpha_p (q . k)^p, and what ending with it is expected to cost."""
    query, key = torch.randn(2, PAIRS, head_dim, dtype=torch.float64, generator=generator)
    scores = (query * key).sum(-1) * head_dim**-0.5
    return {
        "alpha": [head_dim ** (-p / 2) / factorial(p) for p in range(POWERS)],
        "term": [float((scores**p / factorial(p)).square().mean().sqrt()) for p in range(POWERS)],
        "error": [expected_error(1.0, p) for p in range(POWERS)],
    }


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def measure_halves(head_dim: int, tokens: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Read a growing state with products that return 16 bits, and with the library's own from inputs of 16 bits."""
    heads, found = WIDTH // head_dim, []
    state: State | None = None
    ends = torch.logspace(3, torch.tensor(float(tokens)).log10().item(), _steps(tokens)).round().long().tolist()
    reading = _draw(heads, QUERIES, head_dim, generator)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        for size in _blocks(end - start):
            drawn = _draw(heads, size, head_dim, generator)
            with watch_normalisers():  # the first few rows of an odd degree may be none
                _, state = attention(*drawn, degree=DEGREE, state=state, return_state=True)
        assert state is not None
        found.append({"tokens": end} | _read_all(reading, state))
    return found


def _steps(tokens: int) -> int:
    return int(STEPS * (torch.tensor(float(tokens)).log10().item() - 3)) + 1


def _blocks(tokens: int) -> list[int]:
    return [min(BLOCK, tokens - start) for start in range(0, tokens, BLOCK)]


def _draw(heads: int, tokens: int, head_dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(3, 1, heads, tokens, head_dim, generator=generator)


def _read_all(reading: Tensor, state: State) -> dict[str, Any]:
    query, key, value = reading
    exact = _divide(read_sums(query, state))
    found = {}
    for dtype in HALF_DTYPES:
        rows = _divide(read_sums(query, state, dtype))
        own = attention(query.to(dtype), key.to(dtype), value.to(dtype), degree=DEGREE, state=state)
        lost = ~rows.isfinite().all(-1)
        error = (rows - exact).norm(dim=-1) / exact.norm(dim=-1)
        found[str(dtype).removeprefix("torch.")] = {
            "lost": float(lost.double().mean()),
            "error": float(error[~lost].median()) if not bool(lost.all()) else None,
            "library_lost": float((~own.isfinite().all(-1)).double().mean()),
        }
    return found


def read_sums(query: Tensor, state: State, dtype: torch.dtype | None = None) -> Tensor:
    """[N | Z] of queries [1, H, n, d] against a state's moments: [1, H, n, E], float32.

    With a dtype as autocast computes it, term after term: moments times alpha_p, features and what each product returns
    are of that dtype, and so is the sum of the terms; products add up in float32.
    """
    head_dim, scale = query.shape[-1], state.scale
    features = expand(query, DEGREE)  # [1, H, n, M]
    total, places = None, offsets(head_dim, DEGREE)
    for p, (start, stop) in enumerate(pairwise(places)):
        part = slice(start, stop)
        moments = state.moments[:, :, :, part].mT * (scale**p / factorial(p))  # [1, H, m, E]
        weighted = features[..., part] * multiplicities(head_dim, p)
        halved = dtype is not None and p > 0  # the authors' term of power 0 is no product
        if halved:
            moments, weighted = moments.to(dtype).float(), weighted.to(dtype).float()
        term = weighted @ moments  # [1, H, n, E]
        if halved:
            term = term.to(dtype).float()
        total = term if total is None else total + term
    assert total is not None
    return total


def _divide(sums: Tensor) -> Tensor:
    """N / Z; NaN where either is infinite, which 0 would hide."""
    return torch.where(sums.isfinite().all(-1, keepdim=True), sums[..., :-1] / sums[..., -1:], torch.nan)


# ---- counting --------------------------------------------------------------------------------------------------------


def measure_counting() -> dict[str, Any]:
    """How far token by token counts: the recurrence in float32, and the library, which goes on to twice as many.

    Keys are zeros, so that all tokens weigh the same. Values are 1 up to 2^24 and 0 after.
    """
    state = _feed(None, STUCK, 1.0)
    naive = Recurrent(heads=1, head_dim=1, value_dim=1, degree=2, causal=True)
    naive.begin_after(state)
    query, key = torch.zeros(2, 1, 1, 1, 1)
    stepped = state.clone()
    for _ in range(BEYOND):
        naive(query, key, query, True)
        decode_(query, key, query, stepped)
    end = _feed(state, STUCK, 0.0)
    mean = float(decode_(query, key, query, end.clone())[0, 0, 0, 0])
    return {
        "tokens": STUCK + BEYOND,
        "recurrence": int(naive.state[0, 0, 0, -1]),
        "library": _count(stepped),
        "twice": int(end.tokens[0]),
        "twice_count": _count(end),
        "twice_mean": mean,
    }


def _feed(state: State | None, tokens: int, worth: float) -> State:
    for size in _blocks(tokens):
        key = torch.zeros(1, 1, size, 1)
        _, state = attention(key, key, torch.full_like(key, worth), degree=2, state=state, return_state=True)
    assert state is not None
    return state


def _count(state: State) -> int:
    """What the moments hold of the number of tokens, with what rounding dropped."""
    folded = state.folded()
    return int(folded.sums[0, 0, -1, 0].double() + folded.compensation[0, 0, -1, 0].double())


EXPERIMENT = Experiment(
    "precision",
    "Terms, 16 bits and counting",
    "How large are the terms of the series, and what becomes of their sums in 16 bits and in plain float32?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

"""How near Taylor attention comes to softmax on random tokens (paper: figures 5 and A4), and what they leave out.

Queries, keys and values are standard normal, drawn in float16 as the authors' script does, and softmax is float64. The
paper shows |y - softmax| for each element. Here stands ||y - softmax|| / ||softmax|| for each token beside it, as the
outputs themselves shrink with the context, and the same moments are read with other coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.cost import flops_per_token, state_size
from ...core.series import expected_error
from ...core.state import needed_bytes
from ...ops.attention import attention
from ...ops.normaliser import watch_normalisers
from .experiment import Case, Experiment
from .reconstruction_rows import Rows, attend_rows
from .reconstruction_shown import HISTOGRAM, conclusions, pictures, tables

TOKENS = 100 * 1024
HEAD_DIMS = (8, 16, 32, 64)
DEGREES = (2, 3, 4, 5)
"""The paper's P = 3 to 6."""
WIDTH = 64
"""Heads x head size, as the authors' script has it."""
EVEN, SPREAD = 160, 128
"""Queries that are compared: evenly spaced, for histograms and medians; spaced by their logarithms, for positions."""
BINS = 20
"""Of positions, spaced by their logarithms."""
WORK = 1.8e12
"""FLOPs of one case through the library; larger ones run on fewer heads, then on fewer tokens."""
FEWEST = 16384
"""Tokens below which a run through the library would say nothing about a state."""
CHUNK = 1024
"""Tokens per chunk there: left to itself the library would score large heads directly, which is cheaper."""


def plan(quick: bool) -> list[Case]:
    """Head sizes by degrees."""
    head_dims, degrees, tokens = ((8, 16), (2, 3), 4096) if quick else (HEAD_DIMS, DEGREES, TOKENS)
    return [{"head_dim": head_dim, "degree": degree, "tokens": tokens} for head_dim in head_dims for degree in degrees]


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Errors of some queries by the definition, in float64, and the library's own outputs beside them."""
    head_dim, degree, tokens = case["head_dim"], case["degree"], case["tokens"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, WIDTH // head_dim, tokens, head_dim, generator=generator)
    query, key, value = drawn.half().double()
    even = torch.linspace(tokens / EVEN - 1, tokens - 1, EVEN).long().unique()
    spread = torch.logspace(0, torch.tensor(float(tokens)).log10().item(), SPREAD).long().sub(1).clamp(max=tokens - 1)
    rows = torch.cat([even, spread]).unique()
    found = attend_rows(query, key, value, rows, degree)
    at_even = torch.isin(rows, even)
    errors = {name: _summarise(y, found.exact_of(name), at_even) for name, y in found.outputs.items()}
    own = (found.outputs["taylor"], found.softmax)
    return {
        "rows": len(rows),
        "output": float(found.softmax[:, at_even].abs().median()),
        "predicted": expected_error(1.0, degree),
        "errors": errors,
        "histogram": _histogram(own[0] - own[1], at_even),
        "positions": _by_position(rows, *own, found.outputs["fitted"]),
        "library": _through_library(query, key, value, rows, at_even, found, degree),
    }


def _relative(y: Tensor, exact: Tensor) -> Tensor:
    """Of each token and head: [H, R, d] twice -> [H, R]."""
    return (y - exact).norm(dim=-1) / exact.norm(dim=-1)


def _summarise(y: Tensor, exact: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Median absolute error of an element, and quartiles of the relative error of a token."""
    y, exact = y[:, chosen], exact[:, chosen]
    return {"absolute": float((y - exact).abs().nanmedian()), "relative": _quantiles(_relative(y, exact))}


def _quantiles(x: Tensor, at: tuple[float, ...] = (0.25, 0.5, 0.75)) -> list[float | None]:
    found = x.flatten().nanquantile(torch.tensor(at, dtype=x.dtype)).tolist()
    return [None if value != value else value for value in found]


def _histogram(difference: Tensor, chosen: Tensor) -> list[int]:
    low, high, bins = HISTOGRAM
    logarithms = difference[:, chosen].abs().clamp(min=1e-300).log10().clamp(low, high)
    counts: list[int] = torch.histc(logarithms, bins, low, high).long().tolist()
    return counts


def _by_position(rows: Tensor, y: Tensor, exact: Tensor, fitted: Tensor) -> list[dict[str, Any]]:
    """Per bin of positions: tokens of context, quantiles of absolute errors and of relative ones, the fit's median."""
    context = (rows + 1).double()
    edges = torch.logspace(0, context[-1].log10().item() + 1e-9, BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(context, edges[1:-1], right=True)
    found = []
    for each in bins.unique():
        inside = bins == each
        own, true = y[:, inside], exact[:, inside]
        found.append(
            {
                "context": float(context[inside].log().mean().exp()),
                "absolute": _quantiles((own - true).abs(), (0.05, 0.5, 0.95)),
                "relative": _quantiles(_relative(own, true)),
                "fitted": _quantiles(_relative(fitted[:, inside], true), (0.5,))[0],
            }
        )
    return found


@torch.no_grad()
def _through_library(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, at_even: Tensor, found: Rows, degree: int
) -> dict[str, Any]:
    """`attention` in float32 on as many heads and tokens as the work allows, beside the definition in float64."""
    all_heads, all_tokens, head_dim = query.shape
    heads, tokens = _share(all_heads, all_tokens, head_dim, degree)
    nbytes = needed_bytes(1, head_dim, head_dim + 1, degree, (0, 0, 0), torch.float32)
    about = {"state_bytes": nbytes, "elements": state_size(head_dim, degree), "heads": heads, "tokens": tokens}
    if not heads:
        return about
    inputs = (x[None, :heads, :tokens].float() for x in (query, key, value))
    with watch_normalisers() as seen:
        y = attention(*inputs, degree=degree, chunk_size=CHUNK)[0]
    inside = rows < tokens
    own, exact = y[:, rows[inside]].double(), found.softmax[:heads, inside]
    by_definition = found.outputs["taylor"][:heads, inside]
    return about | {
        "unsafe": seen.unsafe,
        "queries": seen.queries,
        "relative": _quantiles(_relative(own, exact)[:, at_even[inside]]),
        "rounding": _quantiles(_relative(own, by_definition), (0.5, 1.0)),
    }


def _share(heads: int, tokens: int, head_dim: int, degree: int) -> tuple[int, int]:
    """Heads and tokens that the work allows; none if that is too little to say anything."""
    affordable = int(WORK // flops_per_token(head_dim, degree))
    if affordable >= tokens:
        return min(heads, affordable // tokens), tokens
    return (1, affordable) if affordable >= FEWEST else (0, 0)


EXPERIMENT = Experiment(
    "reconstruction",
    "Softmax on random tokens, reconstructed",
    "How near does Taylor attention come to softmax, element by element and relative to the outputs?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

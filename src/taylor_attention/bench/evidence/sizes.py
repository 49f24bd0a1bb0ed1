"""How large the state is beside a key/value cache, unpacked tensors, and in whole models (paper: figures 1, 3, A3)."""

from __future__ import annotations

from math import comb
from typing import Any

from ...core.cost import break_even_context, cache_flops_per_token, cache_size, flops_per_token, state_size
from .drawing import panels
from .experiment import Case, Experiment, Findings, Picture, Table, number, select

HEAD_DIMS = (8, 16, 32, 64)
DEGREES = (2, 3, 4)
CONTEXTS = tuple(10**n for n in range(3, 9))
WIDTHS = (1024, 2048, 4096, 8192)
PAPER_DEGREE = 3
"""The paper's P = 4."""


def plan(quick: bool) -> list[Case]:
    """Every head size and degree; each is arithmetic alone, so a quick look has them all too."""
    return [{"head_dim": head_dim, "degree": degree} for head_dim in HEAD_DIMS for degree in DEGREES]


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Elements, FLOPs and break-even contexts of one head; what packing saves; models of some widths."""
    head_dim, degree = case["head_dim"], case["degree"]
    packed = comb(head_dim + degree, degree)
    full = sum(head_dim**p for p in range(degree + 1))
    return {
        "state_elements": state_size(head_dim, degree),
        "monomials": packed,
        "unpacked": full,
        "flops": flops_per_token(head_dim, degree),
        "cache_elements": {str(n): cache_size(n, head_dim) for n in CONTEXTS},
        "cache_flops": {str(n): cache_flops_per_token(n, head_dim) for n in CONTEXTS},
        "even_memory": break_even_context(head_dim, degree),
        "even_flops": break_even_context(head_dim, degree, by="flops"),
        "layer_elements": {str(width): state_size(head_dim, degree, kv_heads=width // head_dim) for width in WIDTHS},
        "layer_flops": {str(width): flops_per_token(head_dim, degree, heads=width // head_dim) for width in WIDTHS},
    }


def tables(findings: Findings) -> list[Table]:
    """One row per head size and degree."""
    heads = Table(
        "One head: state, work and where they equal a key/value cache",
        (
            "d, degree",
            "monomials",
            "unpacked",
            "saved",
            "state elements",
            "FLOPs per token",
            "even (memory)",
            "even (FLOPs)",
        ),
        tuple(
            (
                f"{each.case['head_dim']}, {each.case['degree']}",
                f"{each.values['monomials']:,}",
                f"{each.values['unpacked']:,}",
                f"{1 - each.values['monomials'] / each.values['unpacked']:.0%}",
                f"{each.values['state_elements']:,}",
                f"{each.values['flops']:,}",
                f"{each.values['even_memory']:,}",
                f"{each.values['even_flops']:,}",
            )
            for each in findings
        ),
        "even: tokens of context at which a cache holds as many elements, or a token costs as many FLOPs, as here. "
        "unpacked: monomials if x_i x_j and x_j x_i were both kept.",
    )
    layers = Table(
        "One layer of heads x head size = width: elements of the state",
        ("d, degree", *(f"width {width:,}" for width in WIDTHS)),
        tuple(
            (
                f"{each.case['head_dim']}, {each.case['degree']}",
                *(number(each.values["layer_elements"][str(width)]) for width in WIDTHS),
            )
            for each in findings
        ),
    )
    return [heads, layers]


def pictures(findings: Findings) -> list[Picture]:
    """State and work of one head against a growing cache."""
    own = select(findings, degree=PAPER_DEGREE)
    figure, (memory, work) = panels(2)
    for color, each in enumerate(own):
        label = f"d = {each.case['head_dim']}"
        for axes, constant, growing in ((memory, "state_elements", "cache_elements"), (work, "flops", "cache_flops")):
            n, cached = [int(x) for x in each.values[growing]], list(each.values[growing].values())
            axes.plot(n, cached, color=f"C{color}", linestyle=":")
            axes.axhline(each.values[constant], color=f"C{color}", label=label)
    for axes, what in ((memory, "elements"), (work, "FLOPs per token")):
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=what)
        axes.legend(fontsize="small")
    caption = f"One head, degree {PAPER_DEGREE}: the state (solid) does not grow, a key/value cache (dotted) does."
    return [Picture("sizes", caption, figure)]


def conclusions(findings: Findings) -> list[str]:
    """Where the state is the smaller one."""
    even = {each.case["head_dim"]: each.values["even_memory"] for each in select(findings, degree=PAPER_DEGREE)}
    told = ", ".join(f"{tokens:,} tokens at d = {head_dim}" for head_dim, tokens in even.items())
    return [f"At degree {PAPER_DEGREE} the state is as large as the cache of {told}."]


EXPERIMENT = Experiment(
    "sizes",
    "State and work against a key/value cache",
    "From which context on is the state smaller than a key/value cache, and a token cheaper?",
    plan,
    measure,
    tables,
    pictures,
    conclusions,
)

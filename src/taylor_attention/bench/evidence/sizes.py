"""How large the state is beside a key/value cache, unpacked tensors, and in whole layers (paper: figures 1, 3, A3)."""

from __future__ import annotations

from math import comb
from typing import Any

from ...core.cost import break_even_context, cache_flops_per_token, cache_size, flops_per_token, state_size
from .drawing import add_legend, panels
from .experiment import Case, Experiment, Findings, Picture, Table, number, select

HEAD_DIMS = tuple(range(8, 65, 8))
SHOWN = (8, 16, 32, 64)
"""Head sizes with a line of their own in tables and pictures."""
DEGREES = tuple(range(8))
TOLD = (2, 3, 4)
"""Degrees of the tables."""
PAPER_DEGREE = 3
"""The paper's P = 4."""
CONTEXTS = tuple(10**n for n in range(3, 9))
WIDTHS = tuple(1024 * n for n in range(1, 9))
"""Of layers, as the paper has them."""
TOLD_WIDTHS = (1024, 2048, 4096, 8192)


def plan(quick: bool) -> list[Case]:
    """Every head size and degree."""
    head_dims, degrees = (SHOWN, TOLD) if quick else (HEAD_DIMS, DEGREES)
    return [{"head_dim": head_dim, "degree": degree} for head_dim in head_dims for degree in degrees]


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Elements, FLOPs and break-even contexts of one head; what packing saves; layers of some widths.

    `even_flops_paper` counts softmax as the authors' script does, 2 d FLOPs for each score's exponential: 6 d in all
    per token of context. Ours are 3, 4 d + 3 in all.
    """
    head_dim, degree = case["head_dim"], case["degree"]
    own = {"elements": state_size(head_dim, degree), "flops": flops_per_token(head_dim, degree)}
    return own | {
        "monomials": comb(head_dim + degree, degree),
        "unpacked": sum(head_dim**p for p in range(degree + 1)),
        "term": comb(head_dim + degree - 1, degree),
        "term_unpacked": head_dim**degree,
        "even_memory": break_even_context(head_dim, degree),
        "even_flops": break_even_context(head_dim, degree, by="flops"),
        "even_flops_paper": -(-own["flops"] // (6 * head_dim)),
        "layer_elements": {
            str(width): state_size(head_dim, degree, kv_heads=heads) for width, heads in _layers(head_dim)
        },
        "layer_flops": {
            str(width): flops_per_token(head_dim, degree, heads=heads) for width, heads in _layers(head_dim)
        },
    }


def _layers(head_dim: int) -> list[tuple[int, int]]:
    """Widths, and how many whole heads there are in them."""
    return [(width, width // head_dim) for width in WIDTHS]


def tables(findings: Findings) -> list[Table]:
    """One row per head size and degree."""
    told = [each for each in findings if each.case["head_dim"] in SHOWN and each.case["degree"] in TOLD]
    columns = ("monomials", "unpacked", "elements", "flops", "even_memory", "even_flops", "even_flops_paper")
    heads = Table(
        "One head: state, work and where they equal a key/value cache",
        (
            "d, degree",
            "monomials",
            "unpacked",
            "state elements",
            "FLOPs per token",
            "even (memory)",
            "even (FLOPs)",
            "even (FLOPs, paper)",
        ),
        tuple((_name(each.case), *(f"{each.values[name]:,}" for name in columns)) for each in told),
        "even: tokens of context at which a cache holds as many elements, or a token costs as many FLOPs, as here "
        "(softmax: 4 d + 3 per token of context; as the authors' script counts: 6 d). "
        "unpacked: monomials if x_i x_j and x_j x_i were both kept.",
    )
    layers = Table(
        "One layer of heads x head size = width: elements of the state",
        ("d, degree", *(f"width {width:,}" for width in TOLD_WIDTHS)),
        tuple(
            (_name(each.case), *(number(each.values["layer_elements"][str(width)]) for width in TOLD_WIDTHS))
            for each in told
        ),
    )
    return [heads, layers]


def _name(case: Case) -> str:
    return f"{case['head_dim']}, {case['degree']}"


def pictures(findings: Findings) -> list[Picture]:
    """State and work of one head against a growing cache; what packing leaves; layers."""
    layers = select(findings, degree=PAPER_DEGREE)
    return [_beside_cache(findings), _packing(findings), *([_layer_map(layers)] if layers else [])]


def _beside_cache(findings: Findings) -> Picture:
    figure, (memory, work) = panels(2)
    for color, head_dim in enumerate(SHOWN):
        for each in select(findings, degree=PAPER_DEGREE, head_dim=head_dim):
            cached = [cache_size(n, head_dim) for n in CONTEXTS]
            flops = [cache_flops_per_token(n, head_dim) for n in CONTEXTS]
            for axes, constant, growing in ((memory, "elements", cached), (work, "flops", flops)):
                axes.plot(CONTEXTS, growing, color=f"C{color}", linestyle=":")
                axes.axhline(each.values[constant], color=f"C{color}", label=f"d = {head_dim}")
    for axes, what in ((memory, "elements"), (work, "FLOPs per token")):
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=what)
        add_legend(axes)
    caption = f"One head, degree {PAPER_DEGREE}: the state (solid) does not grow, a key/value cache (dotted) does."
    return Picture("sizes", caption, figure)


def _packing(findings: Findings) -> Picture:
    figure, (axes,) = panels(1, width=5.2)
    for head_dim in SHOWN:
        own = select(findings, head_dim=head_dim)
        ratios = [each.values["term"] / each.values["term_unpacked"] for each in own]
        axes.plot([each.case["degree"] for each in own], ratios, marker="o", label=f"d = {head_dim}")
    axes.set(yscale="log", xlabel="degree of the term", ylabel="distinct monomials / all products")
    add_legend(axes)
    caption = "What tight packing leaves of one term of the series: distinct monomials of all d^p products."
    return Picture("sizes-packing", caption, figure)


def _layer_map(findings: Findings) -> Picture:
    figure, both = panels(2, width=5.6, height=4.2)
    for axes, what, title in zip(
        both, ("layer_elements", "layer_flops"), ("elements of the state", "FLOPs per token"), strict=True
    ):
        grid = [[each.values[what][str(width)] for each in findings] for width in WIDTHS]
        image = axes.imshow(grid, origin="lower", norm="log", aspect="auto", cmap="viridis")
        axes.grid(False)
        axes.set(xlabel="head size", ylabel="width", title=title)
        axes.set_xticks(range(len(findings)), [str(each.case["head_dim"]) for each in findings])
        axes.set_yticks(range(len(WIDTHS)), [f"{width:,}" for width in WIDTHS])
        figure.colorbar(image, ax=axes)
    caption = f"One layer, heads x head size = width, degree {PAPER_DEGREE}: many small heads cost less than few large."
    return Picture("sizes-layers", caption, figure)


def conclusions(findings: Findings) -> list[str]:
    """Where the state is the smaller one, by both ways of counting; what packing and small heads save."""
    own = {
        each.case["head_dim"]: each.values
        for each in select(findings, degree=PAPER_DEGREE)
        if each.case["head_dim"] in SHOWN
    }
    if not own:
        return []
    even = _told(own, "even_memory")
    kept = ", ".join(f"{values['term'] / values['term_unpacked']:.0%} at d = {d}" for d, values in own.items())
    smallest, largest, width = min(own), max(own), TOLD_WIDTHS[2]
    heads = [own[d]["layer_elements"][str(width)] for d in (smallest, largest)]
    return [
        f"At degree {PAPER_DEGREE} the state is as large as the cache of {even}.",
        f"A token costs as many FLOPs as softmax over {_told(own, 'even_flops')}; counted as the authors' script does, "
        f"{_told(own, 'even_flops_paper')}.",
        f"Packing leaves of the term of degree {PAPER_DEGREE}: {kept}.",
        f"A layer of width {width:,} holds {heads[1] / heads[0]:,.0f} times less state with heads of {smallest} than "
        f"with heads of {largest}.",
    ]


def _told(own: dict[int, dict[str, Any]], name: str) -> str:
    return ", ".join(f"{values[name]:,} tokens at d = {head_dim}" for head_dim, values in own.items())


EXPERIMENT = Experiment(
    "sizes",
    "State and work against a key/value cache",
    "From which context on is the state smaller than a key/value cache, and a token cheaper?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

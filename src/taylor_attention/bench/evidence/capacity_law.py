"""The law of capacity: fits, tables, pictures and sentences from how many pairs a head was found to hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .drawing import panels
from .experiment import Finding, Findings, Picture, Table, number, select

EXACT = None
"""Degree of softmax itself."""

LEVELS = (0.95, 0.5)
"""Accuracies that capacities are told at."""

Law = tuple[float, float, float]
"""Factor a, exponent b, and R^2 in logarithms, of y = a x^b."""

_NOTE = (
    "Random directions as keys, values of 64 entries, queries are stored keys; pairs at which so many outputs are "
    "nearest to their own value. scale: score of a key with itself. R: own weight over others', in mean squares. "
    "-: softmax, or more pairs than were tried."
)


def fit(points: Iterable[tuple[float, float]]) -> Law | None:
    """The power law through points (x, y) by least squares of logarithms; None for fewer than three different x."""
    points = list(points)
    if len({x for x, _ in points}) < 3:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).log().unbind(-1)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    start = y.mean() - slope * x.mean()
    residual = (y - start - slope * x).square().sum() / (y - y.mean()).square().sum()
    return float(start.exp()), float(slope), float(1 - residual)


def capacity_of(finding: Finding, level: float) -> float | None:
    """Pairs at which accuracy falls below a level; None: more than were tried."""
    return finding.values["capacity"][f"{level:g}"]


def best(findings: Findings, level: float) -> list[Finding]:
    """Of each head size and degree, the finding at the scale of scores with which it holds most pairs."""
    found: dict[tuple[int, int | None], Finding] = {}
    for each in findings:
        place = (each.case["head_dim"], each.case["degree"])
        if place not in found or _rank(each, level) > _rank(found[place], level):
            found[place] = each
    return list(found.values())


def _rank(finding: Finding, level: float) -> tuple[float, float]:
    """By pairs; of those that hold more than were tried, by contrast."""
    capacity = capacity_of(finding, level)
    return (float("inf") if capacity is None else capacity, finding.values["contrast"])


def find_points(findings: Findings, level: float, against: str) -> list[tuple[float, float]]:
    """(x, pairs) of truncated series: M at the best scales of scores ("monomials"), or R at all ("contrast")."""
    own = [each for each in findings if each.case["degree"] is not EXACT]
    own = best(own, level) if against == "monomials" else own
    points = [(each.values[against], capacity_of(each, level)) for each in own]
    return [(x, pairs) for x, pairs in points if pairs is not None]


def tables(findings: Findings) -> list[Table]:
    """Each head size and degree at its best scale of scores, and the fits."""
    high, low = LEVELS
    ratio = f"at {low:.0%} / M"
    columns = ("d, degree", "monomials M", "best scale", f"pairs at {high:.0%}", f"pairs at {low:.0%}", ratio, "R")
    rows = tuple(_row(each) for each in best(findings, low))
    fits = [
        (f"pairs at {level:.0%} against {name}", *(number(x) for x in law))
        for level in LEVELS
        for name, against in (("M", "monomials"), ("R", "contrast"))
        if (law := fit(find_points(findings, level, against))) is not None
    ]
    return [
        Table("Pairs that one head holds, at the best scale of its scores", columns, rows, _NOTE),
        Table("Power laws: pairs = a x^b", ("law", "a", "b", "R² of logarithms"), tuple(fits)),
    ]


def _row(finding: Finding) -> tuple[str, ...]:
    head_dim, degree, size = finding.case["head_dim"], finding.case["degree"], finding.values["monomials"]
    high, low = (capacity_of(finding, level) for level in LEVELS)
    return (
        f"{head_dim}, {_name(degree)}",
        "-" if size is None else f"{size:,}",
        number(finding.case["peak"]),
        *("-" if pairs is None else number(pairs) for pairs in (high, low)),
        "-" if size is None or low is None else number(low / size),
        number(finding.values["contrast"]),
    )


def _name(degree: int | None) -> str:
    return "softmax" if degree is EXACT else str(degree)


def pictures(findings: Findings) -> list[Picture]:
    """Capacity against M and R with their laws, and against the scale of scores."""
    figure, (size, contrast, scale) = panels(3)
    for axes, against in ((size, "monomials"), (contrast, "contrast")):
        _draw_law(axes, findings, against)
    size.set_xlabel("monomials M (at the best scale of scores)")
    contrast.set_xlabel("contrast R (at every scale of scores)")
    _draw_scales(scale, findings)
    caption = (
        f"Pairs that one head holds at {LEVELS[-1]:.0%} accuracy, without training, against the monomials of its "
        "state, against the contrast of its kernel, and against the scale of its scores. Dotted: power laws."
    )
    return [Picture("capacity", caption, figure)]


def _draw_law(axes: Any, findings: Findings, against: str) -> None:
    level = LEVELS[-1]
    found = [each for each in findings if each.case["degree"] is not EXACT]
    for color, degree in enumerate(sorted({each.case["degree"] for each in found})):
        points = find_points(select(findings, degree=degree), level, against)
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, "os^Dv"[color % 5], color=f"C{color}", markersize=4, label=f"degree {degree}")
    points = find_points(findings, level, against)
    law = fit(points)
    if law is not None:
        ends = [choose(x for x, _ in points) for choose in (min, max)]
        label = f"{law[0]:.2g} x^{law[1]:.2f}, R² {law[2]:.3f}"
        axes.plot(ends, [law[0] * x ** law[1] for x in ends], "k:", label=label)
    axes.set(xscale="log", yscale="log", ylabel=f"pairs at {level:.0%}")
    _add_legend(axes)


def _add_legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _draw_scales(axes: Any, findings: Findings) -> None:
    """One head size, the second smallest: a line for each degree; softmax up to where it holds all that was tried."""
    sizes = sorted({each.case["head_dim"] for each in findings})
    head_dim = sizes[min(1, len(sizes) - 1)] if sizes else None
    own = select(findings, head_dim=head_dim)
    degrees = sorted({each.case["degree"] for each in own} - {EXACT})
    for color, degree in enumerate([*degrees, EXACT]):
        chosen = sorted(select(own, degree=degree), key=lambda each: each.case["peak"])
        points = [(each.case["peak"], capacity_of(each, LEVELS[-1])) for each in chosen]
        known = [(x, pairs) for x, pairs in points if pairs is not None]
        x, y = zip(*known, strict=True) if known else ((), ())
        look = {"color": "k"} if degree is EXACT else {"color": f"C{color}"}
        axes.plot(x, y, "o-", markersize=4, label="softmax" if degree is EXACT else f"degree {degree}", **look)
    axes.set(xscale="log", yscale="log", xlabel=f"score of a key with itself (d = {head_dim})")
    axes.set_ylabel(f"pairs at {LEVELS[-1]:.0%}")
    peaks = sorted({each.case["peak"] for each in own})
    axes.set_xticks(peaks, [number(peak, 2) for peak in peaks])
    axes.set_xticks([], minor=True)
    _add_legend(axes)


def conclusions(findings: Findings) -> list[str]:
    """The laws, and softmax beside them."""
    said = []
    low = LEVELS[-1]
    law = fit(find_points(findings, low, "monomials"))
    if law is not None:
        said.append(
            f"Without training, one head tells {low:.0%} of n stored keys apart up to n = {law[0]:.2g} M^{law[1]:.2f} "
            f"(M monomials; R² {law[2]:.3f} over {len(find_points(findings, low, 'monomials'))} sizes and degrees)."
        )
    law = fit(find_points(findings, low, "contrast"))
    if law is not None:
        said.append(
            "The contrast R of the kernel says it at every scale of scores: "
            f"n = {law[0]:.2g} R^{law[1]:.2f} (R² {law[2]:.3f})."
        )
    return said + _growth(findings) + _softmax(findings)


def _growth(findings: Findings) -> list[str]:
    """With the head size, degree by degree, in all and per monomial."""
    said = []
    for degree in sorted({each.case["degree"] for each in findings if each.case["degree"] is not EXACT}):
        known = _known(best(select(findings, degree=degree), LEVELS[-1]))
        law = fit((each.case["head_dim"], pairs) for each, pairs in known)
        if law is not None:
            shares = [pairs / each.values["monomials"] for each, pairs in known]
            share = f"{number(min(shares), 2)} to {number(max(shares), 2)} pairs per monomial"
            said.append(f"degree {degree}: d^{law[1]:.2f}, {share}")
    return ["With the head size that grows as follows. " + "; ".join(said) + "."] if said else []


def _known(findings: Findings) -> list[tuple[Finding, float]]:
    found = [(each, capacity_of(each, LEVELS[-1])) for each in findings]
    return [(each, pairs) for each, pairs in found if pairs is not None]


def _softmax(findings: Findings) -> list[str]:
    """What exp itself holds at the scale that suits it, with a cache of all pairs."""
    exact = best(select(findings, degree=EXACT), LEVELS[-1])
    said = [f"{number(pairs)} pairs at d = {each.case['head_dim']}" for each, pairs in _known(exact)]
    beyond = [str(each.case["head_dim"]) for each in exact if capacity_of(each, LEVELS[-1]) is None]
    said += [f"more than were tried at d = {', '.join(beyond)}"] if beyond else []
    return [f"Softmax, with a cache of all pairs, tells apart {'; '.join(said)}."] if said else []

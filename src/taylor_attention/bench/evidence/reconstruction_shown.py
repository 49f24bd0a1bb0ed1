"""Tables, pictures and sentences of the experiment `reconstruction`."""

from __future__ import annotations

import statistics
from math import log10
from typing import Any

from .drawing import panels
from .experiment import Finding, Findings, Picture, Table, number, select

HISTOGRAM = (-6.5, 0.5, 70)
"""Lowest and highest log10 of an absolute error, and the bins between."""
PAPER = {2: -2.75, 3: -3.0, 4: -3.2, 5: -3.55}
"""By degree: log10 of the paper's median absolute errors, read off its figure."""
LATE = 1000
"""Tokens of context from which on it is told how far the relative error depends on it."""
PAPER_DEGREE = 3
"""The paper's P = 4."""
READINGS = {
    "taylor": "Taylor",
    "gaussian": "fit to N(0, 1)",
    "chebyshev": "fit to [-3, 3]",
    "fitted": "fitted per query",
    "cosh": "cosh (against cosh)",
}
"""The readings, by what they are called here."""


def tables(findings: Findings) -> list[Table]:
    """Absolute errors beside the paper's, relative ones by reading, and what ran through the library."""
    absolute = Table(
        "Taylor attention beside softmax in float64, random tokens",
        ("d, degree", "log10 |error|", "paper", "log10 |output|", "relative error", "quartiles", "predicted"),
        tuple(
            (
                _name(each),
                f"{log10(each.values['errors']['taylor']['absolute']):.2f}",
                f"{PAPER[each.case['degree']]:.2f}" if each.case["degree"] in PAPER else "",
                f"{log10(each.values['output']):.2f}",
                f"{_relative(each):.1%}",
                " - ".join(f"{each.values['errors']['taylor']['relative'][i]:.1%}" for i in (0, 2)),
                f"{each.values['predicted']:.1%}",
            )
            for each in findings
        ),
        "Medians over queries that are evenly spaced; absolute: of elements; relative: of a token, "
        "||y - softmax|| / ||softmax||. paper: read off its figure. predicted: for scores of spread 1 at every query.",
    )
    readings = Table(
        "Relative error by the coefficients with which the same moments are read",
        ("d, degree", *READINGS.values()),
        tuple((_name(each), *(f"{_relative(each, name):.1%}" for name in READINGS)) for each in findings),
        "Medians. An odd degree of cosh is the even one below. Fits to an interval weigh all of it alike, which random "
        "scores do not, and are not positive everywhere.",
    )
    return [absolute, readings, _library_table(findings)]


def _library_table(findings: Findings) -> Table:
    return Table(
        "The same through the library, in float32 and through the state",
        ("d, degree", "state bytes per head", "heads x tokens", "relative error", "rounding", "at most", "NaN rows"),
        tuple((_name(each), number(each.values["library"]["state_bytes"]), *_run(each)) for each in findings),
        "rounding: ||y - definition in float64|| / ||definition||, median and largest. Where nothing stands the work "
        "was more than a case has: the errors above are those of the definition.",
    )


def _run(finding: Finding) -> tuple[str, ...]:
    own = finding.values["library"]
    if "rounding" not in own:
        return ("-",) * 5
    rounding = (f"{each:.1e}" for each in own["rounding"])
    return f"{own['heads']} x {own['tokens']:,}", f"{own['relative'][1]:.1%}", *rounding, f"{own['unsafe']:,}"


def _name(finding: Finding) -> str:
    return f"{finding.case['head_dim']}, {finding.case['degree']}"


def _relative(finding: Finding, reading: str = "taylor") -> float:
    """The median."""
    median: float = finding.values["errors"][reading]["relative"][1]
    return median


def _sizes(findings: Findings) -> tuple[list[int], list[int]]:
    """Head sizes and degrees that there are."""
    return tuple(sorted({each.case[name] for each in findings}) for name in ("head_dim", "degree"))  # type: ignore[return-value]


def pictures(findings: Findings) -> list[Picture]:
    """Histograms as the paper has them, errors by position, and readings."""
    return [_histograms(findings), _positions(findings), _readings(findings)] if findings else []


def _histograms(findings: Findings) -> Picture:
    head_dims, degrees = _sizes(findings)
    figure, axes = panels(len(head_dims), len(degrees), width=2.9, height=2.1)
    low, high, bins = HISTOGRAM
    width = (high - low) / bins
    for place, panel in enumerate(axes):
        degree, head_dim = degrees[place // len(head_dims)], head_dims[place % len(head_dims)]
        panel.set(xlim=(-6.25, 0.25), ylim=(0, 1.5), title=f"d = {head_dim}, degree {degree}")
        for each in select(findings, head_dim=head_dim, degree=degree):
            counts = each.values["histogram"]
            density = [count / sum(counts) / width for count in counts]
            panel.bar([low + (i + 0.5) * width for i in range(bins)], density, width, alpha=0.4)
            median = log10(each.values["errors"]["taylor"]["absolute"])
            panel.axvline(median, label=f"median {median:.2f}")
        if degree in PAPER:
            panel.axvline(PAPER[degree], color="k", linestyle=":", label=f"paper {PAPER[degree]:.2f}")
        panel.legend(fontsize="x-small", loc="upper left")
        if place >= len(axes) - len(head_dims):
            panel.set_xlabel("log10 |y - softmax|")
        if place % len(head_dims) == 0:
            panel.set_ylabel("density")
    tokens = findings[0].case["tokens"]
    caption = f"Absolute errors of elements over {tokens:,} random tokens, as the paper draws them, with its medians."
    return Picture("reconstruction", caption, figure)


def _positions(findings: Findings) -> Picture:
    head_dims, degrees = _sizes(findings)
    figure, axes = panels(len(head_dims), 2, width=3.2, height=3.0)
    for column, head_dim in enumerate(head_dims):
        upper, lower = axes[column], axes[len(head_dims) + column]
        for color, degree in enumerate(degrees):
            for each in select(findings, head_dim=head_dim, degree=degree):
                bins = [one for one in each.values["positions"] if one["context"] >= 3]
                for panel, what in ((upper, "absolute"), (lower, "relative")):
                    _line(panel, bins, what, f"C{color}", f"degree {degree}")
                fitted = [one["fitted"] for one in bins]
                lower.plot([one["context"] for one in bins], fitted, color=f"C{color}", linestyle="--")
        upper.set(xscale="log", yscale="log", title=f"d = {head_dim}", ylim=(1e-6, 1))
        lower.set(xscale="log", yscale="log", xlabel="context (tokens)", ylim=(5e-3, 2))
    axes[0].set_ylabel("|y - softmax| (5% to 95%)")
    axes[len(head_dims)].set_ylabel("relative error (quartiles)")
    axes[0].legend(fontsize="x-small", loc="lower left")
    caption = (
        "Above: absolute errors by context, as the paper draws them. Below: relative to the outputs, which shrink with "
        "the context as well (solid: Taylor; dashed: fitted per query)."
    )
    return Picture("reconstruction-positions", caption, figure)


def _line(panel: Any, bins: list[dict[str, Any]], what: str, color: str, label: str) -> None:
    """A median with its band."""
    context = [one["context"] for one in bins]
    low, middle, high = ([one[what][i] for one in bins] for i in range(3))
    panel.plot(context, middle, color=color, label=label)
    panel.fill_between(context, low, high, color=color, alpha=0.12, linewidth=0)


def _readings(findings: Findings) -> Picture:
    head_dims, _ = _sizes(findings)
    figure, axes = panels(len(head_dims), width=3.2, height=3.4)
    for panel, head_dim in zip(axes, head_dims, strict=True):
        own = select(findings, head_dim=head_dim)
        degrees = [each.case["degree"] for each in own]
        for marker, (name, label) in zip("osD^v", READINGS.items(), strict=True):
            panel.plot(degrees, [_relative(each, name) for each in own], marker=marker, label=label)
        predicted = [each.values["predicted"] for each in own]
        panel.plot(degrees, predicted, "k:", label="predicted for Taylor")
        panel.set(yscale="log", ylim=(0.01, 20), xlabel="degree", xticks=degrees, title=f"d = {head_dim}")
    axes[0].set_ylabel("relative error (median)")
    axes[0].legend(fontsize="x-small", loc="upper right")
    caption = "The same moments read with other coefficients. cosh is compared with cosh, the others with softmax."
    return Picture("reconstruction-readings", caption, figure)


def conclusions(findings: Findings) -> list[str]:
    """The paper's medians beside ours, what they are relative to the outputs, and what other readings give."""
    if not findings:
        return []
    return [_absolute(findings), *_at_paper_degree(findings), _fits(findings), *_of_library(findings)]


def _absolute(findings: Findings) -> str:
    told = []
    for degree in _sizes(findings)[1]:
        ours = statistics.mean(
            log10(each.values["errors"]["taylor"]["absolute"]) for each in select(findings, degree=degree)
        )
        paper = f" (paper: about {PAPER[degree]:.2f})" if degree in PAPER else ""
        told.append(f"{ours:.2f}{paper} at P = {degree + 1}")
    tokens = findings[0].case["tokens"]
    return f"Over {tokens:,} random tokens log10 of the median absolute error is {', '.join(told)}."


def _at_paper_degree(findings: Findings) -> list[str]:
    own = select(findings, degree=PAPER_DEGREE)
    if not own:
        return []
    errors, outputs = [_relative(each) for each in own], [log10(each.values["output"]) for each in own]
    late = [one["relative"][1] for each in own for one in each.values["positions"] if one["context"] >= LATE]
    return [
        f"The outputs have a median of 10^{statistics.mean(outputs):.2f} there, so that relative to them the error at "
        f"P = {PAPER_DEGREE + 1} is {_span(errors)} for the head sizes here"
        + (f" ({_span(late)} at contexts from {LATE:,} tokens on)." if late else ".")
    ]


def _fits(findings: Findings) -> str:
    gains = [_relative(each) / _relative(each, "fitted") for each in findings]
    fixed = [_relative(each) / _relative(each, "gaussian") for each in findings]
    return (
        f"Read by each query's own fit the same moments err {min(gains):.2g} to {max(gains):.2g} times less than "
        f"Taylor's series, by one fit to N(0, 1) for all {min(fixed):.2g} to {max(fixed):.2g} times less."
    )


def _of_library(findings: Findings) -> list[str]:
    ran = [each.values["library"] for each in findings if "rounding" in each.values["library"]]
    told = []
    if ran:
        worst, unsafe = max(own["rounding"][1] for own in ran), sum(own["unsafe"] for own in ran)
        told.append(
            f"The library's float32 outputs are within {worst:.1e} of the polynomial in float64; "
            f"{unsafe:,} of {sum(own['queries'] for own in ran):,} rows were NaN, their normaliser not being safe."
        )
    for each in findings:
        own = each.values["library"]
        if "rounding" not in own:
            told.append(
                f"Head size {each.case['head_dim']} at degree {each.case['degree']} was not run through a state: "
                f"that has {own['state_bytes']:,} bytes per head, and its errors are those of the definition."
            )
    return told


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"

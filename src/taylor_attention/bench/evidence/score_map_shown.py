"""Tables and sentences of the experiment `map`; its pictures are in `score_map_drawn`."""

from __future__ import annotations

from math import exp, log

from .experiment import Finding, Findings, Table, select

SPREAD, OFFSET, LENGTH, NEEDLE, MODEL = "spread", "offset", "length", "needle", "model"
READINGS = {"taylor": "Taylor", "centred": "centred", "fitted": "fitted"}
"""The last but one is Taylor's series with the mean key taken off all keys."""
LEVELS = (0.01, 0.03, 0.1, 0.3)
"""Relative errors whose contours are drawn."""
IN_RANGE, BEHIND_WINDOW = 0.03, 0.3
"""Up to the first a degree is in range as it is; up to the second, as the far part behind a window; beyond, not."""
MODELS = {"taylor": "shipped Taylor model", "softmax": "shipped softmax model", "untrained": "untrained, same shape"}
ELSEWHERE = {"SmolLM2-135M, far": (2.1, 4.1), "all-MiniLM-L6-v2": (1.5, 6.0)}
"""Spreads of scores in published models, lowest and highest over layers; measured once, not by this experiment."""


def median_error(finding: Finding, reading: str, degree: int) -> float:
    """The median relative error; infinite where half of the rows are NaN."""
    median = finding.values[reading][str(degree)]["error"][1]
    return float("inf") if median is None else median


def reach(findings: Findings, reading: str, degree: int, level: float, *, expected: bool = False) -> float | None:
    """The spread at which the error passes a level, between two that were measured; None if it never does.

    The smallest spread that was measured, if the error is above the level even there.
    """
    before: tuple[float, float] | None = None
    for each in sorted(select(findings, what=SPREAD), key=lambda one: one.case["spread"]):
        own = each.values[reading][str(degree)]
        spread = each.case["spread"]
        error = own["expected"] if expected else median_error(each, reading, degree)
        if error > level:
            if before is None or error == float("inf"):
                return spread if before is None else before[0]
            share = (log(level) - log(before[1])) / (log(error) - log(before[1]))
            return exp(log(before[0]) + share * (log(spread) - log(before[0])))
        before = spread, max(error, 1e-12)
    return None


def degrees_of(findings: Findings) -> list[int]:
    """Degrees that the findings have in common."""
    return [int(degree) for degree in findings[0].values["taylor"]] if findings else []


def tables(findings: Findings) -> list[Table]:
    """How far each degree reaches; offsets, lengths and needles; spreads in models."""
    made = [_reaches(findings), _errors(findings, OFFSET), _errors(findings, LENGTH), _errors(findings, NEEDLE)]
    return [each for each in (*made, _models(findings)) if each.rows]


def _reaches(findings: Findings) -> Table:
    own = select(findings, what=SPREAD)
    rows = [
        (
            f"{READINGS[reading]} {degree}",
            *(
                cell
                for level in LEVELS
                for cell in (
                    _spread(reach(own, reading, degree, level)),
                    _spread(reach(own, reading, degree, level, expected=True)),
                )
            ),
        )
        for reading in ("taylor", "fitted")
        for degree in degrees_of(own)
    ]
    columns = ("reading, degree", *(cell for level in LEVELS for cell in (f"{level:.0%}", "expected")))
    note = (
        "Largest spread (standard deviation) of a query's scores with a median relative error up to 1%, 3%, 10%, 30%. "
        "expected: by expected_error. >: beyond what was measured."
    )
    return Table("How widely scores may spread", columns, tuple(rows), note)


def _spread(value: float | None) -> str:
    return ">" if value is None else f"{value:.2f}"


def _errors(findings: Findings, what: str) -> Table:
    """Errors by reading and degree 2 and 4, a row for each case."""
    own = select(findings, what=what)
    shown = [degree for degree in degrees_of(own) if degree in (2, 4)]
    rows = [
        (
            ", ".join(f"{name} {value:,}" for name, value in each.case.items() if name not in ("what", "tokens"))
            + (f", {each.case['tokens']:,} tokens" if what == LENGTH else ""),
            *(
                _percent(median_error(each, reading, degree)) if reading in each.values else "-"
                for degree in shown
                for reading in READINGS
            ),
        )
        for each in own
    ]
    titles = {
        OFFSET: "Where the scores of a query have a mean",
        LENGTH: "Where there are fewer or more tokens",
        NEEDLE: "Where some keys stand out of the others",
    }
    columns = ("case", *(f"{name} {degree}" for degree in shown for name in READINGS.values()))
    note = (
        "Medians of ||y - softmax|| / ||softmax|| by reading and degree. centred: Taylor, the mean key taken off all."
    )
    return Table(titles[what], columns, tuple(rows), note)


def _percent(value: float) -> str:
    return "NaN" if value == float("inf") else f"{value:.1%}"


def _models(findings: Findings) -> Table:
    rows = [
        (f"{each.case['name']}, layer {i + 1}", *(f"{layer[name]:.2f}" for name in layer))
        for each in select(findings, what=MODEL)
        for i, layer in enumerate(each.values["layers"])
    ]
    note = (
        "Standard deviation of a query's scores on text, median over queries: the lowest, middle and highest head of "
        "each layer; mean: of the scores, its size in the middle head. 'untrained' has the shipped models' shape."
    )
    return Table("Spreads in models", ("model", "lowest", "middle", "highest", "mean"), tuple(rows), note)


def model_spreads(findings: Findings) -> dict[str, tuple[float, float]]:
    """The lowest and the highest spread of a head of each model that was measured."""
    return {
        MODELS[each.case["name"]]: (
            min(layer["lowest"] for layer in each.values["layers"]),
            max(layer["highest"] for layer in each.values["layers"]),
        )
        for each in select(findings, what=MODEL)
    }


def conclusions(findings: Findings) -> list[str]:
    """How far degrees reach, how good the prediction is, what a mean and needles do, and where models lie."""
    own = select(findings, what=SPREAD)
    told = [_reach_of(own, degree) for degree in (2, 4) if degree in degrees_of(own)]
    told += [_prediction(own)] if own else []
    told += [_offset(findings)] if select(findings, what=OFFSET) else []
    told += [_length(findings)] if select(findings, what=LENGTH) else []
    told += [_needle(findings)] if select(findings, what=NEEDLE) else []
    for name, (low, high) in model_spreads(findings).items():
        told.append(f"Over heads, the spread of scores is {low:.2f} to {high:.2f}: {name}.")
    return told


def _reach_of(own: Findings, degree: int) -> str:
    each = "; ".join(
        f"{READINGS[reading]} errs " + ", ".join(_level(own, reading, degree, level) for level in LEVELS)
        for reading in ("taylor", "fitted")
    )
    return f"Degree {degree}, by the spread of a query's scores: {each}."


def _level(own: Findings, reading: str, degree: int, level: float) -> str:
    value = reach(own, reading, degree, level)
    return f"{level:.0%} at {'more than was measured' if value is None else f'{value:.2f}'}"


def _prediction(own: Findings) -> str:
    ratios = [
        median_error(each, reading, degree) / each.values[reading][str(degree)]["expected"]
        for each in own
        for reading in ("taylor", "fitted")
        for degree in degrees_of(own)
        if 1e-3 <= each.values[reading][str(degree)]["expected"] <= BEHIND_WINDOW
    ]
    if not ratios:
        return "No error was between 0.1% and 30%, where a prediction would matter."
    return (
        f"Where expected_error predicts between 0.1% and {BEHIND_WINDOW:.0%}, the measured median is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times that."
    )


def _offset(findings: Findings) -> str:
    own = select(findings, what=OFFSET)
    last = max(own, key=lambda each: each.case["offset"])
    told = ", ".join(
        f"{READINGS[reading]} {_percent(median_error(last, reading, 2))}"
        for reading in READINGS
        if reading in last.values
    )
    return f"With a mean of {last.case['offset']:g} and a spread of {last.case['spread']:g}, degree 2 errs: {told}."


def _length(findings: Findings) -> str:
    own = select(findings, what=LENGTH)
    told = []
    for spread in sorted({each.case["spread"] for each in own}):
        some = select(own, spread=spread)
        errors = [_percent(median_error(each, "taylor", 2)) for each in (some[0], some[-1])]
        told.append(f"{errors[0]} and {errors[1]} at a spread of {spread:g}")
    lengths = [each.case["tokens"] for each in own]
    return f"At {min(lengths):,} and at {max(lengths):,} tokens degree 2 errs {', '.join(told)}."


def _needle(findings: Findings) -> str:
    own = select(findings, what=NEEDLE)
    margins = sorted({each.case["margin"] for each in own})
    fewest, most = min(each.case["ties"] for each in own), max(each.case["ties"] for each in own)
    told = []
    for count in dict.fromkeys((fewest, most)):
        errors = ", ".join(
            f"{_percent(median_error(each, 'fitted', 2))} at {each.case['margin']:g}"
            for each in select(own, ties=count)
            if each.case["margin"] in (margins[0], margins[len(margins) // 2], margins[-1])
        )
        told.append(f"{count:,} key{'s' if count > 1 else ''}: {errors}")
    return f"Keys that stand out by a margin, read by the fit of degree 2: {'; '.join(told)}."

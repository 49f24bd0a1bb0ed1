"""Pictures of the experiment `map`."""

from __future__ import annotations

from typing import Any

from .drawing import add_legend, panels
from .experiment import Findings, Picture, select
from .score_map_shown import (
    BEHIND_WINDOW,
    ELSEWHERE,
    IN_RANGE,
    LENGTH,
    LEVELS,
    NEEDLE,
    OFFSET,
    READINGS,
    SPREAD,
    degrees_of,
    median_error,
    model_spreads,
    reach,
)

_COLORS = ("#1a9850", "#91cf60", "#fee08b", "#fc8d59", "#d73027")
"""Of errors up to each of `LEVELS`, and beyond."""
TICKS = (0.1, 0.2, 0.5, 1, 2, 4)
"""Of the axis of spreads."""
_STYLES = {"taylor": "-", "centred": "-.", "fitted": "--"}


def pictures(findings: Findings) -> list[Picture]:
    """The map; errors by spread beside what is expected; errors by mean, length and margin."""
    drawn = []
    if len(select(findings, what=SPREAD)) > 1:
        drawn = [_map(findings), _curves(findings)]
    if any(select(findings, what=what) for what in (OFFSET, LENGTH, NEEDLE)):
        drawn.append(_others(findings))
    return drawn


def _map(findings: Findings) -> Picture:
    own = sorted(select(findings, what=SPREAD), key=lambda each: each.case["spread"])
    spreads, degrees = [each.case["spread"] for each in own], degrees_of(own)
    bars = model_spreads(findings) | ELSEWHERE
    figure, axes = panels(2, width=6.4, height=5.4)
    for panel, reading in zip(axes, ("taylor", "fitted"), strict=True):
        for degree in degrees:
            _row(panel, own, reading, degree, spreads)
        for place, (name, (low, high)) in enumerate(bars.items()):
            height = degrees[-1] + 1 + 0.6 * place
            panel.plot([max(low, spreads[0]), min(high, TICKS[-1])], [height] * 2, "k", linewidth=4, alpha=0.6)
            panel.annotate(name, (spreads[0] * 1.05, height), fontsize="small", va="center")
        panel.axhline(degrees[-1] + 0.6, color="k", linewidth=0.8)
        top = degrees[-1] + 1 + 0.6 * len(bars)
        panel.set(xscale="log", xlim=(spreads[0], TICKS[-1]), ylim=(degrees[0] - 0.5, top), yticks=degrees)
        panel.set(xlabel="spread of a query's scores (standard deviation)", title=READINGS[reading] + " reading")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.grid(False)
    axes[0].set_ylabel("degree                              ")
    _explain(figure, axes[0])
    caption = (
        f"Median relative error by spread and degree: up to {IN_RANGE:.0%} a degree is in range, up to "
        f"{BEHIND_WINDOW:.0%} it needs a window before it, beyond that a layer is better left softmax. Dashes: where "
        "expected_error puts the borders. Above: spreads over the heads of models; of the published ones as measured "
        "once, elsewhere."
    )
    return Picture("map", caption, figure)


def _row(panel: Any, own: Findings, reading: str, degree: int, spreads: list[float]) -> None:
    """The colours of one degree, with the borders that are expected."""
    edges = [spreads[0], *((reach(own, reading, degree, level) or spreads[-1]) for level in LEVELS), spreads[-1]]
    for color, left, right in zip(_COLORS, edges[:-1], edges[1:], strict=True):
        panel.barh(degree, max(0.0, right - left), left=left, height=0.86, color=color)
    for level in LEVELS:
        border = reach(own, reading, degree, level, expected=True)
        if border is not None and border > spreads[0]:
            panel.plot([border] * 2, [degree - 0.43, degree + 0.43], "k--", linewidth=1.2)


def _explain(figure: Any, panel: Any) -> None:
    """What the colours mean."""
    names = [f"up to {level:.0%}" for level in LEVELS] + [f"beyond {LEVELS[-1]:.0%}"]
    labels = {
        names[0]: "in range",
        names[1]: "in range",
        names[2]: "needs a window",
        names[3]: "needs a window",
        names[4]: "leave it softmax",
    }
    handles = [panel.barh(0, 0, color=color) for color in _COLORS]
    texts = [f"{name}: {labels[name]}" for name in names]
    figure.legend(handles, texts, loc="outside lower center", ncols=len(names), fontsize="small")


def _curves(findings: Findings) -> Picture:
    own = sorted(select(findings, what=SPREAD), key=lambda each: each.case["spread"])
    spreads = [each.case["spread"] for each in own]
    figure, axes = panels(2, width=5.2, height=4.2)
    for panel, reading in zip(axes, ("taylor", "fitted"), strict=True):
        for color, degree in enumerate(degrees_of(own)):
            errors = [median_error(each, reading, degree) for each in own]
            expected = [each.values[reading][str(degree)]["expected"] for each in own]
            panel.plot(spreads, errors, f"C{color}", marker=".", label=f"degree {degree}")
            panel.plot(spreads, expected, f"C{color}", linestyle="--", linewidth=1)
        panel.set(xscale="log", yscale="log", ylim=(1e-5, 3), title=READINGS[reading] + " reading")
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        panel.set_xlabel("spread of a query's scores")
        for level in LEVELS:
            panel.axhline(level, color="k", linestyle=":", linewidth=0.8)
    axes[0].set_ylabel("relative error (median)")
    add_legend(axes[0], loc="lower right")
    caption = (
        "Measured (solid) and expected (dashed: expected_error, for the fit sqrt(Pr[Poisson(spread^2) > degree]))."
    )
    return Picture("map-curves", caption, figure)


def _others(findings: Findings) -> Picture:
    figure, (means, lengths, needles) = panels(3, width=4.6, height=4.2)
    _lines(means, select(findings, what=OFFSET), "offset", (2, 4))
    means.set(xlabel="mean of a query's scores (spread 0.5)", ylabel="relative error (median)")
    for color, spread in enumerate(sorted({each.case["spread"] for each in select(findings, what=LENGTH)})):
        own = select(findings, what=LENGTH, spread=spread)
        for reading in ("taylor", "fitted"):
            label = f"{READINGS[reading]}, spread {spread:g}"
            errors = [median_error(each, reading, 2) for each in own]
            tokens = [each.case["tokens"] for each in own]
            lengths.plot(tokens, errors, f"C{color}", linestyle=_STYLES[reading], marker=".", label=label)
    lengths.set(xscale="log", xlabel="tokens (degree 2)")
    for color, ties in enumerate(sorted({each.case["ties"] for each in select(findings, what=NEEDLE)})):
        own = select(findings, what=NEEDLE, ties=ties)
        for reading in ("taylor", "fitted"):
            label = f"{READINGS[reading]}, {ties:,} key{'s' if ties > 1 else ''}"
            errors = [median_error(each, reading, 2) for each in own]
            margins = [each.case["margin"] for each in own]
            needles.plot(margins, errors, f"C{color}", linestyle=_STYLES[reading], marker=".", label=label)
    needles.set(xlabel="margin of keys that stand out (spread 0.5, degree 2)")
    for panel in (means, lengths, needles):
        panel.set(yscale="log", ylim=(1e-3, 20 if panel is means else 3))
        add_legend(panel, loc="upper left" if panel is means else "lower right")
    caption = "Errors by the mean of a query's scores, by the length, and where some keys stand out of the others."
    return Picture("map-others", caption, figure)


def _lines(panel: Any, own: Findings, name: str, degrees: tuple[int, ...]) -> None:
    """A line for each reading and degree over what the cases have by a name."""
    for color, degree in enumerate(degrees):
        for reading, label in READINGS.items():
            some = [each for each in own if reading in each.values and str(degree) in each.values[reading]]
            errors = [median_error(each, reading, degree) for each in some]
            if some:
                style = _STYLES[reading]
                at = [each.case[name] for each in some]
                panel.plot(at, errors, f"C{color}", linestyle=style, marker=".", label=f"{label}, degree {degree}")

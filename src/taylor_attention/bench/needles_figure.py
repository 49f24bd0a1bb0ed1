"""The figure of planted needles: error against margin, ties and age, a line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from .evidence.drawing import panels
from .evidence.experiment import Picture
from .needles import Result
from .needles_plan import AGE, MARGIN, PARAMETERS, TIES, Case, Settings, Sweep

_MARKERS = "osD^v"  # by degree
_SIZE = (4.8, 5.6)  # inches of a panel
_AXIS = {
    MARGIN: "margin over the mean background score",
    TIES: "needles (ties)",
    AGE: "age (tokens before the query)",
}


def draw(sweeps: Sequence[Sweep], results: Mapping[Case, Result], settings: Settings) -> Picture:
    """Medians over streams with their quartiles.

    A panel for each parameter, a colour for each kind of method, a marker for each degree. Dotted lines are of needles
    in the window, and only of methods that have one; lines of methods without are broad. With heavy tokens a method has
    the colour that it has without them, dashes and hollow markers.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, axes = panels(len(PARAMETERS), width=_SIZE[0], height=_SIZE[1])
    by_parameter = dict(zip(PARAMETERS, axes, strict=True))
    looks = _looks(settings.methods)
    for sweep in sweeps:
        for name, options in settings.methods.items():
            if "window" in options or not sweep.inside:
                _plot(by_parameter[sweep.name], sweep, [results[case] for case in sweep.cases], name, looks[name])
    for parameter, each in by_parameter.items():
        _dress(each, [sweep for sweep in sweeps if sweep.name == parameter])
    by_parameter[MARGIN].set_ylabel("||y - softmax|| / ||softmax||")
    figure.legend(*by_parameter[AGE].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    caption = (
        f"Error beside softmax over {settings.length:,} tokens, head size {settings.head_dim}, background scores "
        f"{settings.mean:g} ± {settings.spread:g}; medians and quartiles of {settings.heads * settings.seeds} streams. "
        "Dotted: needles in the window."
    )
    return Picture("needles", caption, figure)


def _looks(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each method's lines look: by the words of its name but for a number, and that number."""
    kinds = {name: name.rstrip("0123456789 ") for name in methods}
    degrees = {name: name.removeprefix(kind) for name, kind in kinds.items()}
    kinds = {name: kind.replace(" + heavy", "") for name, kind in kinds.items()}
    colors = dict(zip(dict.fromkeys(kinds.values()), cycle(f"C{i}" for i in range(10)), strict=False))
    markers = dict(zip(dict.fromkeys(degrees.values()), cycle(_MARKERS), strict=False))
    broad = {"linewidth": 4, "alpha": 0.5, "markersize": 7, "zorder": 1}
    fine = {"linewidth": 1.3, "markersize": 4}
    heavy = {"linestyle": "--", "markerfacecolor": "none", "markersize": 6}
    return {
        name: {"color": colors[kinds[name]], "marker": markers[degrees[name]]}
        | (fine if "window" in options else broad)
        | (heavy if "heavy" in options else {})
        for name, options in methods.items()
    }


def _plot(axes: Any, sweep: Sweep, results: Sequence[Result], name: str, look: dict[str, Any]) -> None:
    x = [getattr(result.case, sweep.name) for result in results]
    low, middle, high = zip(*(result.quartiles(name) for result in results), strict=True)
    axes.plot(x, middle, **(look | ({"linestyle": ":"} if sweep.inside else {"label": name})))
    axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _dress(axes: Any, sweeps: Sequence[Sweep]) -> None:
    """The title, scales and ticks of a panel."""
    parameter, case = sweeps[0].name, sweeps[0].cases[0]
    fixed = {
        MARGIN: f"{case.ties:,} needles" if case.ties > 1 else "one needle",
        TIES: f"margin {case.margin:g}",
        AGE: f"{case.ties:,} needles, margin {case.margin:g}",
    }
    ages = "".join(f", {'dotted: ' if sweep.inside else ''}age {sweep.cases[0].age:,}" for sweep in sweeps)
    scale = "linear" if parameter == MARGIN else "log"
    axes.set(title=fixed[parameter] + ages * (parameter != AGE), xlabel=_AXIS[parameter], xscale=scale, yscale="log")
    ticks = sorted({getattr(case, parameter) for sweep in sweeps for case in sweep.cases})
    axes.set_xticks(ticks, [f"{tick:,}" if isinstance(tick, int) else f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)

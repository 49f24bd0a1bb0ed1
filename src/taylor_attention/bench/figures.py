"""The plots of a run: time of a decode step against context, of a prefill against length, fraction of the limit.

One plot has what windows cost; the others are of the method without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.storage import replacing
from ..errors import require
from .cases import DECODE, OURS, PREFILL, PURE, SOFTMAX, Result

Points = list[tuple[int, float]]
Name = TypeVar("Name")

_STYLES = ("-", "--", ":", "-.")  # ours, then rivals; of windows, by degree
_AXIS = {DECODE: "context (tokens)", PREFILL: "length (tokens)"}


def draw_all(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draw what there are results for; the files, PNG, replaced atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    files = []
    measured = [result for result in results if result.milliseconds(OURS) is not None]
    for kind in (DECODE, PREFILL):
        own = [result for result in measured if result.case.kind == kind and not result.case.window]
        if own:
            files += [_draw_times(folder / f"{kind}.png", own), _draw_fractions(folder / f"{kind}_fraction.png", own)]
    near = [result for result in measured if result.case.kind in (DECODE, PREFILL) and result.case.window]
    return [*files, _draw_windows(folder / "windows.png", near)] if near else files


def _draw_times(path: Path, results: Sequence[Result]) -> Path:
    """A panel per head size, a colour per degree; softmax, which has no degree, in black."""
    figure, panels = _panels(results)
    names = list(dict.fromkeys(name for result in results for name in result.outcomes if name != SOFTMAX))
    for head_dim, axes in panels.items():
        own = [result for result in results if result.case.head_dim == head_dim]
        for color, degree in enumerate(_degrees(results)):
            mine = [result for result in own if result.case.degree == degree]
            for style, name in enumerate(names):
                label = f"{name}, degree {degree}"
                _plot(axes, _points(mine, _time_of(name)), f"C{color}", _STYLES[style % len(_STYLES)], label)
        _plot(axes, _points(own, _time_of(SOFTMAX)), "black", "-", SOFTMAX)
        axes.set(xlabel=_AXIS[own[0].case.kind], ylabel="milliseconds", yscale="log")
    return _save(figure, path)


def _draw_fractions(path: Path, results: Sequence[Result]) -> Path:
    figure, panels = _panels(results)
    for head_dim, axes in panels.items():
        own = [result for result in results if result.case.head_dim == head_dim]
        for color, degree in enumerate(_degrees(results)):
            mine = [result for result in own if result.case.degree == degree]
            _plot(axes, _points(mine, lambda result: result.fraction), f"C{color}", "-", f"degree {degree}")
        axes.set(xlabel=_AXIS[own[0].case.kind], ylabel="fraction of the limit", ylim=(0, None))
    return _save(figure, path)


def _draw_windows(path: Path, results: Sequence[Result]) -> Path:
    """Time over the pure method's at the longest length: a panel per kind, a colour per head size, dashes by degree."""
    figure, panels = _figure(sorted({result.case.kind for result in results}))
    windows = sorted({0, *(result.case.window for result in results)})
    for kind, axes in panels.items():
        own = [result for result in results if result.case.kind == kind]
        longest = max(result.case.length for result in own)
        for color, head_dim in enumerate(_head_dims(results)):
            for style, degree in enumerate(_degrees(results)):
                shape = (head_dim, degree, longest)
                mine = (r for r in own if (r.case.head_dim, r.case.degree, r.case.length) == shape)
                found = ((r.case.window, r.milliseconds(OURS), r.milliseconds(PURE)) for r in mine)
                points = [(window, with_it / without) for window, with_it, without in found if with_it and without]
                label = f"head size {head_dim}, degree {degree}"
                _plot(axes, [(0, 1.0), *sorted(points)], f"C{color}", _STYLES[style % len(_STYLES)], label)
        axes.set(title=f"{kind}, {longest:,} tokens", xlabel="window (tokens)", ylabel="time / time without a window")
        axes.set_xticks(windows)
        axes.grid(alpha=0.3)
    return _save(figure, path)


def _figure(names: Sequence[Name]) -> tuple[Any, dict[Name, Any]]:
    """A figure with a panel for each name."""
    figures = require("matplotlib.figure", "bench", "drawing the figures")
    figure = figures.Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    return figure, dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))


def _panels(results: Sequence[Result]) -> tuple[Any, dict[int, Any]]:
    """A figure with a panel for each head size."""
    figure, panels = _figure(_head_dims(results))
    for head_dim, axes in panels.items():
        lengths = sorted({result.case.length for result in results if result.case.head_dim == head_dim})
        axes.set(title=f"head size {head_dim}", xscale="log")
        axes.set_xticks(lengths, [_short(length) for length in lengths])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    return figure, panels


def _short(tokens: int) -> str:
    """1K is 1,024."""
    unit, name = next(((unit, name) for unit, name in ((2**20, "M"), (2**10, "K")) if tokens % unit == 0), (1, ""))
    return f"{tokens // unit:,}{name}"


def _head_dims(results: Iterable[Result]) -> list[int]:
    return sorted({result.case.head_dim for result in results})


def _degrees(results: Iterable[Result]) -> list[int]:
    return sorted({result.case.degree for result in results})


def _time_of(name: str) -> Callable[[Result], float | None]:
    return lambda result: result.milliseconds(name)


def _points(results: Iterable[Result], value: Callable[[Result], float | None]) -> Points:
    found = ((result.case.length, value(result)) for result in results)
    return sorted((length, y) for length, y in found if y is not None)


def _plot(axes: Any, points: Points, color: str, style: str, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=3, label=label)


def _save(figure: Any, path: Path) -> Path:
    for axes in figure.axes:
        axes.legend(fontsize="x-small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path

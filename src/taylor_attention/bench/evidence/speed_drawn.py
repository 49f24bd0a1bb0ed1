"""Pictures of what `taylor-attention bench` measured: times and fractions of the limit by length, what windows cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..cases import DECODE, EARLY, OURS, PREFILL, PURE, SOFTMAX, Result
from .drawing import add_legend, panels
from .experiment import Findings, Picture
from .speed_shown import results_of

Points = list[tuple[int, float]]

_STYLES = ("-", "--", ":", "-.")  # ours, then rivals; of windows, by degree
_AXIS = {DECODE: "context (tokens)", PREFILL: "length (tokens)"}
_STEP = {DECODE: "A decoded token", PREFILL: "A causal prefill"}
_LIMIT = {DECODE: "the bandwidth at which a large tensor is read", PREFILL: "the rate of a large GEMM"}


def pictures(findings: Findings) -> list[Picture]:
    """What there are results for."""
    return draw(results_of(findings))


def draw(results: Sequence[Result]) -> list[Picture]:
    """The same, of results.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    made = []
    measured = [result for result in results if result.milliseconds(OURS) is not None]
    for kind in (DECODE, PREFILL):
        own = [result for result in measured if result.case.kind == kind and not result.case.window]
        if own:
            made += [_draw_times(kind, own), _draw_fractions(kind, own)]
    near = [result for result in measured if result.case.kind in (DECODE, PREFILL) and result.case.window]
    return [*made, _draw_windows(near)] if near else made


def _draw_times(kind: str, results: Sequence[Result]) -> Picture:
    """A panel per head size, a colour per degree; softmax, which has no degree, in black."""
    figure, by_size = _panels(results)
    names = list(dict.fromkeys(name for result in results for name in result.outcomes))
    names = [name for name in names if name not in (SOFTMAX, EARLY)]
    for head_dim, axes in by_size.items():
        own = [result for result in results if result.case.head_dim == head_dim]
        for color, degree in enumerate(_degrees(results)):
            mine = [result for result in own if result.case.degree == degree]
            for style, name in enumerate(names):
                label = f"{name}, degree {degree}"
                _plot(axes, _points(mine, _time_of(name)), f"C{color}", _STYLES[style % len(_STYLES)], label)
        _plot(axes, _points(own, _time_of(SOFTMAX)), "black", "-", SOFTMAX)
        axes.set(xlabel=_AXIS[kind], ylabel="milliseconds", yscale="log")
    caption = f"{_STEP[kind]}, by head size and degree, beside softmax (black) and other ways to compute the series."
    return _finish(f"speed-{kind}", caption, figure)


def _draw_fractions(kind: str, results: Sequence[Result]) -> Picture:
    figure, by_size = _panels(results)
    for head_dim, axes in by_size.items():
        own = [result for result in results if result.case.head_dim == head_dim]
        for color, degree in enumerate(_degrees(results)):
            mine = [result for result in own if result.case.degree == degree]
            _plot(axes, _points(mine, lambda result: result.fraction), f"C{color}", "-", f"degree {degree}")
        axes.set(xlabel=_AXIS[kind], ylabel="fraction of the limit", ylim=(0, None))
    return _finish(f"speed-{kind}-fraction", f"{_STEP[kind]}, as a fraction of {_LIMIT[kind]}.", figure)


def _draw_windows(results: Sequence[Result]) -> Picture:
    """Time over the pure method's at the longest length: a panel per kind, a colour per head size, dashes by degree."""
    kinds = sorted({result.case.kind for result in results})
    figure, both = panels(len(kinds))
    windows = sorted({0, *(result.case.window for result in results)})
    for kind, axes in zip(kinds, both, strict=True):
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
    return _finish("speed-windows", "What a window costs: time over that of the same method without one.", figure)


def _panels(results: Sequence[Result]) -> tuple[Any, dict[int, Any]]:
    """A figure with a panel for each head size."""
    head_dims = _head_dims(results)
    figure, found = panels(len(head_dims))
    by_size = dict(zip(head_dims, found, strict=True))
    for head_dim, axes in by_size.items():
        lengths = sorted({result.case.length for result in results if result.case.head_dim == head_dim})
        axes.set(title=f"head size {head_dim}", xscale="log")
        axes.set_xticks(lengths, [_short(length) for length in lengths])
        axes.set_xticks([], minor=True)
    return figure, by_size


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


def _finish(name: str, caption: str, figure: Any) -> Picture:
    for axes in figure.axes:
        add_legend(axes)
    return Picture(name, caption, figure)

"""The heat maps of a profile: layers by heads, what each head looks at and what it would have to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.storage import replacing
from ..errors import require

if TYPE_CHECKING:
    from ..hf.profiling import Profile, Recommendation

Values = Mapping[tuple[int, int], float | None]

_NONE = "lightgrey"
_MOST_SPREAD = 6  # beyond it no polynomial helps, and one such head would hide what the others are like


def draw(path: Path, profile: Profile, advice: Recommendation) -> Path:
    """Draw where the weight is, how far scores spread, and what is needed, as a PNG that is replaced atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "bench", "drawing the figure")
    window = profile.middle_window
    heads = profile.heads.items()
    panels: dict[str, tuple[Values, dict[str, float]]] = {
        f"weight of far keys\n(beyond {profile.sinks} sinks and {window})": (
            {place: head.weight.far[window] for place, head in heads},
            {"vmin": 0, "vmax": 1},
        ),
        "standard deviation\nof a query's scores": (
            {place: head.spread.std for place, head in heads},
            {"vmin": 0, "vmax": _MOST_SPREAD},
        ),
        "degree for 10%, no window,\nfitted (grey: above 8)": (
            {place: head.errors.degree_for("fitted", 0.1) for place, head in heads},
            {"vmin": 0, "vmax": 8},
        ),
        "log2 of exact tokens\nrecommended (grey: softmax)": (
            _exact(advice),
            {"vmin": 0, "vmax": math.log2(profile.tokens)},
        ),
    }
    size = (2 + 2.2 * len(panels) + 0.12 * len(panels) * profile.kv_heads, 1.8 + 0.18 * len(profile.layers))
    figure = figures.Figure(figsize=(max(11, size[0]), max(3.6, size[1])), layout="constrained")
    for axes, (title, (values, limits)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _heat(figure, axes, values, limits)
        axes.set_title(title, fontsize="small")
    figure.suptitle(f"{profile.queries:,} queries of each head, texts of {profile.tokens:,} tokens")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def _exact(advice: Recommendation) -> dict[tuple[int, int], float | None]:
    """log2 of how many latest and heavy tokens a key/value head keeps, 0 without any; None: softmax."""
    found: dict[tuple[int, int], float | None] = {}
    for place, choice in advice.choices.items():
        window, heavy = choice.settings.window, choice.settings.heavy
        found[place] = None if window is None else math.log2(max(1, window + heavy))
    return found


def _heat(figure: Any, axes: Any, values: Values, limits: dict[str, float]) -> None:
    maps = require("matplotlib", "bench", "drawing the figure").colormaps
    layers, heads = (sorted({place[axis] for place in values}) for axis in (0, 1))
    rows = [[values[layer, head] for head in heads] for layer in layers]
    numbers = [[math.nan if each is None else each for each in row] for row in rows]
    shown = axes.imshow(numbers, aspect="auto", cmap=maps["viridis"].with_extremes(bad=_NONE), **limits)
    fits = max((each for row in numbers for each in row if not math.isnan(each)), default=0) <= limits["vmax"]
    figure.colorbar(shown, ax=axes, shrink=0.8, extend="neither" if fits else "max")
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(len(heads)), heads, fontsize="x-small")
    axes.set_yticks(range(0, len(layers), 1 + len(layers) // 16), layers[:: 1 + len(layers) // 16], fontsize="x-small")

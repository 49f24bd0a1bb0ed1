"""What the pictures share: a look, panels, and files that are replaced atomically."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...core.storage import replacing
from ...errors import require
from .experiment import Picture

PANEL = (4.4, 3.6)
"""Inches of a panel."""


def panels(columns: int, rows: int = 1, *, width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "bench", "drawing the figures")
    figure = figures.Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def add_legend(axes: Any, **look: Any) -> None:
    """A legend of what has a label, if anything has."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **look)


def save_pictures(pictures: Iterable[Picture], folder: Path) -> list[Path]:
    """Write each picture as a PNG."""
    files = []
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        with replacing(path) as file:
            picture.figure.savefig(file, format="png", dpi=110)
        files.append(path)
    return files

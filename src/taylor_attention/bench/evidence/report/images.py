"""Pictures as text that stands in a page itself: SVG where that is small, PNG where a picture has very many marks."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

from ....errors import require

LARGEST_SVG = 250_000
"""Bytes; larger ones become PNGs."""

_CSS_PIXELS = 96  # in an inch


@dataclass(frozen=True)
class Image:
    """An address that holds the picture itself, and its natural size in CSS pixels."""

    address: str
    width: int
    height: int


def embed(figure: Any) -> Image:
    """A matplotlib figure as an image; the same bytes for the same figure."""
    matplotlib = require("matplotlib", "bench", "drawing the figures")
    buffer, kind = io.BytesIO(), "svg+xml"
    with matplotlib.rc_context({"svg.hashsalt": "taylor-attention", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    if buffer.tell() > LARGEST_SVG:
        buffer, kind = io.BytesIO(), "png"
        figure.savefig(buffer, format="png", dpi=160)
    width, height = (round(inches * _CSS_PIXELS) for inches in figure.get_size_inches())
    return Image(f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}", width, height)

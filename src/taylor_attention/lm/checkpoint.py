"""Models by name: the weights that ship with the package, in files as `nn.checkpoint` writes and reads them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import ArgumentError, expect, shown
from ..nn.checkpoint import fingerprint, load_checkpoint, save_checkpoint

__all__ = ["SHIPPED", "fingerprint", "load_checkpoint", "save_checkpoint", "shipped"]

SHIPPED = ("taylor", "softmax")
"""Names of the shipped twins, trained with the same budget."""


def shipped(name: str) -> Path:
    """The file of a model that ships with the package: "taylor", or its "softmax" twin.

    Raises:
        ArgumentError: the name is neither, or this installation carries no weights.
    """
    expect(name in SHIPPED, "name", " or ".join(map(repr, SHIPPED)), shown(name))
    path = Path(str(resources.files(__package__))) / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise ArgumentError(f"name: expected shipped weights, got {name!r}, which this installation does not carry")
    return path

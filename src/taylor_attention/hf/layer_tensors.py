"""Small tensors that each attention layer of a model keeps by name: set, found again, written and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError
from .models import attention_layers

_PREFIX = "taylor_attention_"

Named = Mapping[str, Tensor]
"""The tensors of one layer."""


def put(model: PreTrainedModel, names: Sequence[str], layers: Sequence[Named] | None) -> None:
    """Give each attention layer copies of its tensors, where its parameters are; None: take those of these names away.

    They move with the model, but are not saved with it.
    """
    modules = attention_layers(model)
    if layers is None:
        for module in modules:
            for name in names:
                module._buffers.pop(_PREFIX + name, None)
        return
    for module, tensors in zip(modules, layers, strict=True):
        place = next(module.parameters()).device
        for name in names:
            module.register_buffer(_PREFIX + name, tensors[name].detach().to(place, copy=True), persistent=False)


@contextmanager
def lending(model: PreTrainedModel, layers: Sequence[Named]) -> Iterator[None]:
    """Let attention layers use these tensors themselves, which gradients reach, inside the block; then as before."""
    modules = attention_layers(model)
    before = [dict(module._buffers) for module in modules]
    for module, tensors in zip(modules, layers, strict=True):
        place = next(module.parameters()).device
        module._buffers.update({_PREFIX + name: x.to(place) for name, x in tensors.items()})
    try:
        yield
    finally:
        for module, buffers in zip(modules, before, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)


def get(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of an attention layer; None if it has none of this name."""
    return module._buffers.get(_PREFIX + name)


def write(path: str | Path, kind: str, layers: Sequence[Named]) -> None:
    """Write the tensors of all layers to a file, replacing it atomically (safetensors); StorageError if it cannot."""
    tensors = {f"{index}.{name}": x for index, each in enumerate(layers) for name, x in each.items()}
    write_tensors(path, {name: x.detach().contiguous() for name, x in tensors.items()}, kind=kind, metadata={})


def read(path: str | Path, kind: str, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Read what `write` wrote; StorageError if it cannot be read, or holds something else."""
    tensors, _ = read_tensors(path, kind=kind)
    layers = range(len(tensors) // len(names))
    if set(tensors) != {f"{index}.{name}" for index in layers for name in names}:
        raise StorageError(f"{path}: expected {', '.join(names)} of each layer, got {sorted(tensors)[:6]}")
    return [{name: tensors[f"{index}.{name}"] for name in names} for index in layers]

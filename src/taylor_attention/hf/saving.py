"""Files of what the layers of a cache keep: safetensors, with the settings and the number of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.state import State
from ..core.storage import read_tensors, write_tensors
from ..errors import ArgumentError, StorageError, expect, expect_int
from ..nn.cache import KeyValueCache
from .heads import Memory
from .models import Sizes
from .settings import HeadSettings, ModelSettings

KIND = "transformers-cache"
_KEYS = ("centre", "key_map")


class Kept(NamedTuple):
    """What one layer keeps."""

    seen: int
    memories: list[Memory]  # of each group of heads; none before the first token
    centre: Tensor | None  # what is subtracted from its keys
    key_map: Tensor | None  # what makes its far keys

    def to(self, device: torch.device | None) -> Kept:
        """The same on a device."""
        keys = (None if x is None else x.to(device) for x in (self.centre, self.key_map))
        return Kept(self.seen, [memory.to(device) for memory in self.memories], *keys)


def write_memories(path: str | Path, settings: ModelSettings, layers: list[Kept]) -> None:
    """Write what each layer keeps, and the settings that it is kept by, replacing the file atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    texts = {}
    for place, memory in _places(layers):
        texts[place] = memory.metadata()
        tensors |= {f"{place}.{name}": tensor for name, tensor in memory.detach().tensors().items()}
    for index, kept in enumerate(layers):
        keys = {f"{index}.{name}": getattr(kept, name) for name in _KEYS}
        tensors |= {name: x for name, x in keys.items() if x is not None}
    about = {"settings": settings.to_dict(), "seen": [kept.seen for kept in layers], "memories": texts}
    write_tensors(path, tensors, kind=KIND, metadata={name: json.dumps(value) for name, value in about.items()})


def read_memories(path: str | Path, settings: ModelSettings, sizes: Sizes) -> list[Kept]:
    """Read what `write_memories` wrote, on the CPU.

    Raises:
        StorageError: the file is missing, damaged or of another kind, or of a model of other settings or another shape.
    """
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        about = {name: json.loads(metadata[name]) for name in ("settings", "seen", "memories")}
        same = ModelSettings.from_dict(about["settings"]) == settings
        expect(same, "settings", "those of this model", "others")
        seen, texts = about["seen"], about["memories"]
        expect(len(seen) == sizes.layers, "layers", str(sizes.layers), len(seen))
        layers = []
        for index, count in enumerate(seen):
            expect_int("seen", count, 0)
            groups = settings.groups(index, sizes.kv_heads) if count else []
            memories = _read_layer(groups, index, tensors, texts, sizes)
            layers.append(Kept(count, memories, *(tensors.get(f"{index}.{name}") for name in _KEYS)))
        _check_counts(layers)
    except (ArgumentError, StorageError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: expected the cache of such a model, got {error}") from error
    return layers


def _places(layers: list[Kept]) -> list[tuple[str, Memory]]:
    """Each memory with its name in a file, "layer.group"."""
    return [(f"{index}.{group}", each) for index, kept in enumerate(layers) for group, each in enumerate(kept.memories)]


def _read_layer(
    groups: list[tuple[HeadSettings, tuple[int, ...]]],
    layer: int,
    tensors: dict[str, Tensor],
    texts: dict[str, dict[str, str]],
    sizes: Sizes,
) -> list[Memory]:
    found: list[Memory] = []
    for number, (settings, heads) in enumerate(groups):
        prefix = f"{layer}.{number}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        kind = KeyValueCache if settings.is_softmax else State
        memory = kind.from_tensors(own, texts[prefix[:-1]])
        wanted = {"kv_heads": len(heads), "head_dim": sizes.head_dim} | (
            {} if settings.is_softmax else {**settings.layout, "far_dim": settings.far_dim}
        )
        for name, value in wanted.items():
            expect(getattr(memory, name) == value, name, str(value), getattr(memory, name))
        found.append(memory)
    return found


def _check_counts(layers: list[Kept]) -> None:
    """Refuse counts that no model leaves: all layers see the same tokens, in the same sequences."""
    seen, memories = {kept.seen for kept in layers}, [memory for _, memory in _places(layers)]
    expect(len(seen) <= 1, "seen", "the same number of tokens in all layers", sorted(seen))
    batches = {memory.batch_size for memory in memories}
    expect(len(batches) <= 1, "memories", "as many sequences in all layers", sorted(batches))
    lengths = {memory.length for memory in memories if isinstance(memory, KeyValueCache)}
    expect(lengths <= seen, "seen", f"as many as the keys of softmax heads, {sorted(lengths)}", sorted(seen))
    most = max((int(memory.tokens.max()) for memory in memories if memory.batch_size), default=0)
    expect(most <= max(seen, default=0), "seen", f"at least the {most} tokens of the states", sorted(seen))

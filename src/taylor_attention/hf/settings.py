"""What each key/value head of a model keeps of its past: latest, first and weightiest tokens, moments of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..core.state import State, check_far_dim, check_reach
from ..core.storage import check_path, write_text
from ..errors import ArgumentError, StorageError, expect, expect_int, shown
from ..ops.validation import check_reading

_OF_SOFTMAX = {"sinks": 0, "heavy": 0, "degree": None, "reading": "taylor", "far_dim": None}


@dataclass(frozen=True)
class HeadSettings:
    """What one key/value head keeps of its past.

    Attributes:
        window: latest tokens that are attended to exactly; None: all of them, which is softmax with a cache that grows
            (the other attributes then say nothing and are set to 0, 0, None, "taylor" and None).
        sinks: first tokens that are attended to exactly.
        heavy: others that are, for their weight.
        degree: of the moments of all others, the far tokens; None: these are forgotten.
        reading: how far scores are read, "taylor" or "fitted" (see `attention`).
        far_dim: entries of far queries and keys, which learned maps make (see `far_maps`); None: there are no maps.

    Raises:
        ArgumentError: an attribute is not one of these.
    """

    window: int | None = 128
    sinks: int = 4
    heavy: int = 0
    degree: int | None = 2
    reading: str = "taylor"
    far_dim: int | None = None

    def __post_init__(self) -> None:
        check_reading(self.reading, None, True)
        if self.window is None:
            for name, value in _OF_SOFTMAX.items():
                object.__setattr__(self, name, value)
        else:
            check_reach(self.degree, self.window, self.sinks, self.heavy)
            check_far_dim(self.far_dim, self.degree, self.window + self.sinks > 0)

    @property
    def is_softmax(self) -> bool:
        """Whether all tokens are kept."""
        return self.window is None

    @property
    def layout(self) -> dict[str, Any]:
        """What `State.zeros` and `attention` take of these settings; for heads that are not softmax."""
        near = {"window": self.window, "sinks": self.sinks, "heavy": self.heavy}
        return {"degree": self.degree, **near}

    def nbytes(
        self, tokens: int, head_dim: int, value_dim: int, dtype: torch.dtype = torch.float32, kv_heads: int = 1
    ) -> int:
        """Bytes that so many such heads of one sequence hold after so many tokens of this dtype.

        A state has the same number of bytes at any length; softmax has its keys and values, without spare capacity.
        """
        expect_int("tokens", tokens, 0)
        if self.is_softmax:
            return tokens * kv_heads * (head_dim + value_dim) * dtype.itemsize
        return _state_bytes(self, kv_heads, head_dim, value_dim, dtype)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> HeadSettings:
        """The settings that `dataclasses.asdict` wrote; what is left out has its default."""
        names = [each.name for each in fields(cls)]
        good = isinstance(source, Mapping) and set(source) <= set(names)
        expect(good, "settings of a head", f"a mapping with names of {names}", shown(source))
        return cls(**source)


@dataclass(frozen=True)
class ModelSettings:
    """What all key/value heads of a model keep.

    Attributes:
        default: of every head that is not named in `heads`.
        heads: exceptions, by (layer, key/value head), both from 0.

    Raises:
        ArgumentError: one of these is another thing.
    """

    default: HeadSettings = field(default_factory=HeadSettings)
    heads: Mapping[tuple[int, int], HeadSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = isinstance(self.default, HeadSettings)
        expect(good, "default", "HeadSettings", shown(self.default))
        expect(isinstance(self.heads, Mapping), "heads", "a mapping of (layer, kv head)", shown(self.heads))
        for place, head in self.heads.items():
            pair = isinstance(place, tuple) and len(place) == 2
            expect(pair, "heads", "keys (layer, kv head)", shown(place))
            expect_int("heads: layer", place[0], 0)
            expect_int("heads: kv head", place[1], 0)
            expect(isinstance(head, HeadSettings), f"heads[{place}]", "HeadSettings", shown(head))
        object.__setattr__(self, "heads", dict(sorted(self.heads.items())))

    def layer(self, index: int, kv_heads: int) -> list[HeadSettings]:
        """What each key/value head of a layer keeps."""
        return [self.heads.get((index, head), self.default) for head in range(kv_heads)]

    def groups(self, index: int, kv_heads: int) -> list[tuple[HeadSettings, tuple[int, ...]]]:
        """The key/value heads of a layer by what they keep, in the order of their first heads."""
        found: dict[HeadSettings, tuple[int, ...]] = {}
        for head, settings in enumerate(self.layer(index, kv_heads)):
            found[settings] = (*found.get(settings, ()), head)
        return list(found.items())

    def check_sizes(self, layers: int, kv_heads: int) -> None:
        """Raise ArgumentError for an exception whose head such a model does not have."""
        outside = [place for place in self.heads if place[0] >= layers or place[1] >= kv_heads]
        expect(not outside, "heads", f"places in {layers} layers of {kv_heads} key/value heads", shown(outside))

    def nbytes(
        self,
        tokens: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes that one sequence holds in such a model after so many tokens (see `HeadSettings.nbytes`).

        value_dim: default `head_dim`. dtype: of the model; states are float32 at least.
        """
        self.check_sizes(layers, kv_heads)
        width = head_dim if value_dim is None else value_dim
        groups = [group for index in range(layers) for group in self.groups(index, kv_heads)]
        return sum(head.nbytes(tokens, head_dim, width, dtype, len(heads)) for head, heads in groups)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: {"default": {...}, "heads": {"layer.head": {...}}}; the input of `from_dict`."""
        heads = {f"{layer}.{head}": asdict(settings) for (layer, head), settings in self.heads.items()}
        return {"default": asdict(self.default), "heads": heads}

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> ModelSettings:
        """The settings that `to_dict` wrote.

        Raises:
            ArgumentError: it is no such mapping.
        """
        good = isinstance(source, Mapping) and set(source) <= {"default", "heads"}
        expect(good, "settings", "a mapping with 'default' and 'heads'", shown(source))
        heads = source.get("heads", {})
        expect(isinstance(heads, Mapping), "heads", "a mapping of 'layer.head'", shown(heads))
        default = HeadSettings.from_dict(source.get("default", {}))
        return cls(default, {_place(key): HeadSettings.from_dict(head) for key, head in heads.items()})

    def save(self, path: str | Path) -> None:
        """Write the settings to a JSON file, replacing it atomically; StorageError if it cannot be written."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ModelSettings:
        """Read what `save` wrote, or wrote by hand in that form.

        Raises:
            StorageError: the file cannot be read, or holds no such settings.
        """
        check_path(path)
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError, ArgumentError) as error:
            raise StorageError(f"{path}: expected settings of a model as JSON, got {error}") from error


def _place(key: str) -> tuple[int, int]:
    """(layer, head) of "layer.head"."""
    parts = key.split(".") if isinstance(key, str) else []
    good = len(parts) == 2 and all(part.isascii() and part.isdecimal() for part in parts)
    expect(good, "heads", "keys 'layer.head'", shown(key))
    return int(parts[0]), int(parts[1])


@lru_cache(maxsize=1024)
def _state_bytes(settings: HeadSettings, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (1, kv_heads, head_dim, value_dim)
    return State.zeros(*sizes, **settings.layout, far_dim=settings.far_dim, dtype=kept, device="meta").nbytes

"""Learned queries and keys for the far part: a few entries that stand for what a head's far tokens say.

Of a query q and a key k, with the head's key centre subtracted (see `centres`), far scores are (q A + a) . (k B + b),
A [d, f] and a [f] of the query head, B [d, f] and b [f] of the key/value head; far weights are exp(gain) times the
series of that. Near tokens have their own softmax scores. Moments of size f cost little: at f = 8 and degree 2 as much
as 23 tokens of a cache with d = 64.

The offsets make the coefficients of the series a head's own. Where one entry of the far keys is constant, the score
is t x + c with any c, and e^g (1 + (t x + c) + (t x + c)^2 / 2) = e^g ((t x + c + 1)^2 + 1) / 2 is any quadratic of x
that is positive everywhere: e^g / 2 is its least value, -(c + 1) / t the place of that, e^g t^2 / 2 its curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import expect, shown
from . import layer_tensors
from .models import Sizes, sizes_of, text_config

KIND = "far-maps"


class FarMap(NamedTuple):
    """What makes far queries and keys of one layer's, and the logarithm of a factor on far weights.

    Maps have the d rows of a matrix, or one more: of what is added afterwards.
    """

    query_map: Tensor  # [Hq, d or d + 1, f]
    key_map: Tensor  # [Hkv, d or d + 1, f]
    gain: Tensor  # [Hq]

    @property
    def far_dim(self) -> int:
        """Entries of a far key."""
        return self.key_map.shape[2]

    def far_query(self, query: Tensor) -> Tensor:
        """Of queries [B, Hq, n, d]: [B, Hq, n, f]."""
        return _map(query, self.query_map)

    def far_key(self, key: Tensor) -> Tensor:
        """Of centred keys [B, Hkv, n, d]: [B, Hkv, n, f]."""
        return _map(key, self.key_map)

    def parts(self, head_dim: int) -> list[tuple[Tensor, Tensor]]:
        """Of queries, then of keys: the matrix [H, d, f] and the offset [H, 1, f], of zeros where there is none."""
        return [_parts(x, head_dim) for x in (self.query_map, self.key_map)]


def with_offsets(matrix: Tensor, offset: Tensor) -> Tensor:
    """One map [..., d + 1, f] of a matrix [..., d, f] and an offset [..., 1, f]."""
    return torch.cat((matrix, offset), -2)


def _map(x: Tensor, by: Tensor) -> Tensor:
    """x [B, H, n, d] by [H, d or d + 1, f]: [B, H, n, f]."""
    matrix, offset = _parts(by.to(x.dtype), x.shape[3])
    return x @ matrix + offset


def _parts(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    matrix, offset = x.tensor_split([head_dim], 1)
    return matrix, offset.sum(1, keepdim=True)


def set_far_maps(model: PreTrainedModel, maps: Sequence[FarMap] | str | Path | None) -> None:
    """Let the attention layers of a model read far tokens by learned maps, in all heads whose settings have a far_dim.

    They move with the model, but are not saved with it (see `save_far_maps`). A cache that was begun with others cannot
    go on.

    Args:
        model: one that `use` takes.
        maps: one for each layer, finite; a file of them; None: none.

    Raises:
        ArgumentError: these are no such maps.
        StorageError: the file cannot be read, or holds something else.
    """
    if maps is None:
        return layer_tensors.put(model, FarMap._fields, None)
    found = load_far_maps(maps) if isinstance(maps, str | Path) else maps
    sizes = sizes_of(text_config(model))
    good = isinstance(found, Sequence) and len(found) == sizes.layers
    expect(good, "maps", f"one for each of {sizes.layers} layers", shown(found))
    for index, each in enumerate(found):
        _check(index, each, sizes)
    return layer_tensors.put(model, FarMap._fields, [each._asdict() for each in found])


def far_map(module: nn.Module) -> FarMap | None:
    """By what an attention layer reads far tokens; None: by its own queries and keys."""
    found = [layer_tensors.get(module, name) for name in FarMap._fields]
    present = [x for x in found if x is not None]
    return FarMap(*present) if present else None


def save_far_maps(path: str | Path, maps: Sequence[FarMap]) -> None:
    """Write one map for each layer to a file, replacing it atomically (safetensors).

    Raises:
        ArgumentError: these are no maps.
        StorageError: the file cannot be written.
    """
    good = isinstance(maps, Sequence) and len(maps) > 0 and all(isinstance(each, FarMap) for each in maps)
    expect(good, "maps", "a FarMap for each layer", shown(maps))
    for index, each in enumerate(maps):
        _check(index, each, None)
    layer_tensors.write(path, KIND, [each._asdict() for each in maps])


def load_far_maps(path: str | Path) -> list[FarMap]:
    """Read what `save_far_maps` wrote; StorageError if it cannot be read or is something else."""
    return [FarMap(**each) for each in layer_tensors.read(path, KIND, FarMap._fields)]


def _check(index: int, each: FarMap, sizes: Sizes | None) -> None:
    """Refuse what is no map, or not one of a layer of these sizes."""
    expect(isinstance(each, FarMap), f"maps[{index}]", "a FarMap", type(each))
    for name, x in each._asdict().items():
        place, axes = f"maps[{index}].{name}", 1 if name == "gain" else 3
        good = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == axes
        expect(good, place, f"a floating-point tensor of {axes} axes", shown(x))
        expect(bool(x.isfinite().all()), place, "finite numbers", "NaN or infinity")
    heads, rows, far_dim = each.query_map.shape
    kv_heads, kv_rows = each.key_map.shape[:2]
    if sizes is not None:
        heads, kv_heads = sizes.query_heads, sizes.kv_heads
        rows, kv_rows = (min(max(x, sizes.head_dim), sizes.head_dim + 1) for x in (rows, kv_rows))
    wanted = {"query_map": (heads, rows, far_dim), "key_map": (kv_heads, kv_rows, far_dim), "gain": (heads,)}
    for name, shape in wanted.items():
        found = tuple(getattr(each, name).shape)
        expect(found == shape, f"maps[{index}].{name}", f"shape {shape}", found)


def same_keys(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two layers subtract the same, or make the same far keys."""
    if one is None or other is None:
        return one is other
    return one is other or (one.device == other.device and torch.equal(one, other))

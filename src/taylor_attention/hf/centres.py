"""One vector per key/value head that is subtracted from its keys: to softmax nothing, to a series where its scores are.

All scores of a query change by the same number, which softmax does not see. A truncated series about zero does: it is
near exp only where scores are small, and keys of pretrained heads often share a large offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import expect, shown
from . import layer_tensors
from .models import sizes_of, text_config

KIND = "key-centres"
NAME = "key_centre"


def set_key_centres(model: PreTrainedModel, centres: Sequence[Tensor] | str | Path | None) -> None:
    """Let each attention layer of a model subtract a vector per key/value head from its keys, after their rotation.

    They move with the model, but are not saved with it (see `save_key_centres`). A cache that was begun with others
    cannot go on.

    Args:
        model: one that `use` takes.
        centres: a floating-point tensor [kv_heads, head_dim] for each layer, finite; a file of them; None: none.

    Raises:
        ArgumentError: these are no such tensors.
        StorageError: the file cannot be read, or holds something else.
    """
    if centres is None:
        return layer_tensors.put(model, [NAME], None)
    found = load_key_centres(centres) if isinstance(centres, str | Path) else centres
    sizes = sizes_of(text_config(model))
    good = isinstance(found, Sequence) and len(found) == sizes.layers
    expect(good, "centres", f"a tensor for each of {sizes.layers} layers", shown(found))
    for index, centre in enumerate(found):
        _check_centre(index, centre, (sizes.kv_heads, sizes.head_dim))
    return layer_tensors.put(model, [NAME], [{NAME: centre} for centre in found])


def key_centre(module: nn.Module) -> Tensor | None:
    """What an attention layer subtracts from its keys, [kv_heads, head_dim]; None: nothing."""
    return layer_tensors.get(module, NAME)


def save_key_centres(path: str | Path, centres: Sequence[Tensor]) -> None:
    """Write one tensor [kv_heads, head_dim] for each layer to a file, replacing it atomically (safetensors).

    Raises:
        ArgumentError: these are no such tensors.
        StorageError: the file cannot be written.
    """
    good = isinstance(centres, Sequence) and len(centres) > 0 and isinstance(centres[0], Tensor)
    expect(good, "centres", "a tensor for each layer", shown(centres))
    for index, centre in enumerate(centres):
        _check_centre(index, centre, tuple(centres[0].shape))
    layer_tensors.write(path, KIND, [{NAME: centre} for centre in centres])


def load_key_centres(path: str | Path) -> list[Tensor]:
    """Read what `save_key_centres` wrote; StorageError if it cannot be read or is something else."""
    return [each[NAME] for each in layer_tensors.read(path, KIND, [NAME])]


def _check_centre(index: int, centre: Tensor, shape: tuple[int, ...]) -> None:
    good = isinstance(centre, Tensor) and centre.is_floating_point() and tuple(centre.shape) == shape
    expect(good and len(shape) == 2, f"centres[{index}]", f"a floating-point tensor {list(shape)}", shown(centre))
    expect(bool(centre.isfinite().all()), f"centres[{index}]", "finite numbers", "NaN or infinity")

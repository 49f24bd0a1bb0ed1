"""What distillation leaves: settings, key centres and far maps, in a folder; how a model does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import expect
from .centres import load_key_centres, save_key_centres, set_key_centres
from .far_maps import FarMap, load_far_maps, save_far_maps, set_far_maps
from .models import Model, sizes_of, text_config, use
from .profiling.effect import next_token_loss, widest
from .settings import HeadSettings, ModelSettings

_FILES = {"settings": "settings.json", "centres": "centres.safetensors", "maps": "far_maps.safetensors"}


@dataclass(frozen=True)
class Distilled:
    """What was learned: settings with a far part of learned maps, a key centre and maps for each layer."""

    settings: ModelSettings
    centres: list[Tensor]
    maps: list[FarMap]

    def save(self, folder: str | Path) -> None:
        """Write one file of each to a folder, which is made; StorageError if they cannot be written."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.settings.save(Path(folder) / _FILES["settings"])
        save_key_centres(Path(folder) / _FILES["centres"], self.centres)
        save_far_maps(Path(folder) / _FILES["maps"], self.maps)

    @classmethod
    def load(cls, folder: str | Path) -> Distilled:
        """Read what `save` wrote; StorageError if that is not there."""
        paths = {name: Path(folder) / file for name, file in _FILES.items()}
        return cls(
            ModelSettings.load(paths["settings"]), load_key_centres(paths["centres"]), load_far_maps(paths["maps"])
        )

    def use(self, model: Model) -> Model:
        """Let a model attend by them (see `use`, `set_key_centres` and `set_far_maps`)."""
        use(model, self.settings)
        set_key_centres(model, self.centres)
        set_far_maps(model, self.maps)
        return model


def with_far_maps(settings: ModelSettings, degree: int, far_dim: int) -> ModelSettings:
    """The same settings with a far part of learned maps in every head that is not softmax.

    Raises:
        ArgumentError: some heads keep heavy tokens, which are not learned beside, or neither a window nor sinks.
    """

    def one(head: HeadSettings) -> HeadSettings:
        if head.is_softmax:
            return head
        expect(head.heavy == 0, "settings", "heads without heavy tokens", f"{head.heavy} of them")
        return replace(head, degree=degree, reading="taylor", far_dim=far_dim)

    heads = {place: one(head) for place, head in settings.heads.items()}
    return ModelSettings(one(settings.default), heads)


def windows_alone(settings: ModelSettings, model: Any, tokens: int) -> HeadSettings:
    """Sinks and one window for all heads, of as many bytes as these settings take after so many tokens."""
    sizes = sizes_of(text_config(model))
    budget = settings.nbytes(tokens, sizes.layers, sizes.kv_heads, sizes.head_dim, dtype=model.dtype)
    each = budget // (sizes.layers * sizes.kv_heads)
    plain = HeadSettings(0, settings.default.sinks, 0, None)
    found = widest(plain, each, sizes.head_dim, sizes.head_dim, model.dtype)
    expect(found is not None and bool(found.window), "settings", "bytes enough for a window", f"{each} a head")
    assert found is not None  # or it was refused
    return found


def measure_learned(model: Any, learned: Distilled, pieces: Sequence[Tensor]) -> dict[str, Any]:
    """Next-token losses on texts that were not learned from, of their later halves, in nats per token.

    Returns:
        {"softmax", "learned", "windows": losses, "bytes": of one sequence with what was learned, "window": of
        `windows_alone`, whose loss stands beside it}.
    """
    tokens = max(map(len, pieces))
    plain, sizes = windows_alone(learned.settings, model, tokens), sizes_of(text_config(model))
    losses = {"softmax": next_token_loss(model, pieces, None), "windows": next_token_loss(model, pieces, plain)}
    set_key_centres(model, learned.centres)
    set_far_maps(model, learned.maps)
    try:
        losses["learned"] = next_token_loss(model, pieces, learned.settings)
    finally:
        set_key_centres(model, None)
        set_far_maps(model, None)
    nbytes = learned.settings.nbytes(tokens, sizes.layers, sizes.kv_heads, sizes.head_dim, dtype=model.dtype)
    return {**losses, "bytes": nbytes, "window": plain.window}

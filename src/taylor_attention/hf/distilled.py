"""What distillation leaves: settings, key centres and far maps, in a folder; how a model does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from .centres import load_key_centres, save_key_centres, set_key_centres
from .far_maps import FarMap, load_far_maps, save_far_maps, set_far_maps
from .models import Model, sizes_of, text_config, use
from .profiling.effect import divergence, log_shares, next_token_loss, using, widest
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
    """What is left of softmax on texts that were not learned from, in their later halves, in nats per token.

    Returns:
        {"softmax", "learned", "windows": next-token losses, "divergence": {"learned", "windows"}: from softmax's
        next-token distributions, at 512 positions of each text, "bytes": of one sequence with what was learned,
        "window": of `windows_alone`, which is measured beside it}.
    """
    tokens = max(map(len, pieces))
    plain, sizes = windows_alone(learned.settings, model, tokens), sizes_of(text_config(model))
    losses, divergences = {"softmax": next_token_loss(model, pieces, None)}, {}
    for name, settings in (("windows", ModelSettings(plain)), ("learned", learned.settings)):
        with _having(model, learned if name == "learned" else None):
            losses[name] = next_token_loss(model, pieces, settings)
            divergences[name] = sum(_divergence(model, piece, settings) for piece in pieces) / len(pieces)
    nbytes = learned.settings.nbytes(tokens, sizes.layers, sizes.kv_heads, sizes.head_dim, dtype=model.dtype)
    return {**losses, "divergence": divergences, "bytes": nbytes, "window": plain.window}


@contextmanager
def _having(model: Any, learned: Distilled | None) -> Iterator[None]:
    """Let a model, which has none of its own, have these key centres and maps inside the block."""
    set_key_centres(model, None if learned is None else learned.centres)
    set_far_maps(model, None if learned is None else learned.maps)
    try:
        yield
    finally:
        set_key_centres(model, None)
        set_far_maps(model, None)


@torch.no_grad()
def _divergence(model: Any, piece: Tensor, settings: ModelSettings) -> float:
    """From softmax, in the later half of a text."""
    positions = torch.linspace(len(piece) // 2, len(piece) - 1, min(512, len(piece) // 2)).long()
    found = []
    for each in (None, settings):
        with using(model, each):
            found.append(log_shares(model, piece, positions))
    return float(divergence(*found))

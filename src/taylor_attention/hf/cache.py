"""A cache for models of transformers whose layers hold states of fixed size (see `layer` for how it is used)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import expect
from .layer import TaylorLayer
from .models import NAME, check_settings, settings_of, sizes_of, text_config
from .saving import Kept, read_memories, write_memories


class TaylorCache(Cache):
    """A cache whose bytes do not grow with the context: pass it as `past_key_values` to a model or to its `generate`.

    Heads with window=None are the exception: they keep all keys and values, as softmax must.

    Args:
        model: one with attn_implementation="taylor", or its configuration.

    Raises:
        ArgumentError: the model attends otherwise, or has layers of another kind (sliding windows, recurrences).
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig) -> None:
        config = text_config(model)
        name = config._attn_implementation
        expect(name == NAME, "model", f'attn_implementation="{NAME}" (see taylor_attention.hf.use)', f'"{name}"')
        kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
        others = ", ".join(sorted(kind.__name__ for kind in kinds))
        expect(not kinds, "model", "full attention in all layers", f"layers that need {others}")
        self.settings = settings_of(config)
        check_settings(self.settings, config)
        self._config = config
        super().__init__(layers=[TaylorLayer(self.settings, index) for index in range(config.num_hidden_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce a layer's new tokens (see `TaylorLayer.update`).

        Raises:
            ArgumentError: the last call of the model did not end well, and some layers have seen more than others.
        """
        if layer_idx == 0:
            self._check_ready()
        return self._layers[layer_idx].update(key_states, value_states)

    def _check_ready(self) -> None:
        name = self._config._attn_implementation
        expect(name == NAME, "past_key_values", f'None in a model with attn_implementation="{name}"', "a TaylorCache")
        first, *others = self._layers
        if first.seen and not any(layer.is_waiting for layer in others):
            first.is_waiting = False  # the last call failed before anything was kept
        self._check_whole()

    def _check_whole(self) -> None:
        first = self._layers[0]
        if any(layer.is_waiting or not layer.is_whole or layer.seen != first.seen for layer in self._layers):
            reached = ", ".join(str(layer.seen) for layer in self._layers)
            expected = (
                "a model that passes the keys of its cache on as they are, and whose last call ended well "
                "(reset() starts anew)"
            )
            expect(False, "past_key_values", expected, f"layers that attended to {reached} tokens")

    @property
    def _layers(self) -> list[TaylorLayer]:
        return cast(list[TaylorLayer], self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the same after any number of tokens, but for softmax heads."""
        return sum(layer.nbytes for layer in self._layers)

    def clone(self) -> TaylorCache:
        """An independent copy: a fork of the sequences."""
        copied = copy.copy(self)  # the model's configuration stays the model's
        copied.layers = [copy.deepcopy(layer) for layer in self.layers]
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TaylorCache:
        """As `clone`."""
        return self.clone()

    def activate_past_recording(self) -> None:
        """Refused: assisted decoding takes back tokens, which states cannot do."""
        expect(False, "past_key_values", "a cache that can take back tokens, for assisted decoding", "a TaylorCache")

    def save(self, path: str | Path) -> None:
        """Write what all layers keep, and the settings, to a file, replacing it atomically (safetensors).

        Raises:
            ArgumentError: the last call of the model did not end well.
            StorageError: the file cannot be written.
        """
        self._check_whole()
        kept = [Kept(layer.seen, layer.memories or [], layer.centre, layer.key_map) for layer in self._layers]
        write_memories(path, self.settings, kept)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> TaylorCache:
        """Read what `save` wrote, to go on with the same model: onto its device.

        Raises:
            ArgumentError: `model` cannot have such a cache.
            StorageError: the file is missing, damaged or of another kind, or of a model of other settings or shape.
        """
        cache = cls(model)
        sizes, device = sizes_of(text_config(model)), getattr(model, "device", None)
        for layer, kept in zip(cache._layers, read_memories(path, cache.settings, sizes), strict=True):
            layer.restore(kept.to(device), sizes.kv_heads)
        return cache

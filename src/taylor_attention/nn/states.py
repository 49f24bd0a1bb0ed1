"""The states of a model's layers under one set of names, as a file holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import expect
from .transformer import LanguageModel


def pack_states(states: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and texts of the states, one per layer: the input of `unpack_states`."""
    tensors: dict[str, Tensor] = {}
    metadata = {}
    for layer, state in enumerate(states):
        tensors |= {f"{layer}.{name}": tensor for name, tensor in state.tensors().items()}
        metadata[f"{layer}"] = json.dumps(state.metadata())
    return tensors, metadata


def unpack_states(model: LanguageModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Any]:
    """The states of this model that `pack_states` wrote; other names are passed over.

    Raises:
        StorageError: they are no states.
        ArgumentError: they are those of another model, or do not hold the same number of tokens in every layer.
        KeyError: a layer is missing.
    """
    layers = [_own(f"{layer}.", tensors, metadata[f"{layer}"]) for layer in range(len(model.blocks))]
    states = model.states_from_tensors(layers)
    at = [state.tokens.tolist() for state in states]
    expect(at == at[:1] * len(at), "states", "one text, at one place in all layers", at)
    return states


def _own(prefix: str, tensors: Mapping[str, Tensor], metadata: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What one layer's state wrote."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return own, json.loads(metadata)

"""The cache of our language model in transformers: the states of its layers, whose size stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError, expect, first_line
from ..nn import LanguageModel
from ..nn.checkpoint import fingerprint
from ..nn.states import pack_states, unpack_states

KIND = "model-states"


class LanguageModelCache(Cache):
    """What a `TaylorForCausalLM` remembers of a batch of sequences; pass it as `past_key_values`.

    Attributes:
        states: one per layer, of the model's own kind; None before the first token.
        length: slots read, padding included: what transformers counts masks and inputs by.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Any] | None = None
        self.length = 0

    def read(self, model: LanguageModel, tokens: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Append tokens int64 [B, T]; their logits [B, T, vocab_size]. Gradients flow where they are recorded."""
        states = model.new_states(len(tokens)) if self.states is None else self.states
        if torch.is_grad_enabled():
            logits, states = model(tokens, states=states, return_states=True, key_padding_mask=key_padding_mask)
        else:
            logits = model.decode_(tokens, states, key_padding_mask=key_padding_mask)
        self.states, self.length = states, self.length + tokens.shape[1]
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes of all states: constant for Taylor attention, growing for softmax."""
        return sum(state.nbytes for state in self.states or ())

    def clone(self) -> LanguageModelCache:
        """An independent copy."""
        return copy.deepcopy(self)

    def save(self, path: str | Path, model: Any) -> None:
        """Write the states to a file, replacing it atomically.

        Args:
            path: the file.
            model: the `TaylorForCausalLM` that made them; `load` asks for the same weights.

        Raises:
            ArgumentError: nothing has been read yet.
            StorageError: the file cannot be written, or the cache holds what `load` would refuse, as NaN; what stood
                there before still stands.
        """
        expect(self.states is not None, "cache", "states, after at least one token", "none yet")
        tensors, metadata = pack_states(self.states or [])
        inner = _language_model(model)
        mark = fingerprint(inner)
        metadata |= {"model": mark, "length": str(self.length)}
        self._restore(path, inner, mark, tensors, metadata)  # refuses what could not be read again
        write_tensors(path, tensors, kind=KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> LanguageModelCache:
        """What `save` wrote, on the model's device; generation goes on exactly where it stopped.

        Raises:
            StorageError: the file is missing, damaged or of another kind, or another model made it.
        """
        inner = _language_model(model)
        return cls._restore(path, inner, fingerprint(inner), *read_tensors(path, kind=KIND))

    @classmethod
    def _restore(
        cls, path: str | Path, model: LanguageModel, mark: str, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> LanguageModelCache:
        """The cache of the model of this fingerprint that the tensors and the text describe, or StorageError."""
        cache = cls()
        try:
            expect(metadata["model"] == mark, "model", "the one that made the states", "another")
            cache.length = int(metadata["length"])
            cache.states = unpack_states(model, tensors, metadata)
            longest = max(cache.states[0].tokens.tolist(), default=0)
            expect(cache.length >= longest, "length", f"at least the {longest} tokens that are held", cache.length)
        except KeyError as error:
            raise StorageError(f"{path}: no whole cache: it lacks {error}") from error
        except (StorageError, ValueError) as error:
            raise StorageError(f"{path}: no states to go on with: {first_line(error)}") from error
        cache.states = [state.to(model.embedding.weight.device) for state in cache.states]
        return cache

    # ---- what transformers asks of a cache

    def __len__(self) -> int:
        return len(self.states or ())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, length={self.length}, nbytes={self.nbytes})"

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.states is not None

    @property
    def is_croppable(self) -> bool:
        """No: a state cannot give back the sequence without its last tokens."""
        return False

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first token."""
        return -1 if self.states is None else int(self.states[0].batch_size)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots read, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No end: -1."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Slots that a mask over past and new tokens has, and where it begins."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences at `beam_idx` in that order."""
        self.batch_select_indices(beam_idx.long())  # beam search counts in int32

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence so many times, one after the other."""
        if self.states is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices` int64 [N]."""
        if self.states is not None:
            self.states = [state.select(indices) for state in self.states]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens; 0 of them are none."""
        expect(tokens_to_remove == 0, "tokens_to_remove", "0, as states keep no single tokens", tokens_to_remove)

    def update(self, *_: Any, **__: Any) -> Any:
        """Refuse keys and values, which another architecture would hand over."""
        expect(False, "past_key_values", "the cache of another architecture than TaylorForCausalLM", type(self))


def _language_model(model: Any) -> LanguageModel:
    inner = getattr(model, "model", None)
    expect(isinstance(inner, LanguageModel), "model", "a TaylorForCausalLM", type(model))
    assert isinstance(inner, LanguageModel)
    return inner

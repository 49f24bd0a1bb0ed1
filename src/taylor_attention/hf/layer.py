"""What one layer of a model of transformers keeps of the tokens so far, and how the attention function comes by it.

An attention function gets no cache: a model calls `update` with its new keys and values and passes what that returns to
the attention function. `update` returns the new keys and values alone; the keys' tensor has one attribute more, the
cache layer, and the attention function lets that layer attend. A layer knows whether its latest tokens have been
attended to, so a model that does something else with the keys in between is refused at its next call, before it could
compute with a part of the past. A call that fails before anything was kept leaves the cache as it was; one that fails
later leaves layers that have seen different tokens, and the next call is refused (see `cache`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import expect
from .far_maps import same_keys
from .heads import Inputs, Memory, Plan
from .saving import Kept
from .settings import ModelSettings

_TAG = "taylor_attention_layer"
_PAST = "taylor_attention_past"


def layer_of(key: Tensor) -> TaylorLayer | None:
    """The cache layer that returned this tensor of keys; None if none did."""
    return getattr(key, _TAG, None)


def tell_past(mask: Tensor, counts: Tensor) -> None:
    """Let a mask of new tokens tell how many of the earlier ones of each sequence its caller takes for visible."""
    setattr(mask, _PAST, counts)


class TaylorLayer(CacheLayerMixin):
    """What one layer keeps of the tokens so far.

    Attributes:
        settings: of the model.
        index: of the layer.
        centre: what is subtracted from its keys (see `centres`), None: nothing.
        key_map: what makes its far keys (see `far_maps`), None: nothing does.
        memories: a `State`, or a `KeyValueCache` for softmax heads, for each group of heads; None before any token.
        seen: tokens so far, hidden ones too.
        is_waiting: whether `update` got tokens that have not been attended to yet.
        is_padded: whether some tokens may have been hidden.
        is_whole: whether no attempt to attend to them has failed halfway.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False  # the scale of the scores is known when they are first computed

    def __init__(self, settings: ModelSettings, index: int) -> None:
        super().__init__()
        self.settings, self.index = settings, index
        self.plan: Plan | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.centre: Tensor | None = None
        self.key_map: Tensor | None = None
        self.memories: list[Memory] | None = None
        self.seen = 0
        self.is_initialized = False
        self.is_waiting = False
        self.is_whole = True
        self.is_padded = False

    def restore(self, kept: Kept, kv_heads: int) -> None:
        """Go on from what another layer kept."""
        self.reset()
        if kept.seen:
            self.plan, self.is_initialized = Plan(self.settings, self.index, kv_heads), True
            self.seen, self.memories, self.centre, self.key_map = kept
            self.is_padded = True  # it may be

    def keep_keys(self, centre: Tensor | None, key_map: Tensor | None) -> None:
        """Take over what keys are made with; ArgumentError if it was something else for earlier tokens."""
        if self.memories is None:
            self.centre, self.key_map = centre, key_map
        for name, mine, now in (("key centres", self.centre, centre), ("far maps", self.key_map, key_map)):
            if not same_keys(mine, now):
                expect(False, "past_key_values", f"a cache begun with the model's {name}", f"others in {self.index}")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Plan for as many heads as these keys [B, Hkv, n, d] have."""
        self.plan = Plan(self.settings, self.index, key_states.shape[1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Announce new tokens; they are kept when the attention function attends with the keys that this returns.

        Raises:
            ArgumentError: those announced before have not been attended to.
        """
        expect(not self.is_waiting, "update", "tokens to be attended to before others come", f"layer {self.index}")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_waiting = True
        tagged = key_states.view_as(key_states)  # one of its own: the model's would keep this layer alive
        setattr(tagged, _TAG, self)
        return tagged, value_states

    def attend(self, inputs: Inputs) -> Tensor:
        """Attend to what came before and the announced tokens, which are kept; y [B, Hq, n, d_V]."""
        expect(self.is_waiting, "key", "keys that are attended to once", f"those of layer {self.index} again")
        expect(inputs.causal, "past_key_values", "None in a layer that is not causal", "a TaylorCache")
        assert self.plan is not None  # `update` came before
        self._check_past(inputs.visible)
        self.is_padded |= inputs.visible is not None
        self.is_waiting = self.is_whole = False
        y, self.memories = self.plan.attend_after(inputs, self.memories)
        self.seen += inputs.key.shape[2]
        self.is_whole = True
        return y

    def _check_past(self, mask: Tensor | None) -> None:
        """Refuse a mask by which other tokens of the past are hidden than when they came: they cannot change."""
        if self.memories is None or self.index or not (self.is_padded or mask is not None):
            return
        kept = self.memories[0].tokens
        told = torch.full_like(kept, self.seen) if mask is None else getattr(mask, _PAST, kept)
        expected = f"{kept.tolist()} visible tokens in the past, which stays as it was"
        expect(torch.equal(told, kept), "attention_mask", expected, str(told.tolist()))

    def get_seq_length(self) -> int:
        """Tokens so far, hidden ones too."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask is made for, and how many came before them: the new ones alone."""
        return query_length, self.seen

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before any token."""
        return -1 if self.memories is None else self.memories[0].batch_size

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(memory.nbytes for memory in self.memories or [])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens: all of them, or none.

        Raises:
            ArgumentError: some, as sums of moments do not tell which of them were whose.
        """
        if tokens_to_remove == -self.seen:
            self.reset()
        else:
            expect(tokens_to_remove == 0, "crop", f"0 or {-self.seen}: states cannot forget a part", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence beam_idx[i] is."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, int64 [N] or bool [B]."""
        if self.memories is not None:
            chosen = torch.arange(self.batch_size, device=indices.device)[indices]
            self.memories = [memory.select(chosen) for memory in self.memories]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.memories is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: states are small and stay where they are."""
        expect(False, "offloading", "False with a TaylorCache", True)

    def prefetch(self) -> None:
        """Refused, as `offload`."""
        self.offload()

    def __deepcopy__(self, memo: dict[int, Any]) -> TaylorLayer:
        """An independent copy, whatever gradients flow through this one."""
        copied = copy.copy(self)
        copied.memories = None if self.memories is None else [memory.clone() for memory in self.memories]
        return copied

"""The attention function and the mask function that models of transformers call under the name "taylor".

A model hands its attention function queries, keys and values, but no cache. So the keys carry it: `TaylorCache.update`
returns the new keys as a tensor that knows its cache layer (see `layer`), and the attention function asks that layer.
Keys that know none are all there are: in training, for an encoder, or from a cache that keeps all keys.

What this attention cannot do is refused, since ignoring it would give other numbers without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..errors import BackendWarning, expect, shown
from .centres import key_centre
from .far_maps import far_map
from .heads import Inputs, Plan
from .layer import layer_of, tell_past
from .models import ATTRIBUTE, NAME, check_settings, read_settings

# Keyword arguments that models pass on, which change nothing in attention. Others must be None or False.
_HARMLESS = {
    "is_causal",  # read below
    "position_ids",  # queries and keys have been rotated
    "position_embeddings",
    "cache_position",
    "use_cache",
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",
    "logits_to_keep",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}
_PLAN = "_taylor_attention_plan"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, n, d], key [B, Hkv, S, d], value [B, Hkv, S, d_V] to y [B, n, Hq, d_V].

    attention_mask: what `visible_keys` returned, bool [B, S] or None.

    Raises:
        ArgumentError: the model asks for what this attention does not do.
    """
    _refuse_others(dropout, others)
    causal = _is_causal(module, others.get("is_causal"))
    _check_mask(attention_mask, key)
    layer = layer_of(key)
    if key.dtype != value.dtype:  # autocast leaves normalised queries and keys in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    centre = key_centre(module)
    maps = far_map(module)
    if layer is not None:
        layer.keep_keys(centre, None if maps is None else maps.key_map)
    if centre is not None:
        key = key - centre[:, None].to(key.dtype)  # [B, Hkv, S, d]
    inputs = Inputs(query, key, value, attention_mask, key.shape[-1] ** -0.5 if scaling is None else scaling, causal)
    if maps is not None:
        far_query, far_key = maps.far_query(query), maps.far_key(key)
        inputs = inputs._replace(far_query=far_query, far_key=far_key, far_gain=maps.gain)
    if layer is not None:
        y = layer.attend(inputs)
    else:
        if causal and key.shape[2] > query.shape[2]:
            _warn_slow()
        y = plan_of(module, key.shape[1]).attend(inputs)
    return y.transpose(1, 2).contiguous(), None  # [B, n, Hq, d_V]; there are no weights to show


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask function: which of the keys given to the attention function count, bool [B, kv_length]; None: all.

    Of a mask with padding, what it says of tokens that a `TaylorCache` keeps goes along, and is compared.

    Raises:
        ArgumentError: attention is not plainly causal or to all keys, or the mask is not of all tokens so far.
    """
    expect(local_size is None, "model", "full attention in all layers", f"a sliding window or chunks of {local_size}")
    causal = mask_function is causal_mask_function
    expect(
        causal or mask_function is bidirectional_mask_function,
        "mask",
        "plain causal or bidirectional attention, no packed sequences, blocks or mask functions of one's own",
        getattr(mask_function, "__qualname__", type(mask_function).__name__),
    )
    seen, keys = int(q_offset) + q_length, kv_offset + kv_length
    if causal:
        expect(seen == keys, "past_key_values", f"keys up to the newest query ({seen}), no static cache", keys)
    if attention_mask is None:
        return None
    expect(attention_mask.ndim == 2, "attention_mask", "[B, T]", f"shape {tuple(attention_mask.shape)}")
    expect(
        attention_mask.shape == (batch_size, keys),
        "attention_mask",
        f"shape {(batch_size, keys)}, all tokens so far",
        tuple(attention_mask.shape),
    )
    shown = attention_mask.bool()
    if bool(shown.all()):
        return None
    visible = shown[:, kv_offset:]
    tell_past(visible, shown[:, :kv_offset].sum(-1))
    return visible


def register() -> None:
    """Make both known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible_keys)


def plan_of(module: nn.Module, kv_heads: int) -> Plan:
    """How the heads of an attention layer are computed; remembered on the layer for as long as the settings stay."""
    config = getattr(module, "config", None)
    source = getattr(config, ATTRIBUTE, None)
    known = module.__dict__.get(_PLAN)
    if known is not None and known[0] is source and known[1].kv_heads == kv_heads:
        return known[1]
    settings, index = read_settings(config), getattr(module, "layer_idx", None)
    expect(
        index is not None or not settings.heads,
        "settings",
        "no exceptions by layer in a model that numbers none",
        index,
    )
    if settings.heads:
        check_settings(settings, cast(PreTrainedConfig, config))
    plan = Plan(settings, index or 0, kv_heads)
    module.__dict__[_PLAN] = (source, plan)
    return plan


def _refuse_others(dropout: float, others: dict[str, Any]) -> None:
    message = "0, as weights that are never formed cannot be dropped (set it in the configuration, or model.eval())"
    expect(not dropout, "attention dropout", message, dropout)
    for name, value in others.items():
        if name not in _HARMLESS and value is not None and value is not False:
            expect(False, name, "None, as this attention has no such thing", shown(value))


def _is_causal(module: nn.Module, told: bool | None) -> bool:
    if told is None:
        told = getattr(module, "is_causal", True) and getattr(getattr(module, "config", None), "is_causal", True)
    return bool(told)


def _check_mask(mask: Tensor | None, key: Tensor) -> None:
    if mask is None:
        return
    wanted = (key.shape[0], key.shape[2])
    good = isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == wanted
    expect(
        good, "attention_mask", f"a mask [B, T] that hides padding, no mask of queries by keys ({wanted})", shown(mask)
    )


def _warn_slow() -> None:
    warnings.warn(
        "the cache keeps all keys, and each token reads them all: for constant memory and time per token pass "
        "past_key_values=taylor_attention.hf.TaylorCache(model)",
        BackendWarning,
        stacklevel=3,
    )

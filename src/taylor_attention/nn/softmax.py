"""Softmax attention with key decay over SDPA: what the Taylor series approximates, made as fast as PyTorch allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cumulative_decay: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax of q.k * scale + L_i - L_j over the visible keys, applied to the values.

    Args:
        query: [B, Hq, n, d]; if causal, the queries belong to the last n of the S keys.
        key: [B, Hkv, S, d], Hq a multiple of Hkv.
        value: [B, Hkv, S, d_V].
        scale: multiplies the scores; positive.
        causal: whether a query sees only keys up to its own.
        cumulative_decay: L [B, Hkv, S], the running sum of the log decays; L_i cancels in the softmax.
        key_padding_mask: bool [B, S], True = attend.

    Returns:
        [B, Hq, n, d_V]; zeros where a query sees no key.
    """
    if cumulative_decay is None:
        bias = None
    else:  # relative to the newest key, so that the keys that matter are the exact ones
        bias = (cumulative_decay[..., -1:] - cumulative_decay).to(torch.promote_types(query.dtype, torch.float32))
    if causal and query.shape[2] == 1:
        return _attend_one(query, key, value, scale, bias, key_padding_mask)
    return _attend_block(query, key, value, scale, causal, bias, key_padding_mask)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor:
    """One new token: every key is visible. The query heads of a group become query rows, so the cache is read once."""
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None]  # [B, 1, 1, S]
    if bias is not None:
        additive = bias[:, :, None]  # [B, Hkv, 1, S]
        mask = additive if mask is None else additive.masked_fill(~mask, float("-inf"))
    rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # [B, Hkv, G, d]
    y = _sdpa(rows, key, value, bias is not None, attn_mask=mask, scale=scale)  # [B, Hkv, G, d_V]
    return y.reshape(*query.shape[:3], value.shape[-1])


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Many queries. The bias rides as one more column of the keys (times 1 in the queries): no [n, S] float mask."""
    if bias is not None:
        query = functional.pad(query, (0, 1), value=1.0).to(bias.dtype)  # [B, Hq, n, d + 1]
        key = torch.cat([key.to(bias.dtype), bias[..., None] / scale], dim=-1)  # [B, Hkv, S, d + 1]
    width = max(query.shape[-1], value.shape[-1])  # SDPA has a fast path only where d = d_V
    y = _sdpa(
        functional.pad(query, (0, width - query.shape[-1])),
        functional.pad(key, (0, width - key.shape[-1])),
        functional.pad(value, (0, width - value.shape[-1])),
        bias is not None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **_visibility(query.shape[2], key.shape[2], causal, key_padding_mask, query.device),
    )
    return y[..., : value.shape[-1]].to(value.dtype)


def _visibility(
    queries: int, keys: int, causal: bool, key_padding_mask: Tensor | None, device: torch.device
) -> dict[str, object]:
    """SDPA's arguments for who sees whom: its causal flag where that is all, else a mask [B or 1, 1, n, S]."""
    if causal and queries == keys and key_padding_mask is None:
        return {"is_causal": True}
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None]  # [B, 1, 1, S]
    if causal:
        lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        mask = lower[None, None] if mask is None else mask & lower
    return {"attn_mask": mask}


def _sdpa(query: Tensor, key: Tensor, value: Tensor, precise: bool, **arguments: object) -> Tensor:
    """SDPA; `precise` keeps autocast from rounding a decay column (or mask) that reaches hundreds to bfloat16."""
    if not precise:
        return functional.scaled_dot_product_attention(query, key, value, **arguments)  # type: ignore[arg-type]
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        y = functional.scaled_dot_product_attention(
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
            **arguments,  # type: ignore[arg-type]
        )
    return y.to(value.dtype)

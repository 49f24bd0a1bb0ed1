"""Generation: read a prompt of any length in blocks, then one byte after another, each at the same cost.

Nothing here grows with the text: a Taylor model's states have a fixed size, and only the last token's logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from ..errors import expect, expect_int, is_number, shown
from ..nn import LanguageModel
from ..nn.transformer import expect_model
from ..ops.validation import expect_tensor

BLOCK = 512
"""Tokens read at a time: enough for GEMMs at full speed, few enough that memory stays small."""


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Refuse sampling settings that mean nothing, before any work is done.

    Raises:
        ArgumentError: temperature < 0 or not finite, top_k < 1, or top_p outside (0, 1].
    """
    warm = is_number(temperature) and temperature >= 0
    expect(warm, "temperature", "a number >= 0 (0 takes the likeliest)", shown(temperature))
    if top_k is not None:
        expect_int("top_k", top_k, 1)
    share = top_p is None or (is_number(top_p) and 0 < top_p <= 1)
    expect(share, "top_p", "a number above 0 and at most 1", shown(top_p))


def distribution(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities of the next token, [B, V] -> [B, V], in float32 (float64 for float64 logits).

    Args:
        logits: floating [B, V], all finite.
        temperature: divides the logits; 0 puts everything on the likeliest token (the first one among equals).
        top_k: only the k likeliest tokens keep a probability; exactly k, whatever the ties.
        top_p: only the smallest set of likeliest tokens whose probabilities reach top_p; never empty.

    Raises:
        ArgumentError: a setting that means nothing, or logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    expect_tensor("logits", logits, 2, "[B, V]")
    good = logits.is_floating_point() and logits.shape[1] >= 1 and not logits.is_meta
    expect(good, "logits", "floating-point numbers [B, V]", logits)
    expect(bool(logits.isfinite().all()), "logits", "finite numbers", "NaN or infinity: the model has failed")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Subtracting the maximum first keeps a tiny temperature from overflowing; one that rounds to 0 must not divide.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is None and top_p in (None, 1):
        return logits.softmax(-1)
    # A stable order makes the choice among equal logits the same everywhere.
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    weights, order = ranked[..., :top_k].softmax(-1), order[..., :top_k]
    if top_p is not None and top_p < 1:
        likelier = weights.cumsum(-1) - weights
        weights = weights.masked_fill((likelier >= top_p) & (likelier > 0), 0.0)
        weights /= weights.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, order, weights)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token of each sequence from `distribution`: logits [B, V] -> tokens int64 [B].

    At temperature 0 nothing is drawn: the likeliest token is taken and the generator does not move.
    """
    drawing = generator is None or isinstance(generator, torch.Generator)
    expect(drawing, "generator", "a torch.Generator or None", type(generator))
    weights = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return weights.argmax(-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def prefill(model: LanguageModel, states: list[Any], tokens: Tensor, *, block: int = BLOCK) -> Tensor:
    """Read tokens into the states, in place and block by block; the logits after the last one, [B, T] -> [B, V].

    Raises:
        ArgumentError: there is no token to read, or the block is not positive.
    """
    expect_model(model)
    expect_tensor("tokens", tokens, 2, "[B, T]")
    expect(tokens.shape[1] >= 1, "tokens", "at least one token, [B, T]", tuple(tokens.shape))
    expect(tokens.dtype in (torch.uint8, torch.int64), "tokens", "dtype torch.uint8 or torch.int64", tokens.dtype)
    expect_int("block", block, 1)
    for part in tokens.split(block, dim=1):
        logits = model.decode_(part.long(), states)  # [B, block, V]
    return logits[:, -1].clone()  # a view would keep the whole block alive


@torch.no_grad()
def advance(
    model: LanguageModel,
    states: list[Any],
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> tuple[Tensor, Tensor]:
    """One step: draw a token from the pending logits and append it to the states, in place.

    Returns:
        The tokens, int64 [B], and the logits after them, [B, V].
    """
    expect_model(model)
    token = sample(logits, generator=generator, **sampling)
    return token, model.decode_(token[:, None], states)[:, -1]


def stream(
    model: LanguageModel,
    states: list[Any],
    logits: Tensor,
    *,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Tokens one after another, int64 [B] each, at constant cost; the states change in place.

    Args:
        model: the language model.
        states: what it has read so far, as left by `prefill`.
        logits: the pending logits [B, V], as returned by `prefill`.
        tokens: how many; without it, no end.
        generator: where the draws come from; equal seeds give equal texts.
        sampling: `temperature`, `top_k` and `top_p` of `sample`.

    Raises:
        ArgumentError: at once, if one of these is none.
    """
    expect_model(model)
    if tokens is not None:
        expect_int("tokens", tokens, 0)
    check_sampling(**sampling)
    return _stream(model, states, logits, tokens, generator, sampling)


def _stream(
    model: LanguageModel,
    states: list[Any],
    logits: Tensor,
    tokens: int | None,
    generator: torch.Generator | None,
    sampling: dict[str, Any],
) -> Iterator[Tensor]:
    for _ in islice(count(), tokens):
        token, logits = advance(model, states, logits, generator=generator, **sampling)
        yield token

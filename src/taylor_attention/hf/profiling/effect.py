"""What settings do to a model in the end: next-token loss of a language model, embeddings of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from ...core.cost import cache_size
from ..cache import TaylorCache
from ..centres import set_key_centres
from ..models import ATTRIBUTE, text_config, use
from ..settings import HeadSettings, ModelSettings
from .recommend import Recommendation
from .statistics import Profile

CHUNK = 512
"""Tokens that a language model reads at once."""

Notify = Callable[[], None] | None


def next_token_loss(
    model: Any, pieces: Sequence[Tensor], settings: ModelSettings | HeadSettings | None, *, notify: Notify = None
) -> float:
    """The loss of a language model on the later half of each text, in nats per token.

    The text is read in chunks of 512 tokens with a `TaylorCache`, so in constant memory but for softmax heads.

    Args:
        model: of transformers, with a head for the next token.
        pieces: the texts, int64 [T] each.
        settings: what heads keep; None: softmax by "sdpa", all heads.
        notify: called after each chunk.
    """
    losses = [token_losses(model, piece, settings, notify=notify)[len(piece) // 2 - 1 :] for piece in pieces]
    return float(torch.cat(losses).double().mean())


def token_losses(
    model: Any, piece: Tensor, settings: ModelSettings | HeadSettings | None, *, notify: Notify = None
) -> Tensor:
    """The loss of a language model at each token of a text but the last, [T - 1]; otherwise as `next_token_loss`."""
    found = []
    with using(model, settings), torch.no_grad():
        cache = DynamicCache() if settings is None else TaylorCache(model)
        for start in range(0, len(piece) - 1, CHUNK):
            asked = piece[start : start + CHUNK].to(model.device)
            logits = model(input_ids=asked[None], past_key_values=cache, use_cache=True).logits[0]
            target = piece[start + 1 : start + CHUNK + 1].to(model.device)
            found.append(functional.cross_entropy(logits[: len(target)].float(), target, reduction="none"))
            if notify is not None:
                notify()
    return torch.cat(found)


def beside_softmax(
    model: Any, piece: Tensor, settings: ModelSettings | HeadSettings, *, notify: Notify = None
) -> tuple[Tensor, Tensor]:
    """Losses at each token of a text but the last, and how far next-token distributions are from those of softmax.

    Both [T - 1], in nats per token, the second as Kullback-Leibler divergences; otherwise as `next_token_loss`.
    """
    caches: dict[bool, Any] = {}
    losses, divergences = [], []
    for start in range(0, len(piece) - 1, CHUNK):
        asked = piece[start : start + CHUNK].to(model.device)
        target = piece[start + 1 : start + CHUNK + 1].to(model.device)
        shares = {}
        for exact in (True, False):
            with using(model, None if exact else settings), torch.no_grad():
                cache = caches.setdefault(exact, DynamicCache() if exact else TaylorCache(model))
                logits = model(input_ids=asked[None], past_key_values=cache, use_cache=True).logits[0]
                shares[exact] = logits[: len(target)].float().log_softmax(-1)
        losses.append(functional.nll_loss(shares[False], target, reduction="none"))
        divergences.append(functional.kl_div(shares[False], shares[True], reduction="none", log_target=True).sum(-1))
        if notify is not None:
            notify()
    return torch.cat(losses), torch.cat(divergences)


def log_shares(model: Any, piece: Tensor, positions: Tensor) -> Tensor:
    """Logarithms of the next-token distributions at some positions of a text, [n, vocabulary], as the model attends."""
    there = positions.to(model.device)
    logits = model(input_ids=piece.to(model.device)[None], use_cache=False, logits_to_keep=there).logits[0]
    return logits.float().log_softmax(-1)


def divergence(exact: Tensor, own: Tensor) -> Tensor:
    """Kullback-Leibler divergence from one distribution to another, mean over positions, in nats per token.

    Args:
        exact, own: of `log_shares`.
    """
    return functional.kl_div(own, exact, reduction="batchmean", log_target=True)


def embeddings(
    model: Any, pieces: Sequence[Tensor], settings: ModelSettings | HeadSettings | None, *, notify: Notify = None
) -> Tensor:
    """Mean-pooled last hidden states of an encoder, [N, width] of N texts; otherwise as `next_token_loss`."""
    found = []
    with using(model, settings), torch.no_grad():
        for piece in pieces:
            found.append(model.base_model(input_ids=piece.to(model.device)[None]).last_hidden_state[0].float().mean(0))
            if notify is not None:
                notify()
    return torch.stack(found)


@contextmanager
def using(model: Any, settings: ModelSettings | HeadSettings | None) -> Iterator[None]:
    """Let a model attend by settings (None: softmax by "sdpa") inside the block, ready to run; then as before."""
    config, training, before = text_config(model), model.training, model.config._attn_implementation
    own = {ATTRIBUTE: getattr(config, ATTRIBUTE)} if hasattr(config, ATTRIBUTE) else {}
    model.eval()
    try:
        if settings is None:
            model.set_attn_implementation("sdpa")
        else:
            use(model, settings)
        yield
    finally:
        model.set_attn_implementation(before)
        config.__dict__.pop(ATTRIBUTE, None)
        config.__dict__.update(own)
        model.train(training)


@contextmanager
def centred(model: Any, centres: Sequence[Tensor] | None) -> Iterator[None]:
    """Let a model, which has no key centres of its own, subtract these inside the block."""
    if centres is not None:
        set_key_centres(model, centres)
    try:
        yield
    finally:
        if centres is not None:
            set_key_centres(model, None)


def uniform(profile: Profile, nbytes: int) -> HeadSettings:
    """Sinks and the longest window alone, the same for all heads, within so many bytes of them all."""
    plain = HeadSettings(0, profile.sinks, 0, None)
    widened = widest(plain, nbytes // len(profile.shared), profile.head_dim, profile.value_dim, profile.dtype)
    return plain if widened is None else widened


def widest(
    settings: HeadSettings, nbytes: int, head_dim: int, value_dim: int, dtype: torch.dtype = torch.float32
) -> HeadSettings | None:
    """The same settings of a head with the longest window that so many bytes allow; None if not even without one."""

    def fits(window: int) -> bool:
        return replace(settings, window=window).nbytes(0, head_dim, value_dim, dtype) <= nbytes

    token = cache_size(1, head_dim, value_dim=value_dim) * dtype.itemsize
    low, high = -1, nbytes // token  # a window never takes fewer bytes a token than a cache does
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low < 0 else replace(settings, window=low)


def measure_effect(
    model: Any, profile: Profile, advice: Recommendation, pieces: Sequence[Tensor], *, notify: Notify = None
) -> dict[str, Any]:
    """The end effect of a recommendation on texts that were not profiled.

    Returns:
        Of a language model: {"measure": "nats per token", "softmax", "recommended", "uniform": losses,
        "uniform_settings": sinks and one window for all heads, at the bytes of the recommended settings}. Of an
        encoder: {"measure": "cosine", "recommended": mean cosine with softmax's embedding, "lowest": of one text}.
    """
    if not profile.causal:
        exact = embeddings(model, pieces, None, notify=notify)
        with centred(model, advice.centres):
            own = embeddings(model, pieces, advice.settings, notify=notify)
        cosine = functional.cosine_similarity(exact, own)
        return {"measure": "cosine", "recommended": float(cosine.mean()), "lowest": float(cosine.min())}
    plain = uniform(profile, advice.nbytes)
    losses = {"softmax": next_token_loss(model, pieces, None, notify=notify)}
    with centred(model, advice.centres):
        losses["recommended"] = next_token_loss(model, pieces, advice.settings, notify=notify)
    losses["uniform"] = next_token_loss(model, pieces, plain, notify=notify)
    return {"measure": "nats per token", **losses, "uniform_settings": asdict(plain)}


def effect_steps(profile: Profile, pieces: Sequence[Tensor]) -> int:
    """How often `measure_effect` notifies."""
    return sum(3 * -(-(len(piece) - 1) // CHUNK) if profile.causal else 2 for piece in pieces)

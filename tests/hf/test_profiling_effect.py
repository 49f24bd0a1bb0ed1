"""The end effect is measured on what transformers itself would compute, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from taylor_attention import hf
from taylor_attention.hf.profiling.effect import CHUNK, beside_softmax, effect_steps, token_losses, uniform
from taylor_attention.hf.profiling.observe import Observation
from taylor_attention.hf.profiling.profiler import Profiler
from tiny_models import causal_model, encoder, token_ids

TOKENS = CHUNK + 100
SOME = hf.ModelSettings(hf.HeadSettings(16, 2, 0, None), {(0, 1): hf.HeadSettings(window=None)})


def later_half(model, piece: Tensor, **options) -> float:
    """The loss of one forward pass, all tokens at once."""
    with torch.no_grad():
        logits = model(piece[None], **options).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, piece[1:], reduction="none")
    return float(losses[len(piece) // 2 - 1 :].mean())


@pytest.mark.parametrize("tokens", [TOKENS, 2 * CHUNK, 2 * CHUNK + 1, 9])
def test_the_loss_is_softmaxs_on_the_later_half(tokens):
    model, pieces = causal_model(), list(token_ids(2, tokens))
    model.set_attn_implementation("sdpa")
    expected = sum(later_half(model, piece, use_cache=False) for piece in pieces) / 2
    assert hf.profiling.next_token_loss(model, pieces, None) == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_that_of_a_model_that_uses_the_settings():
    model, piece = causal_model(), token_ids(1, TOKENS)[0]
    found = hf.profiling.next_token_loss(model, [piece], SOME)
    softmax = hf.profiling.next_token_loss(model, [piece], None)
    hf.use(model, SOME)
    assert found == pytest.approx(later_half(model, piece, use_cache=False), rel=1e-6)
    assert abs(found - softmax) > 1e-3


def test_beside_softmax_stand_the_losses_and_the_divergences_of_all_tokens():
    model, piece = causal_model(), token_ids(1, TOKENS)[0]
    losses, apart = beside_softmax(model, piece, SOME)
    assert torch.allclose(losses, token_losses(model, piece, SOME), atol=1e-5)
    shares = []
    for settings in (None, SOME):
        if settings is not None:
            hf.use(model, settings)
        with torch.no_grad():
            shares.append(model(piece[None], use_cache=False).logits[0, :-1].float().softmax(-1))
    expected = (shares[0] * (shares[0] / shares[1]).log()).sum(-1)
    assert torch.allclose(apart, expected, atol=1e-5)
    assert float(apart[TOKENS // 2 :].mean()) > 1e-4


@pytest.mark.parametrize("settings", [hf.HeadSettings(window=None), hf.HeadSettings(window=TOKENS)])
def test_settings_that_keep_everything_lose_nothing(settings):
    model, pieces = causal_model(), [token_ids(1, TOKENS)[0]]
    exact = hf.profiling.next_token_loss(model, pieces, None)
    assert hf.profiling.next_token_loss(model, pieces, settings) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("before", [None, SOME])
def test_the_model_is_left_as_it_was(before):
    model = causal_model().train()
    if before is not None:
        hf.use(model, before)
    kept, implementation = model.config.to_dict(), model.config._attn_implementation
    hf.profiling.next_token_loss(model, [token_ids(1, 20)[0]], hf.HeadSettings(4, 1))
    assert model.config.to_dict() == kept
    assert model.config._attn_implementation == implementation
    assert model.training


def test_embeddings_are_means_of_the_last_hidden_states():
    model, pieces = encoder(), list(token_ids(3, 20))
    with torch.no_grad():
        expected = model(torch.stack(pieces)).last_hidden_state.mean(1).float()
    assert torch.allclose(hf.profiling.embeddings(model, pieces, None), expected, atol=1e-5)
    assert torch.allclose(hf.profiling.embeddings(model, pieces, hf.HeadSettings(None)), expected, atol=1e-5)
    far = hf.profiling.embeddings(model, pieces, hf.HeadSettings(0, 0, 0, 0))
    assert not torch.allclose(far, expected, atol=1e-2)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_uniform_window_is_the_longest_that_fits(share):
    made = Profiler([16], 8, None)
    made.see(Observation(0, *torch.randn(3, 2, 64, 8).unbind(0), 1.0, True))
    found = made.result(64, 1)
    nbytes = int(share * 2 * found.cache_bytes)
    kept = uniform(found, nbytes)
    longer = hf.HeadSettings(kept.window + 1, kept.sinks, 0, None)
    assert 2 * kept.nbytes(64, 8, 8) <= nbytes < 2 * longer.nbytes(64, 8, 8)


@pytest.mark.parametrize("made", [causal_model, encoder])
def test_it_notifies_as_often_as_it_says(made):
    model, pieces, seen = made(), list(token_ids(2, 40)), []
    found = hf.profiling.profile(model, pieces, queries=8, windows=[8], notify=lambda: seen.append(1))
    assert len(seen) == 2 * 2
    seen.clear()
    hf.profiling.measure_effect(model, found, hf.profiling.recommend(found), pieces, notify=lambda: seen.append(1))
    assert len(seen) == effect_steps(found, pieces)

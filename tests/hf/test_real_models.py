"""Real pretrained models, where `make pretrained` (or TAYLOR_MODELS) has put them: what must not change does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from taylor_attention.bench.evidence import pretrained_models
from taylor_attention.bench.evidence.pretrained import measure

pytest.importorskip("transformers")
from taylor_attention import hf  # it needs transformers

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(pretrained_models.missing() is not None, reason="no pretrained models: make pretrained"),
]


@pytest.fixture
def smollm2() -> tuple[Any, torch.Tensor]:
    """The model, and the first tokens of a speech."""
    model, tokenizer = pretrained_models.load("smollm2")
    return model, pretrained_models.speech(tokenizer, pretrained_models.SPEECHES[0], 300)


@torch.no_grad()
def test_a_window_over_everything_is_softmax(smollm2: tuple[Any, torch.Tensor]) -> None:
    model, text = smollm2
    with hf.profiling.effect.using(model, None):
        wanted = model(input_ids=text[None]).logits
    with hf.profiling.effect.using(model, hf.HeadSettings(len(text), 4, 0, 2)):
        cache = hf.TaylorCache(model)
        parts = [model(input_ids=part[None], past_key_values=cache).logits for part in text.split(70)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-3, atol=5e-3)


def test_generation_is_that_of_softmax(smollm2: tuple[Any, torch.Tensor]) -> None:
    model, text = smollm2
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    asked = text[None, :100]
    with hf.profiling.effect.using(model, None):
        wanted = model.generate(asked, attention_mask=torch.ones_like(asked), **options)
    with hf.profiling.effect.using(model, hf.HeadSettings(128, 4, 0, None)):
        cache = hf.TaylorCache(model)
        found = model.generate(asked, attention_mask=torch.ones_like(asked), past_key_values=cache, **options)
    assert found.tolist() == wanted.tolist()
    assert found.shape[1] > 100


def test_embeddings_of_softmax_heads_are_the_model_s_own() -> None:
    model, tokenizer = pretrained_models.load("minilm")
    texts = pretrained_models.lee_documents(tokenizer)[:5]
    wanted, found = (hf.profiling.embeddings(model, texts, kept) for kept in (None, hf.HeadSettings(None)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float(functional.cosine_similarity(wanted[0], wanted[1], dim=0)) < 0.9  # they differ by document


def test_embeddings_agree_with_people() -> None:
    found = measure({"model": "minilm", "degree": None, "centred": False}, 0)
    assert found["pearson"] == pytest.approx(0.656, abs=0.002)

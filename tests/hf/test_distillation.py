"""Learning far maps: what the error is, that it falls, that the model then uses what was learned, resuming, misuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taylor_attention import hf
from taylor_attention.core.threads import thread_count
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.hf import profiling
from taylor_attention.hf.distillation import choose, distill
from taylor_attention.hf.distilled import Distilled, measure_learned, with_far_maps
from taylor_attention.hf.learner import Learner
from taylor_attention.hf.models import sizes_of
from taylor_attention.hf.profiling import next_token_loss
from taylor_attention.hf.profiling.observe import observing
from taylor_attention.ops.reference import attention_reference
from tiny_models import LAYERS, causal_model, token_ids
from tolerances import relative_error

NEAR = hf.HeadSettings(window=4, sinks=1, degree=None)
SETTINGS = with_far_maps(hf.ModelSettings(NEAR), 2, 3)
BY_HEAD = with_far_maps(
    hf.ModelSettings(NEAR, {(0, 1): hf.HeadSettings(window=None), (1, 0): hf.HeadSettings(7, 2)}), 2, 3
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return causal_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def pieces():
    torch.manual_seed(1)
    return [token_ids(1, 48)[0] for _ in range(6)]


def seen_by(model, piece):
    found = []
    with observing(model, found.append), torch.no_grad():
        model.base_model(input_ids=piece[None], use_cache=False)
    return found


def begun(model, piece, settings, layer=0):
    learner = Learner(settings.layer(layer, 2), sizes_of(model.config), 10)
    seen = seen_by(model, piece)[layer]
    learner.begin(seen)
    for x in (learner.gain, learner.query_offset, learner.key_offset):
        torch.nn.init.normal_(x)
    return learner, seen


@pytest.mark.parametrize("head", [0, 1])
def test_the_error_is_that_of_the_attention_that_is_used_afterwards(model, pieces, head):
    """By the definition, in one head whose window is its own."""
    learner, seen = begun(model, pieces[0], BY_HEAD, layer=1)
    centre, maps = learner.result()
    settings, positions = BY_HEAD.layer(1, 2)[head], torch.tensor([11, 20, 47])
    heads = slice(2 * head, 2 * head + 2)
    inputs = seen.query[heads], seen.key[head : head + 1], seen.value[head : head + 1]
    query, key, value = (x[None].double() for x in inputs)
    key = key - centre[head]
    y = attention_reference(
        query, key, value, degree=2, window=settings.window, sinks=settings.sinks, scale=seen.scale,
        far_query=query @ maps.query_map[heads, :8].double() + maps.query_map[heads, 8:].double(),
        far_key=key @ maps.key_map[head, :8].double() + maps.key_map[head, 8].double(), far_gain=maps.gain[heads],
    )  # fmt: skip
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=seen.scale, enable_gqa=True
    )
    wrong = (y - exact)[0][:, positions].square().sum((1, 2)) / exact[0][:, positions].square().sum((1, 2))
    assert relative_error(learner.errors(seen, positions)[head].detach(), wrong) < 1e-4


def test_a_softmax_head_has_no_error(model, pieces):
    learner, seen = begun(model, pieces[0], BY_HEAD)
    assert float(learner.errors(seen, torch.tensor([11, 47]))[1].detach().abs().max()) < 1e-10


def outputs(model, piece):
    with torch.no_grad():
        return model(piece[None], use_cache=False).logits


def test_what_is_learned_brings_a_model_nearer_to_softmax(model, pieces):
    """On the text that it was learned from, as the texts of these tests have nothing in common."""
    text = pieces[0]
    learned = distill(model, [text] * 4, SETTINGS, steps=40, queries=24)
    softmax = outputs(model, text)
    windows = relative_error(outputs(hf.use(model, NEAR), text), softmax)
    used = relative_error(outputs(learned.use(model), text), softmax)
    hf.set_far_maps(model, None)
    hf.set_key_centres(model, None)
    model.set_attn_implementation("sdpa")
    assert used < 0.7 * windows


@pytest.mark.parametrize("threads", [2, 3])
def test_layers_that_learn_side_by_side_learn_what_they_learn_one_after_the_other(model, pieces, threads):
    options = {"steps": 3, "queries": 16}
    with thread_count(1):
        alone = distill(model, pieces[:2], SETTINGS, **options)
    with thread_count(threads):
        together = distill(model, pieces[:2], SETTINGS, **options)
    for one, other in zip(alone.maps, together.maps, strict=True):
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(other, one, strict=True))


def test_errors_fall_and_are_told_for_each_layer(model, pieces):
    told = []
    distill(model, pieces[:1] * 5, SETTINGS, steps=10, queries=16, notify=told.append)
    assert [len(each) for each in told] == [LAYERS] * 5
    assert sum(told[-1]) < 0.85 * sum(told[0])


def test_heads_whose_far_part_does_not_earn_its_bytes_lose_it(model, pieces):
    """One whose far scores are far too large; the other heads stay."""
    learned = distill(model, pieces[:1] * 4, SETTINGS, steps=20, queries=24)
    worst = learned.maps[1].key_map.clone()
    worst[0] *= 1000
    spoiled = replace(learned, maps=[learned.maps[0], learned.maps[1]._replace(key_map=worst)])
    kept = choose(model, spoiled, pieces[:1], share=0.5).settings
    assert kept.heads[1, 0] == NEAR
    assert [kept.heads[place].far_dim for place in ((0, 0), (0, 1), (1, 1))] == [3, 3, 3]
    assert choose(model, spoiled, pieces[:1], share=1e-9).settings.heads[0, 0] == NEAR


def test_what_is_chosen_is_of_the_errors_that_are_learned(model, pieces):
    learned = distill(model, pieces[:1], SETTINGS, steps=2, queries=16)
    taken = Learner(SETTINGS.layer(0, 2), sizes_of(model.config), 10)
    seen, positions = seen_by(model, pieces[0])[0], torch.arange(8, 48)
    taken.take(learned.centres[0], learned.maps[0], seen.scale)
    again, centre_and_maps = taken.result(), (learned.centres[0], learned.maps[0])
    assert torch.allclose(again[0], centre_and_maps[0])
    assert all(torch.allclose(a, b) for a, b in zip(again[1], centre_and_maps[1], strict=True))
    assert bool(taken.errors(seen, positions).isfinite().all())


def divergence_by_definition(model, piece, settings):
    """Of all positions of the later half."""
    with profiling.effect.using(model, None):
        exact = outputs(model, piece)[0, len(piece) // 2 :].softmax(-1)
    with profiling.effect.using(model, settings):
        own = outputs(model, piece)[0, len(piece) // 2 :].softmax(-1)
    return float((exact * (exact / own).log()).sum(-1).mean())


def test_what_a_folder_holds_does_to_a_model_what_is_told(model, pieces):
    learned = distill(model, pieces[:1], SETTINGS, steps=2, queries=16)
    found = measure_learned(model, learned, pieces[1:3])
    assert found["bytes"] == SETTINGS.nbytes(48, LAYERS, 2, 8)
    assert found["softmax"] == next_token_loss(model, pieces[1:3], None)
    plain = hf.HeadSettings(found["window"], 1, 0, None)
    wanted = sum(divergence_by_definition(model, piece, plain) for piece in pieces[1:3]) / 2
    assert found["divergence"]["windows"] == pytest.approx(wanted, rel=1e-3)
    assert 0 < found["divergence"]["learned"] != found["divergence"]["windows"]
    assert found["windows"] == next_token_loss(model, pieces[1:3], plain)
    held = hf.ModelSettings(plain).nbytes(48, LAYERS, 2, 8)
    more = hf.ModelSettings(hf.HeadSettings(found["window"] + 1, 1, 0, None)).nbytes(48, LAYERS, 2, 8)
    assert held <= found["bytes"] < more
    assert len({found["softmax"], found["windows"], found["learned"]}) == 3


def test_interrupted_work_goes_on_to_the_same_result(model, pieces, tmp_path):
    whole = distill(model, pieces, SETTINGS, steps=2, queries=8)

    def stop(_):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill(model, pieces, SETTINGS, steps=2, queries=8, folder=tmp_path, resume=True, notify=stop)
    rest = []
    found = distill(model, pieces, SETTINGS, steps=2, queries=8, folder=tmp_path, resume=True, notify=rest.append)
    assert len(rest) == len(pieces) - 2
    for result in (found, Distilled.load(tmp_path)):
        assert result.settings == whole.settings
        assert all(torch.equal(a, b) for a, b in zip(result.centres, whole.centres, strict=True))
        pairs = [pair for maps in zip(result.maps, whole.maps, strict=True) for pair in zip(*maps, strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_work_on_other_texts_is_not_gone_on_with(model, pieces, tmp_path):
    distill(model, pieces[:2], SETTINGS, steps=1, queries=4, folder=tmp_path)
    with pytest.raises(StorageError, match="texts: expected those of the work begun"):
        distill(model, pieces[1:3], SETTINGS, steps=1, queries=4, folder=tmp_path, resume=True)


MISUSE = {
    "steps": ({"steps": 0}, "steps: expected"),
    "queries": ({"queries": 0}, "queries: expected"),
    "short pieces": ({"pieces": [torch.arange(1, 6)]}, "pieces: expected more than 5 tokens each"),
    "no pieces": ({"pieces": []}, "pieces: expected more than 5 tokens each"),
    "softmax": ({"settings": hf.ModelSettings(hf.HeadSettings(window=None))}, "settings: expected heads that drop"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(model, pieces, case):
    options, message = MISUSE[case]
    arguments = {"pieces": pieces[:1], "settings": SETTINGS, **options}
    with pytest.raises(ArgumentError, match=f"^{message}"):
        distill(model, **arguments)


def test_heavy_tokens_are_refused():
    with pytest.raises(ArgumentError, match="^settings: expected heads without heavy tokens"):
        with_far_maps(hf.ModelSettings(hf.HeadSettings(4, 1, heavy=2)), 2, 3)

"""Learning all layers together: the whole model comes nearer to softmax, nothing else changes, resuming, misuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taylor_attention import hf
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.hf import layer_tensors
from taylor_attention.hf.distilled import Distilled, with_far_maps
from taylor_attention.hf.together import learn_together, parts
from tiny_models import LAYERS, causal_model, token_ids
from tolerances import relative_error

NEAR = hf.HeadSettings(window=4, sinks=1, degree=None)
SETTINGS = with_far_maps(hf.ModelSettings(NEAR, {(0, 1): hf.HeadSettings(window=None)}), 2, 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return causal_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def pieces():
    torch.manual_seed(1)
    return [token_ids(1, 40)[0] for _ in range(6)]


def by_chance(kv_heads: int = 2) -> Distilled:
    """Maps without offsets, as they were written before there were any."""
    draw = torch.Generator().manual_seed(2)

    def numbers(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=draw)

    maps = [hf.FarMap(numbers(4, 8, 3), numbers(kv_heads, 8, 3), numbers(4)) for _ in range(LAYERS)]
    return Distilled(SETTINGS, [numbers(kv_heads, 8) for _ in range(LAYERS)], maps)


@pytest.fixture(scope="module")
def begun() -> Distilled:
    return by_chance()


def tensors(learned: Distilled) -> list[torch.Tensor]:
    return [*learned.centres, *(x for each in learned.maps for x in each)]


def divergence(model, piece: torch.Tensor, learned: Distilled) -> float:
    """From softmax, of the positions that see far tokens, by its definition."""
    with torch.no_grad():
        exact = model(piece[None]).logits[0, 5:].softmax(-1)
        own = learned.use(model)(piece[None], use_cache=False).logits[0, 5:].softmax(-1)
    hf.set_far_maps(model, None)
    hf.set_key_centres(model, None)
    model.set_attn_implementation("sdpa")
    return float((exact * (exact / own).log()).sum(-1).mean())


def test_the_whole_model_comes_nearer_to_softmax(model, pieces, begun):
    """On the text that it was learned from, as the texts of these tests have nothing in common."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    told: list[float] = []
    learned = learn_together(model, begun, [pieces[0]] * 24, notify=told.append)
    assert learned.settings == SETTINGS
    assert told[0] == pytest.approx(divergence(model, pieces[0], begun), rel=1e-3)
    assert divergence(model, pieces[0], learned) < 0.6 * told[0]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.requires_grad and x.grad is None for x in model.parameters())
    assert not any(name.startswith("taylor") for each in model.modules() for name in each._buffers)


@pytest.mark.parametrize("name", ["key_centre", "query_map", "key_map", "gain"])
def test_gradients_of_what_layers_are_lent_are_those_of_differences(pieces, name):
    learned = by_chance(kv_heads=4)
    model = learned.use(causal_model("gpt2"))  # its norms are float64 throughout
    layer = hf.models.attention_layers(model)[0]
    before = layer_tensors.get(layer, name)
    named = zip(learned.centres, learned.maps, strict=True)
    layers = [{"key_centre": centre, **maps._asdict()} for centre, maps in named]
    layers = [{key: x.double().requires_grad_() for key, x in each.items()} for each in layers]

    def loss() -> torch.Tensor:
        with layer_tensors.lending(model, layers):
            return model(pieces[0][None], use_cache=False).logits.square().mean()

    own = layers[0][name]
    (gradient,) = torch.autograd.grad(loss(), own)
    way, step = torch.randn_like(own), 1e-5
    with torch.no_grad():
        own += step * way
        above = loss()
        own -= 2 * step * way
        below = loss()
    assert relative_error((gradient * way).sum(), (above - below) / (2 * step)) < 1e-5
    assert layer_tensors.get(layer, name) is before


def test_interrupted_work_goes_on_to_the_same_result(model, pieces, begun, tmp_path):
    whole = learn_together(model, begun, pieces, positions=9)

    def stop(_):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learn_together(model, begun, pieces, positions=9, folder=tmp_path, resume=True, notify=stop)
    rest: list[float] = []
    found = learn_together(model, begun, pieces, positions=9, folder=tmp_path, resume=True, notify=rest.append)
    assert len(rest) == len(pieces) - 2
    for result in (found, Distilled.load(tmp_path)):
        assert result.settings == whole.settings
        assert all(torch.equal(a, b) for a, b in zip(tensors(result), tensors(whole), strict=True))
    another = learn_together(model, begun, pieces, positions=9, seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(tensors(another), tensors(whole), strict=True))


def test_work_from_other_maps_is_not_gone_on_with(model, pieces, begun, tmp_path):
    learn_together(model, begun, pieces[:2], folder=tmp_path)
    other = replace(begun, centres=[centre + 1 for centre in begun.centres])
    with pytest.raises(StorageError, match="start: expected those of the work begun"):
        learn_together(model, other, pieces[:2], folder=tmp_path, resume=True)


def test_parts_are_short_ones_and_then_whole_ones():
    pieces = [torch.arange(100 * n, 100 * n + 100) for n in range(10)]
    found = parts(pieces, SETTINGS, 600)
    assert [len(part) for part in found] == [40] * 5 + [100] * 4  # 40 is 8 times a window of 4 and a sink
    firsts = [int(part[0]) for part in found]
    assert all(
        torch.equal(part, torch.arange(first, first + len(part))) for first, part in zip(firsts, found, strict=True)
    )
    assert all(first % 100 in (0, 40) for first in firsts[:5])
    assert len(set(firsts)) == 9
    assert not {first // 100 for first in firsts[:5]} & {first // 100 for first in firsts[5:]}
    assert firsts == [int(part[0]) for part in parts(pieces, SETTINGS, 600)]
    assert firsts != [int(part[0]) for part in parts(pieces, SETTINGS, 600, seed=1)]
    assert [len(part) for part in parts(pieces, SETTINGS, 1)] == [100]


MISUSE = {
    "positions": ({"positions": 0}, "positions: expected"),
    "short pieces": ({"pieces": [torch.arange(1, 6)]}, "pieces: expected more than 5 tokens each"),
    "no pieces": ({"pieces": []}, "pieces: expected more than 5 tokens each"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(model, pieces, begun, case):
    options, message = MISUSE[case]
    with pytest.raises(ArgumentError, match=f"^{message}"):
        learn_together(model, begun, **{"pieces": pieces[:1], **options})


@pytest.mark.parametrize(("given", "tokens", "name"), [(1, 0, "tokens"), (0, 9, "pieces")])
def test_no_parts_are_refused(pieces, given, tokens, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        parts(pieces[:given], SETTINGS, tokens)


def test_without_a_far_part_there_is_nothing_to_learn(model, pieces, begun):
    with pytest.raises(ArgumentError, match="^settings: expected heads with a far part"):
        learn_together(model, replace(begun, settings=hf.ModelSettings(NEAR)), pieces)

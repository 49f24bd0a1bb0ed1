"""Learned maps for the far part in models of transformers: their definition, the law, files, and misuse."""

from __future__ import annotations

import pytest
import torch

from taylor_attention import hf
from taylor_attention.core.storage import write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from tiny_models import LAYERS, causal_model, token_ids
from tolerances import TOLERANCE, relative_error

FLOAT64 = TOLERANCE[torch.float64] * 100  # through two layers, their norms and the logits
FAR = 3
SMALL = hf.HeadSettings(window=4, sinks=1, degree=2, far_dim=FAR)
SETTINGS = {
    "all heads": hf.ModelSettings(SMALL),
    "by head": hf.ModelSettings(SMALL, {(0, 1): hf.HeadSettings(window=None), (1, 0): hf.HeadSettings(3, 1, degree=2)}),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def maps(heads: int = 4, kv_heads: int = 2, far_dim: int = FAR, seed: int = 0, rows: int = 8) -> list[hf.FarMap]:
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)

    shapes = (heads, rows, far_dim), (kv_heads, rows, far_dim), (heads,)
    return [hf.FarMap(*(numbers(*shape) for shape in shapes)) for _ in range(LAYERS)]


def mapped(settings: hf.ModelSettings = SETTINGS["all heads"], **options):
    model = hf.use(causal_model(), settings)
    hf.set_far_maps(model, maps(**options))
    return model


@torch.no_grad()
def test_maps_of_the_scores_themselves_change_nothing():
    model, tokens = hf.use(causal_model(), hf.HeadSettings(window=4, sinks=1, degree=2)), token_ids(2, 16)
    expected = model(tokens).logits
    same = torch.eye(8, dtype=torch.float64)
    own = [hf.FarMap(8**-0.5 * same.expand(4, 8, 8), same.expand(2, 8, 8), torch.zeros(4)) for _ in range(LAYERS)]
    hf.use(model, hf.HeadSettings(window=4, sinks=1, degree=2, far_dim=8))
    hf.set_far_maps(model, own)
    assert relative_error(model(tokens).logits, expected) < FLOAT64
    hf.set_far_maps(model, maps(far_dim=8))
    assert relative_error(model(tokens).logits, expected) > 1e-3


@torch.no_grad()
@each_setting
@pytest.mark.parametrize("cuts", [[5, 6, 11], list(range(1, 16))], ids=["chunks", "token by token"])
def test_any_split_with_the_cache_is_one_call_without(settings, cuts):
    model, tokens = mapped(settings, rows=9), token_ids(2, 16)  # with offsets
    expected, cache = model(tokens, use_cache=False).logits, hf.TaylorCache(model)
    pieces = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]
    assert relative_error(torch.cat(pieces, 1), expected) < FLOAT64


@torch.no_grad()
def test_a_gain_can_leave_far_tokens_out():
    """e^-40 of their weight is nothing beside near ones."""
    model, tokens = hf.use(causal_model(), hf.HeadSettings(window=4, sinks=1, degree=None)), token_ids(2, 16)
    expected = model(tokens).logits
    hf.use(model, SMALL)
    hf.set_far_maps(model, [each._replace(gain=torch.full((4,), -40.0)) for each in maps()])
    assert relative_error(model(tokens).logits, expected) < FLOAT64
    hf.set_far_maps(model, maps())
    assert relative_error(model(tokens).logits, expected) > 1e-3


@torch.no_grad()
def test_heads_without_far_keys_do_not_see_them():
    settings = hf.HeadSettings(window=4, sinks=1, degree=2)
    model, tokens = hf.use(causal_model(), settings), token_ids(2, 16)
    expected = model(tokens).logits
    hf.set_far_maps(model, maps())
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
@each_setting
def test_a_saved_cache_goes_on(settings, tmp_path):
    model, tokens = mapped(settings), token_ids(2, 16)
    cache = hf.TaylorCache(model)
    model(tokens[:, :9], past_key_values=cache)
    cache.save(tmp_path / "cache")
    expected = model(tokens[:, 9:], past_key_values=cache).logits
    loaded = hf.TaylorCache.load(tmp_path / "cache", model)
    assert torch.equal(model(tokens[:, 9:], past_key_values=loaded).logits, expected)


@pytest.mark.parametrize(("rows", "last"), [(8, 0.0), (9, 1.0)])
def test_an_offset_is_the_row_of_a_constant_entry(rows, last):
    """A map of d + 1 rows is the matrix of [x, 1]; one of d rows has no offset."""
    one, query, key = maps(rows=rows)[0], torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 5, 8).double()

    def by_definition(x, by):
        return torch.nn.functional.pad(x, (0, 1), value=last)[..., :rows] @ by

    assert relative_error(one.far_query(query), by_definition(query, one.query_map)) < FLOAT64
    assert relative_error(one.far_key(key), by_definition(key, one.key_map)) < FLOAT64


@pytest.mark.parametrize(("curvature", "place", "least"), [(1.0, 0.0, 0.5), (0.3, -2.0, 4.0), (7.0, 1.5, 0.01)])
def test_any_positive_quadratic_is_a_far_weight(curvature, place, least):
    """curvature (x - place)^2 + least of x = q . k: offsets make the coefficients of the series a head's own."""
    t = (curvature / least) ** 0.5
    asked, held = torch.zeros(1, 9, 9).double(), torch.zeros(1, 9, 9).double()
    held[0, :8, :8] = torch.eye(8)
    asked[0, :8, :8] = t * held[0, :8, :8]
    asked[0, 8, 8], held[0, 8, 8] = -t * place - 1, 1
    one = hf.FarMap(asked, held, torch.tensor([2 * least], dtype=torch.float64).log())
    query, key = torch.randn(1, 1, 6, 8).double(), torch.randn(1, 1, 7, 8).double()
    score, x = one.far_query(query) @ one.far_key(key).mT, query @ key.mT
    weight = one.gain.exp() * (1 + score + score**2 / 2)
    assert relative_error(weight, curvature * (x - place) ** 2 + least) < FLOAT64


@torch.no_grad()
def test_a_cache_begun_with_other_maps_is_refused():
    model, tokens = mapped(), token_ids(2, 16)
    cache = hf.TaylorCache(model)
    model(tokens[:, :9], past_key_values=cache)
    hf.set_far_maps(model, maps(seed=1))
    with pytest.raises(ArgumentError, match="past_key_values: expected a cache begun with the model's far maps"):
        model(tokens[:, 9:], past_key_values=cache)


def test_bytes_are_those_of_the_cache():
    model = mapped().float()
    cache = hf.TaylorCache(model)
    with torch.no_grad():
        model(token_ids(1, 16), past_key_values=cache)
    assert SETTINGS["all heads"].nbytes(16, LAYERS, 2, 8) == cache.nbytes
    assert SMALL.nbytes(16, 64, 64) < hf.HeadSettings(4, 1, degree=2).nbytes(16, 64, 64) / 10


def test_a_file_of_them(tmp_path):
    hf.save_far_maps(tmp_path / "maps", maps())
    found = hf.load_far_maps(tmp_path / "maps")
    pairs = [(a, b) for one, other in zip(found, maps(), strict=True) for a, b in zip(one, other, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)
    model, tokens = mapped(), token_ids(2, 16)
    with torch.no_grad():
        expected = model(tokens).logits
        hf.set_far_maps(model, None)
        hf.set_far_maps(model, tmp_path / "maps")
        assert torch.equal(model(tokens).logits, expected)


def test_settings_without_maps_are_refused():
    model = hf.use(causal_model(), SMALL)
    with pytest.raises(ArgumentError, match="^model: expected far maps of 3 entries"):
        model(token_ids(2, 16))


def wrong(**changed):
    return [maps()[0]._replace(**changed), maps()[1]]


MISUSE = {
    "one for all": (maps()[:1], "maps: expected one for each of 2 layers"),
    "tensors": ([x.gain for x in maps()], r"maps\[0\]: expected a FarMap"),
    "other heads": (maps(heads=2), r"maps\[0\].query_map: expected shape \(4, 8, 3\), got \(2, 8, 3\)"),
    "other key heads": (maps(kv_heads=4), r"maps\[0\].key_map: expected shape \(2, 8, 3\), got \(4, 8, 3\)"),
    "other rows": (maps(rows=10), r"maps\[0\].query_map: expected shape \(4, 9, 3\), got \(4, 10, 3\)"),
    "NaN": (wrong(gain=torch.full((4,), torch.nan)), r"maps\[0\].gain: expected finite numbers"),
    "a number": (wrong(gain=1.0), r"maps\[0\].gain: expected a floating-point tensor of 1 axes"),
    "two sizes": (wrong(key_map=maps(far_dim=2)[0].key_map), r"maps\[0\].key_map: expected shape \(2, 8, 3\)"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(case):
    given, message = MISUSE[case]
    with pytest.raises(ArgumentError, match=f"^{message}"):
        hf.set_far_maps(hf.use(causal_model(), SMALL), given)


@pytest.mark.parametrize(("options", "name"), [({"degree": None}, "far_dim"), ({"far_dim": 0}, "far_dim")])
def test_settings_that_make_no_sense_are_refused(options, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        hf.HeadSettings(**{"window": 4, "sinks": 1, "degree": 2, "far_dim": 3, **options})


def test_another_file_is_refused(tmp_path):
    write_tensors(tmp_path / "maps", {"0.gain": torch.zeros(4)}, kind="far-maps", metadata={})
    with pytest.raises(StorageError, match="expected query_map, key_map, gain of each layer"):
        hf.load_far_maps(tmp_path / "maps")

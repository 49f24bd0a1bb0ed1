"""The key/value cache: what is appended is there, growth is amortised, copies are independent, files are validated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.nn import KeyValueCache


def filled(tokens: int, *, decay: bool = True) -> KeyValueCache:
    cache = KeyValueCache.zeros(3, 2, 4, 5, decay=decay)
    steps = -torch.rand(3, 2, tokens) if decay else None
    cache.append_(torch.randn(3, 2, tokens, 4), torch.randn(3, 2, tokens, 5), steps, None)
    return cache


def test_holds_what_was_appended():
    keys, values, steps = torch.randn(3, 2, 200, 4), torch.randn(3, 2, 200, 5), -torch.rand(3, 2, 200)
    cache = KeyValueCache.zeros(3, 2, 4, 5, decay=True)
    for start, end in ((0, 1), (1, 64), (64, 65), (65, 199), (199, 200)):
        part = slice(start, end)
        cache.append_(keys[:, :, part], values[:, :, part], steps[:, :, part], None)
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.values, values)
    torch.testing.assert_close(cache.cumulative_decay, steps.double().cumsum(-1), rtol=1e-14, atol=0)
    assert cache.attended is None
    assert cache.tokens.tolist() == [200] * 3


def test_growth_is_amortised():
    cache = KeyValueCache.zeros(1, 1, 2, 2)
    one = torch.randn(1, 1, 1, 2)
    moves, address = 0, cache.key_buffer.data_ptr()
    for _ in range(2000):
        cache.append_(one, one, None, None)
        moves += cache.key_buffer.data_ptr() != address
        address = cache.key_buffer.data_ptr()
    assert moves == 5  # 64 -> 128 -> 256 -> 512 -> 1024 -> 2048
    assert cache.key_buffer.shape[2] == 2048


def test_nbytes_counts_what_is_allocated():
    cache = filled(100)
    capacity = cache.key_buffer.shape[2]
    assert capacity == 128
    per_slot = 2 * (4 + 5) * 4 + 2 * 8 + 1  # keys and values in float32, decays in float64, one mask byte
    assert cache.nbytes == 3 * (capacity * per_slot + 8)


@pytest.mark.parametrize("decay", [False, True])
def test_extended_is_a_new_cache(decay: bool):
    cache = filled(10, decay=decay)
    key, value = torch.randn(3, 2, 2, 4, requires_grad=True), torch.randn(3, 2, 2, 5)
    steps = -torch.rand(3, 2, 2) if decay else None
    longer = cache.extended(key, value, steps, None)
    assert (cache.length, longer.length) == (10, 12)
    longer.keys.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))
    cache.append_(key.detach(), value, steps, None)
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, longer.tensors()[name].detach()), name


def test_copies_are_independent():
    cache = filled(10)
    before = cache.keys.clone()
    copy, chosen = cache.clone(), cache.select(torch.tensor([2, 2, 0]))
    cache.append_(torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 5), -torch.rand(3, 2, 1), None)
    cache.key_buffer.zero_()
    assert copy.length == 10
    assert torch.equal(copy.keys, before)
    assert torch.equal(chosen.keys, before[[2, 2, 0]])


def test_padding_is_kept_apart_from_tokens():
    cache = filled(2)
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    cache.append_(torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 5), -torch.rand(3, 2, 2), mask)
    assert cache.tokens.tolist() == [4, 3, 2]
    assert cache.length == 4
    assert torch.equal(cache.attended, torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], dim=1))


def test_to_changes_keys_and_values_only():
    moved = filled(3).to(dtype=torch.float64)
    assert moved.keys.dtype == moved.values.dtype == torch.float64
    assert moved.tokens.dtype == torch.int64
    assert filled(3).to("cpu").keys.dtype == torch.float32


@pytest.mark.parametrize("decay", [False, True])
def test_goes_through_a_file_and_on(decay: bool):
    cache = filled(10, decay=decay)
    back = KeyValueCache.from_tensors(cache.tensors(), cache.metadata())
    assert back.nbytes < cache.nbytes  # the spare capacity is not stored
    key, value = torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 5)
    steps = -torch.rand(3, 2, 1) if decay else None
    for one in (cache, back):
        one.append_(key, value, steps, None)
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor, back.tensors()[name]), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("values"), "expected \\['values'\\] too"),
        (lambda tensors: tensors.update(tokens=torch.zeros(2, dtype=torch.int64)), "tokens: expected shape \\(3,\\)"),
        (lambda tensors: tensors.update(keys=torch.zeros(3, 2, 10)), "expected 4 axes"),
        (lambda tensors: tensors.update(cumulative_decay=torch.zeros(3, 2, 9)), "cumulative_decay: expected shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(damage: Callable[[dict[str, Tensor]], object], message: str):
    cache = filled(10)
    tensors = cache.tensors()
    damage(tensors)
    with pytest.raises(StorageError, match=message):
        KeyValueCache.from_tensors(tensors, cache.metadata())


def test_another_kind_of_state_is_refused():
    with pytest.raises(StorageError, match="type: expected 'key-value-cache', got 'state'"):
        KeyValueCache.from_tensors(filled(1).tensors(), {"type": "state"})


def test_decay_must_be_given_exactly_where_it_is_kept():
    key, value, steps = torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 5), torch.zeros(3, 2, 1)
    with pytest.raises(ArgumentError, match="log_decay: expected a tensor"):
        filled(1, decay=True).append_(key, value, None, None)
    with pytest.raises(ArgumentError, match="log_decay: expected None"):
        filled(1, decay=False).append_(key, value, steps, None)

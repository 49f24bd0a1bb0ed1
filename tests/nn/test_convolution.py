"""The short convolution: against its definition, where it starts, what is remembered and what a file may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from taylor_attention.core.state import State
from taylor_attention.errors import StorageError
from taylor_attention.nn import SoftmaxAttention, TaylorAttention
from taylor_attention.nn.convolution import ConvolvedState, ShortConvolution
from tolerances import TOLERANCE, relative_error

B, T, D, WIDTH = 2, 7, 5, 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def convolution() -> ShortConvolution:
    made = ShortConvolution(D, WIDTH).double()
    torch.nn.init.normal_(made.weight)
    return made


def test_each_channel_is_a_sum_over_its_latest_values(convolution: ShortConvolution):
    x, recent = random(B, T, D), random(B, WIDTH - 1, D)
    joined = torch.cat([recent, x], dim=1)
    made = convolution(x, recent, None)
    for weight, got in zip(convolution.weight, made, strict=True):  # queries, keys, values: [D, WIDTH] each
        expected = torch.stack([(joined[:, t : t + WIDTH] * weight.mT).sum(1) for t in range(T)], dim=1)
        assert relative_error(got, expected) < TOLERANCE[torch.float64]
    assert torch.equal(convolution.remember(x, recent, None), x[:, -2:])
    assert torch.equal(convolution.remember(x[:, :1], recent, None), joined[:, 1:3])


def test_padding_is_left_out_wherever_it_stands(convolution: ShortConvolution):
    x, recent = random(1, T, D), random(1, WIDTH - 1, D)
    mask = torch.tensor([[False, True, True, False, False, True, False]])
    padded = convolution(x, recent, mask)
    for got, expected in zip(padded, convolution(x[mask][None], recent, None), strict=True):
        assert relative_error(got[mask], expected[0]) < TOLERANCE[torch.float64]
    assert torch.equal(convolution.remember(x, recent, mask), x[:, [2, 5]])
    nothing = torch.zeros(1, T, dtype=torch.bool)
    assert torch.equal(convolution.remember(x, recent, nothing), recent)


@pytest.mark.parametrize("kind", [TaylorAttention, SoftmaxAttention])
def test_a_convolution_starts_as_none(kind: Callable[..., Any]):
    layer, plain = kind(12, 2, conv=4), kind(12, 2)
    assert layer.state_dict().keys() - plain.state_dict().keys() == {"conv.weight"}
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "conv.weight"})
    x = torch.randn(B, T, 12)
    assert relative_error(layer(x), plain(x)) < TOLERANCE[torch.float32]


def test_the_state_counts_moves_and_chooses_what_is_remembered():
    layer = TaylorAttention(12, 2, conv=4)
    state, plain = layer.new_state(3), TaylorAttention(12, 2).new_state(3)
    assert state.nbytes == plain.nbytes + 3 * 3 * 12 * 4
    layer.decode_(torch.randn(3, T, 12), state)
    assert torch.equal(state.select(torch.tensor([2, 0])).recent, state.recent[[2, 0]])
    copy = state.clone()
    layer.decode_(torch.randn(3, 1, 12), copy)
    assert state.tokens.tolist() == [T] * 3
    assert not torch.equal(copy.recent, state.recent)
    wide = state.to(dtype=torch.float64)
    assert wide.recent.dtype == wide.attention.dtype == torch.float64
    assert layer.double().new_state(1).layout == wide.layout
    x = torch.randn(3, T, 12, dtype=torch.float64, requires_grad=True)
    kept = layer(x, return_state=True)[1]
    assert kept.recent.requires_grad
    assert not kept.detach().recent.requires_grad


def test_a_refused_token_is_not_remembered():
    layer = TaylorAttention(12, 2, conv=3, qk_norm=False)
    state = layer.new_state(1)
    layer.decode_(torch.randn(1, 3, 12), state)
    before = state.recent.clone()
    with pytest.raises(ValueError, match="expected"):
        layer.decode_(torch.full((1, 1, 12), 1e30), state)
    assert torch.equal(state.recent, before)
    assert state.tokens.tolist() == [3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("recent"), "recent: expected the latest inputs, as this model convolves them"),
        (lambda tensors: tensors.update(recent=torch.zeros(2, 3)), "recent: expected shape"),
        (lambda tensors: tensors.update(recent=torch.zeros(1, 3, 12)), "recent: expected shape"),
        (lambda tensors: tensors.update(recent=torch.zeros(2, 3, 12).long()), "recent: expected a floating-point"),
        (lambda tensors: tensors["recent"].fill_(torch.nan), "recent: expected finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(damage: Callable[[dict[str, Tensor]], object], message: str):
    state = TaylorAttention(12, 2, conv=4).new_state(2)
    tensors = state.tensors()
    damage(tensors)
    with pytest.raises(StorageError, match=message):
        ConvolvedState.from_tensors(tensors, state.metadata(), State.from_tensors)

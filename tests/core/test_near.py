"""Tokens that leave the ring compete for the places of heavy ones: one step at a time, in place."""

import math

import pytest
import torch

from taylor_attention.core.near import Near, Tokens
from taylor_attention.core.state import State, check_reach
from taylor_attention.errors import ArgumentError

WINDOW = 2


def push(received, fading=0.0, heavy=2, sinks=0):
    """Tokens 1, 2, 3, ... that get so much attention in the ring; with each who becomes far (or None), and the end."""
    near = State.zeros(1, 1, 1, 1, 0, window=WINDOW, sinks=sinks, heavy=heavy, dtype=torch.float64).near
    left = []
    for n, got in enumerate(received):
        key = torch.full((1, 1, 1), n + 1.0, dtype=torch.float64)
        token = Tokens(key, torch.cat([key, torch.ones_like(key)], -1), key[..., 0] * fading)
        gone = near.push_(token, torch.tensor([n]), None)
        left.append(int(gone.key.item()) if gone.value[..., -1].item() else None)
        if n >= sinks:
            near.received[..., (n - sinks) % WINDOW] = got
    return left, near


@pytest.mark.parametrize(
    ("received", "left", "held"),
    [
        ([4, 3, 2, 1, 0, 0], [None, None, None, None, 3, 4], [1, 2]),
        ([1, 2, 3, 4, 0, 0], [None, None, None, None, 1, 2], [3, 4]),
        ([2, 2, 2, 3, 0, 0], [None, None, None, None, 3, 1], [4, 2]),  # of equals who holds the place keeps it
        ([0, 5, math.nan, 1, 7, 7], [None, None, 1, None, 3, None], [2, 4]),  # nobody saw 1, and nothing is known of 3
    ],
    ids=["falling", "rising", "equals", "none"],
)
def test_the_highest_keep_their_places_and_the_others_leave(received, left, held):
    found, near = push(received)
    assert found == left
    assert near.heavy_key.flatten().tolist() == held
    assert near.heavy_value[..., 0, :].flatten().tolist() == held
    assert near.heavy_priority.flatten().tolist() == pytest.approx([math.log(received[x - 1]) for x in held])


def test_what_fades_counts_for_less_the_longer_ago_it_came():
    """Each token fades all before it to a half: attention of 5 three tokens ago is worth less than 1 now."""
    found, near = push([5, 1, 1, 1, 0, 0], fading=-math.log(2), heavy=1)
    assert found == [None, None, None, 2, 3, 1]
    assert near.heavy_key.item() == 4


def test_a_sink_does_not_compete():
    found, near = push([9, 1, 2, 0, 0], sinks=1, heavy=1)
    assert (near.sink_key.item(), near.heavy_key.item()) == (1, 3)
    assert found == [None, None, None, None, 2]


def test_a_new_token_has_got_nothing_yet():
    _, near = push([3, 4, 5])
    near.push_(Tokens(*(x[..., 0] for x in near.in_order(torch.tensor([3])))), torch.tensor([3]), None)
    assert sorted(near.received.flatten().tolist()) == [0, 5]


def test_hidden_tokens_push_nobody_out():
    _, near = push([3, 4, 5])
    before = {name: x.clone() for name, x in near.tensors().items()}
    none = Tokens(*(torch.zeros_like(x[..., 0]) for x in near.in_order(torch.tensor([3]))))
    gone = near.push_(none, torch.tensor([3]), torch.tensor([False]))
    assert not gone.value.any()
    assert [name for name, x in near.tensors().items() if not torch.equal(x, before[name])] == []


def test_every_tensor_has_its_own_name():
    _, near = push([1, 2, 3])
    copy = Near.from_tensors(near.tensors())
    assert [name for name, x in copy.tensors().items() if x is not near.tensors()[name]] == []
    assert (copy.window, copy.sinks, copy.heavy) == (2, 0, 2)


def test_heavy_tokens_need_a_window():
    with pytest.raises(ArgumentError, match="^heavy: expected 0 without a window, in which .*, got 3"):
        check_reach(2, 0, 1, 3)
    check_reach(2, 1, 0, 3)

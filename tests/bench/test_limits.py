"""Limits count what the method cannot avoid; the numbers here are worked out by hand."""

from __future__ import annotations

import pytest

from taylor_attention.bench import limits
from taylor_attention.bench.limits import chosen_chunk, decode_bytes, moment_bytes, prefill_flops, window_flops
from taylor_attention.core.state import State

# Head size 3, degree 2: M = C(5, 2) = 10 monomials, E = 4 columns. Two heads.


@pytest.mark.parametrize(
    ("tokens", "chunk", "flops"),
    [
        # One chunk: 4 * 5 / 2 = 10 pairs of 2 (3 + 4) FLOPs, and no moments.
        (4, 8, 2 * 10 * 14),
        (4, 4, 2 * 10 * 14),
        # Chunks of 2, 2, 1: 3 + 3 + 1 pairs; 3 tokens read the moments, 4 are added to them, 2 * 10 * 4 FLOPs each.
        (5, 2, 2 * (7 * 14 + 7 * 80)),
    ],
)
def test_flops_of_a_prefill(tokens: int, chunk: int, flops: int):
    assert prefill_flops(tokens, 2, 3, 2, chunk) == flops


@pytest.mark.parametrize(
    ("tokens", "window", "pairs"),
    [(5, 0, 0), (5, 2, 1 + 2 + 2 + 2 + 2), (5, 5, 15), (5, 9, 15)],  # two heads, each pair 2 * 3 + 2 * 3 FLOPs
)
def test_flops_of_a_window(tokens: int, window: int, pairs: int):
    assert window_flops(tokens, 2, 3, window) == 2 * pairs * 12


def test_bytes_of_a_decode_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "tail_size", lambda *sizes: 8)
    # 2 * 10 * 4 float32 are read per token; once per tail of 8 tokens as many again are moved four times.
    assert moment_bytes(2, 3, 2) == 320
    assert decode_bytes(2, 3, 2, 0) == 320 + 4 * 320 // 8
    assert decode_bytes(2, 3, 2, 5) == 320 + 4 * 320 // 8 + 2 * 5 * (3 + 3) * 4  # keys and values of 5 tokens


def test_the_moments_and_the_tail_are_those_of_a_state():
    state = State.zeros(1, 4, 16, 16, 3)
    assert moment_bytes(4, 16, 3) == state.sums.nbytes
    assert decode_bytes(4, 16, 3, 0) == state.sums.nbytes * (1 + 4 / state.tail_key.shape[-1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_chunk_is_the_librarys_or_the_one_asked_for(backend: str):
    assert chosen_chunk(100, 4, 16, 2, backend, 32) == 32
    assert chosen_chunk(100, 4, 16, 2, backend, None) == 100  # short sequences are one chunk
    assert chosen_chunk(2**20, 4, 8, 2, backend, None) < 2**20

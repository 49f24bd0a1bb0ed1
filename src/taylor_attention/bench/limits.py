"""The work that cannot be avoided: FLOPs of a prefill, bytes of a decode step. A figure is a fraction of these limits.

Heads are of one size, values as large as keys: M = C(d + degree, degree) monomials, E = d + 1 columns, float32.
"""

from __future__ import annotations

import torch

from ..core.basis import feature_count
from ..core.cost import cache_size, state_size
from ..core.state import tail_size
from ..ops.backends import uses_kernels
from ..ops.tiling import KERNELS, TORCH, choose

FLOAT_BYTES = 4


def prefill_flops(tokens: int, heads: int, head_dim: int, degree: int, chunk: int) -> int:
    """FLOPs of a causal prefill in chunks, without a state before or after.

    4 M E per token and head (read and update), and the chunk's own causal scores, 2 (d + E) per pair.
    """
    columns, features = head_dim + 1, feature_count(head_dim, degree)
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    across = sum(lengths[1:]) + sum(lengths[:-1])  # the first chunk reads nothing, the last need not be added
    return heads * (2 * (head_dim + columns) * pairs + 2 * features * columns * across)


def window_flops(tokens: int, heads: int, head_dim: int, window: int) -> int:
    """FLOPs of exact attention to the latest tokens: 2 (d + d) for the score and the value of each pair."""
    full = min(window, tokens)  # of a window that is filled; the queries before it see fewer
    pairs = full * (full + 1) // 2 + (tokens - full) * full
    return heads * 4 * head_dim * pairs


def chosen_chunk(tokens: int, heads: int, head_dim: int, degree: int, backend: str, asked: int | None) -> int:
    """The chunk length that the library takes for a causal prefill of one sequence on the CPU."""
    tiling = choose(
        heads,
        1,
        tokens,
        tokens,
        head_dim,
        head_dim + 1,
        degree,
        causal=True,
        has_state=False,
        keep_state=False,
        chunk=asked,
        costs=KERNELS if uses_kernels(backend, torch.device("cpu")) else TORCH,
    )
    return tiling.chunk


def moment_bytes(heads: int, head_dim: int, degree: int) -> int:
    """Bytes of the moments of one sequence; a state allocates as much again for what rounding dropped."""
    return FLOAT_BYTES * state_size(head_dim, degree, kv_heads=heads)


def decode_bytes(heads: int, head_dim: int, degree: int, window: int) -> int:
    """Bytes that a decode step must move.

    The moments, and the keys and values of the window, are read once per token. Once per tail, its tokens are folded
    in: moments and compensation are read and written; the step is charged with its share.
    """
    moments = moment_bytes(heads, head_dim, degree)
    near = FLOAT_BYTES * cache_size(window, head_dim, kv_heads=heads)
    return moments + near + 4 * moments // tail_size(head_dim, head_dim, degree)

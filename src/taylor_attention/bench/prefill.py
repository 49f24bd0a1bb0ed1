"""Causal prefill of the operator against the machine's own GEMM rate, measured by turns in one run.

    python -m taylor_attention.bench.prefill --head-dim 64 --degree 3

Counted are the FLOPs that the method needs: 4 M E per token and head (read and update of M monomials times E = d_V + 1
columns) and the chunk's own causal scores, 2 (d + E) per pair. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from ..core.basis import feature_count
from ..errors import TaylorAttentionError
from ..ops.attention import attention
from ..ops.reference import attention_reference

GEMM_SIZE = 2048


def prefill_flops(tokens: int, heads: int, head_dim: int, degree: int, chunk: int) -> int:
    """FLOPs of a causal prefill in chunks, without a state before or after."""
    columns, features = head_dim + 1, feature_count(head_dim, degree)
    lengths = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    across = sum(lengths[1:]) + sum(lengths[:-1])  # the first chunk reads nothing, the last need not be added
    return heads * (2 * (head_dim + columns) * pairs + 2 * features * columns * across)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    *, tokens: int, heads: int, head_dim: int, degree: int, chunk: int, repeats: int, threads: int
) -> dict[str, float | int]:
    """Median rates of the operator and of a large GEMM, in GFLOP/s, taken by turns.

    Raises:
        TaylorAttentionError: the result is wrong, so that its speed means nothing.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, tokens, head_dim).mul(0.5).unbind(0)  # scores where odd degrees hold
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
    with torch.no_grad():
        part = min(tokens, 2 * chunk)
        few = [x[:, :1, :part] for x in (query, key, value)]
        exact = attention_reference(*few, degree=degree)
        error = float((attention(*few, degree=degree, chunk_size=chunk) - exact).norm() / exact.norm())
        if not error < 2e-5:
            raise TaylorAttentionError(f"prefill: expected a relative error below 2e-5, got {error:.1e}")
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            times[0].append(_seconds(lambda: torch.mm(square, square)))
            times[1].append(_seconds(lambda: attention(query, key, value, degree=degree, chunk_size=chunk)))
    gemm, own = (statistics.median(found[1:]) for found in times)  # the first turn warms up
    gemm_rate = 2 * GEMM_SIZE**3 / gemm / 1e9
    rate = prefill_flops(tokens, heads, head_dim, degree, chunk) / own / 1e9
    return {
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "degree": degree,
        "chunk": chunk,
        "threads": threads,
        "gemm_gflops": round(gemm_rate, 1),
        "prefill_gflops": round(rate, 1),
        "fraction": round(rate / gemm_rate, 3),
        "milliseconds": round(own * 1e3, 1),
    }


def main() -> None:
    """Parse the command line, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"tokens": 2048, "heads": 8, "head-dim": 64, "degree": 3, "chunk": 512, "repeats": 5, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    print(json.dumps(measure(**vars(parser.parse_args()))))  # noqa: T201


if __name__ == "__main__":
    main()

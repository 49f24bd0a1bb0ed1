"""How the work is cut: chunk length, tile of the score matrix, rows (batch x heads) computed together.

The library chooses by a small cost model. Within a chunk of C tokens the scores cost C/2 pairs per token; across chunks
the moments cost a fixed amount per token, and nothing at all if there is a single chunk and no state. So short
sequences are one chunk and long ones are cut where the moments take over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..core.basis import feature_count
from ..core.moments import formed_count


@dataclass(frozen=True)
class Costs:
    """What a backend's work costs, in FLOPs of its large products."""

    score: float  # the elementwise passes over one score: polynomial, mask
    formed: float  # forming one monomial of one token
    call: float  # one step of the host on a small operand
    chunk: float  # starting a chunk, whatever its size
    settled: float  # adding to one element of the moments, once per chunk
    tile: int  # most queries whose scores are computed together; what they see after themselves is lost work


# Fitted to timings of this package's own loops on x86 machines.
TORCH = Costs(score=100, formed=65, call=4e5, chunk=0, settled=0, tile=256)
KERNELS = Costs(score=8, formed=6, call=0, chunk=1e5, settled=60, tile=16)

_WORKSPACE = 6 * 2**20  # elements that the tensors of one step may take together: stays near the caches
_CHUNKS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Tiling:
    """The cut of one problem: chunk length, queries per score tile, rows at once; direct: scores alone, no moments."""

    chunk: int
    rows: int
    together: int
    direct: bool


@lru_cache(maxsize=1024)
def choose(
    rows: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    columns: int,
    degree: int,
    *,
    causal: bool,
    has_state: bool,
    keep_state: bool,
    chunk: int | None = None,
    costs: Costs = TORCH,
) -> Tiling:
    """The cheapest cut by the cost model, or the one with the given chunk.

    Args:
        rows: batch x key/value heads. group: query heads per key/value head. columns: E = value_dim + 1.
        queries, keys: lengths. chunk: what the caller asked for, if anything. costs: the backend's.
    """
    features = feature_count(head_dim, degree)
    per_pair = (2 * (head_dim + columns) + costs.score) * group
    per_moment = 2 * features * columns + costs.formed * formed_count(head_dim, degree)
    calls = (
        costs.call * (20 + 2 * head_dim * max(degree - 1, 0)) / rows + costs.chunk + costs.settled * features * columns
    )

    def causal_cost(length: int) -> float:
        steps = -(-keys // length)
        reads = group * (keys if has_state else keys - min(length, keys))
        updates = keys if keep_state else keys - min(length, keys)
        pairs = keys * (min(length, keys) + min(length, _rows(length, group), costs.tile)) / 2
        return pairs * per_pair + (reads + updates) * per_moment + steps * calls

    if causal:
        length = chunk or min((*_CHUNKS, max(keys, 1)), key=causal_cost)
        direct = length >= keys
    else:
        length = chunk or _CHUNKS[-1]
        saved = group * queries * (0 if has_state else 1) + (0 if keep_state else keys)
        direct = queries * keys * per_pair <= saved * per_moment
    length = max(1, min(length, max(queries, keys)))
    tile = _rows(keys if direct else length, group)
    needed = 2 * formed_count(head_dim, degree) * group * min(length, 512) + 3 * group * tile * (
        keys if direct else length
    )
    return Tiling(length, tile, max(1, _WORKSPACE // max(needed, 1)), direct)


def _rows(keys: int, group: int) -> int:
    """Queries per tile of scores: fewer where many keys stand against them."""
    return max(32, min(256, 2**20 // max(keys * group, 1)))

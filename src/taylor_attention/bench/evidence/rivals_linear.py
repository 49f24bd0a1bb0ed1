"""Two linear rivals whose state is a matrix per head: elu + 1 linear attention, and the delta rule.

Both are written over all tokens at once, for training on short sequences; as a recurrence, S [d, d_V] is their state:
elu + 1 (Katharopoulos et al. 2020): S += f(k) v^T, z += f(k), y = S^T f(q) / z.f(q), with f(x) = elu(x) + 1;
delta rule (Schlag et al. 2021, Yang et al. 2024): S += b k (v - S^T k)^T with |k| = 1 and b in (0, 1), y = S^T q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend_elu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal linear attention with the features elu + 1: query, key [B, H, T, d], value [B, H, T, d_V] -> as value."""
    query, key = functional.elu(query) + 1, functional.elu(key) + 1
    weights = (query @ key.mT).tril()  # [B, H, T, T]
    return weights @ value / weights.sum(-1, keepdim=True)


def attend_delta(query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
    """The delta rule over all tokens: query, key [B, H, T, d], value [B, H, T, d_V], rate [B, H, T] -> as value.

    Queries and keys are scaled to length 1. What token t writes, u_t = b_t (v_t - sum over i < t of (k_t.k_i) u_i), is
    the solution of one triangular system; then y_t = sum over i <= t of (q_t.k_i) u_i.
    """
    query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
    mixing = (rate[..., None] * (key @ key.mT)).tril(-1)  # [B, H, T, T]; the solver takes the diagonal for ones
    written = torch.linalg.solve_triangular(mixing, rate[..., None] * value, upper=False, unitriangular=True)
    return (query @ key.mT).tril() @ written

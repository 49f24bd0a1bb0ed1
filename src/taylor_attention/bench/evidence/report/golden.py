"""What the page's calculator must find, computed by `core`: the page checks itself by it, and shows a difference."""

from __future__ import annotations

from itertools import product
from typing import Any

from ....core.cost import plan
from ....core.series import expected_error

COUNTED = (
    "state_elements",
    "state_bytes_per_layer",
    "state_bytes",
    "cache_bytes_per_layer",
    "cache_bytes",
    "flops_per_token",
    "cache_flops_per_token",
    "break_even_memory",
    "break_even_flops",
)
"""Fields of a `Plan` that the calculator has too."""

_BASE: dict[str, Any] = {
    "heads": 8,
    "kv_heads": None,
    "head_dim": 16,
    "value_dim": None,
    "degree": 2,
    "layers": 1,
    "context": 1000,
    "window": 0,
    "sinks": 0,
    "heavy": 0,
    "dtype": "float32",
    "cache_dtype": None,
}
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"degree": 0, "context": 0},
    {"degree": 1, "head_dim": 1, "heads": 1},
    {"heads": 32, "kv_heads": 8, "head_dim": 64, "layers": 24, "context": 1_000_000, "cache_dtype": "float16"},
    {"head_dim": 8, "degree": 5, "value_dim": 24, "dtype": "float64"},
    {"window": 256, "sinks": 4, "heavy": 16, "kv_heads": 2, "value_dim": 7},
    {"degree": None, "window": 64, "sinks": 4, "dtype": "bfloat16"},
    {"heads": 128, "head_dim": 256, "degree": 12, "layers": 100, "context": 10**12},  # beyond 2^53
)
_SCORES = tuple(product((0.0, 0.3, 1.0, 3.0), (0, 2, 5), (0.0, -1.5)))
"""Spreads, degrees and means."""


def compute_golden() -> dict[str, Any]:
    """Cases and their results, ready for JSON: integers as text, since JavaScript's numbers end at 2^53."""
    asked = [_BASE | change for change in _CHANGES]
    plans = [plan(**each).to_dict() for each in asked]
    return {
        "plans": [
            {"asked": each, "found": {name: str(made[name]) for name in COUNTED}}
            for each, made in zip(asked, plans, strict=True)
        ],
        "errors": [
            {
                "std": std,
                "degree": degree,
                "mean": mean,
                "taylor": expected_error(std, degree, mean=mean),
                "fitted": expected_error(std, degree, mean=mean, fitted=True),
            }
            for std, degree, mean in _SCORES
        ],
    }

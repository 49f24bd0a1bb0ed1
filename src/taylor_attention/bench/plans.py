"""What a run of the benchmark measures: a full one, a quick one, and what options say instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cases import DECODE, KINDS, PREFILL, Case, Settings, plan_cases

FULL: dict[str, Any] = {
    "only": KINDS,
    "window": (0, 64, 256),
    "head_dim": (8, 16, 32, 64),
    "degree": (2, 3, 4),
    "context": (*(16 * 4**i for i in range(9)), 10 * 2**20),
    "length": (128, 512, 1024, 2048, 4096, 8192),
    "repeats": Settings.repeats,
    "budget": Settings.budget,
}
FULL_NEAR = FULL | {
    "only": (PREFILL, DECODE),
    "degree": (2, 3),
    "context": (1024, 65536),
    "length": (8192,),
}
"""With a window: fewer, so that a full run takes half an hour at most."""

QUICK: dict[str, Any] = {
    "only": KINDS,
    "window": (0, 64),
    "head_dim": (16, 64),
    "degree": (2,),
    "context": (1024, 65536),
    "length": (512, 1024),
    "repeats": 3,
    "budget": 0.2,
}
QUICK_NEAR = QUICK | {"only": (PREFILL, DECODE)}

SHAPE = ("only", "head_dim", "degree", "context", "length")
"""What a plan is made of, besides windows."""


def plan(asked: Mapping[str, Any], quick: bool) -> list[Case]:
    """The cases that are asked for, with defaults where nothing is, others where there is a window."""
    defaults, near = (QUICK, QUICK_NEAR) if quick else (FULL, FULL_NEAR)
    cases = []
    for window in sorted(set(asked.get("window") or defaults["window"])):
        kinds, head_dims, degrees, contexts, lengths = (
            asked.get(name) or (near if window else defaults)[name] for name in SHAPE
        )
        cases += plan_cases(kinds, head_dims, degrees, contexts=contexts, lengths=lengths, window=window)
    return list(dict.fromkeys(cases))  # some kinds know no window

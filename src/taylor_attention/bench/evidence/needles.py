"""Planted needles: what each way of attending makes of a few keys that stand out of a long background.

`taylor-attention needles` measures the same at other sizes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..needles import Bench
from ..needles_plan import in_order
from .experiment import Case, Experiment
from .needles_cases import plan, settle
from .needles_shown import conclusions, pictures, tables


def measure(case: Case, seed: int) -> dict[str, Any]:
    """The methods' errors at every planting, one for each stream."""
    settings, sweeps = settle(case, seed)
    bench = Bench(replace(settings, threads=torch.get_num_threads()))
    return {"results": [asdict(bench.measure(planting)) for planting in in_order(sweeps)]}


EXPERIMENT = Experiment(
    "needles",
    "Keys that stand out",
    "What is left of a key that stands out: in a window, beyond it, by its series, and kept exact for its importance?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

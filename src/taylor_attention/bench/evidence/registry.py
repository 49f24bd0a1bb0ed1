"""The experiments there are, and what is told, in this order."""

from __future__ import annotations

from . import (
    capacity,
    length,
    needles,
    precision,
    pretrained,
    recall,
    reconstruction,
    runtime,
    score_map,
    sizes,
    speed,
    training,
)
from .experiment import Experiment, Topic

_ALL = (
    sizes.EXPERIMENT,
    precision.EXPERIMENT,
    reconstruction.EXPERIMENT,
    runtime.EXPERIMENT,
    score_map.EXPERIMENT,
    needles.EXPERIMENT,
    training.EXPERIMENT,
    length.EXPERIMENT,
    capacity.EXPERIMENT,
    recall.EXPERIMENT,
    pretrained.EXPERIMENT,
)

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in _ALL}
"""By name; `taylor-attention reproduce` measures them."""

TOPICS: dict[str, Topic] = {**EXPERIMENTS, speed.TOPIC.name: speed.TOPIC}
"""By name: what the report tells."""

"""The experiments there are, in the order in which they are told."""

from __future__ import annotations

from . import capacity, length, precision, pretrained, recall, reconstruction, runtime, score_map, sizes, training
from .experiment import Experiment

_ALL = (
    sizes.EXPERIMENT,
    precision.EXPERIMENT,
    reconstruction.EXPERIMENT,
    runtime.EXPERIMENT,
    score_map.EXPERIMENT,
    training.EXPERIMENT,
    length.EXPERIMENT,
    capacity.EXPERIMENT,
    recall.EXPERIMENT,
    pretrained.EXPERIMENT,
)

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in _ALL}

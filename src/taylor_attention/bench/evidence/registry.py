"""The experiments there are, in the order in which they are told."""

from __future__ import annotations

from . import length, sizes, training
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each for each in (sizes.EXPERIMENT, training.EXPERIMENT, length.EXPERIMENT)
}

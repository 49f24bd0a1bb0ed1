"""Recall: what small models learn to look up in their context, against the bytes of their state."""

from __future__ import annotations

from .experiment import Case, Experiment
from .recall_models import Mixer
from .recall_report import conclusions, pictures, tables
from .recall_tasks import TASKS
from .recall_training import measure

STEPS = {"mqar": 400, "phone book": 400, "copy": 300, "induction": 100, "needles": 400}
"""Training steps; in the fewer ones of a quick look softmax learns the task, and others not all that they can."""

_QUICK_STEPS = 150
_WINDOW, _SINKS, _HEAVY = 16, 2, 8

_TAYLOR = [Mixer("taylor", head_dim, degree=degree) for head_dim, degree in ((4, 2), (8, 2), (4, 4), (16, 2), (8, 4))]
_HYBRID = Mixer("taylor", 8, degree=2, window=_WINDOW)

MIXERS = [
    Mixer("softmax"),
    *_TAYLOR,
    _TAYLOR[1].with_window_of(_TAYLOR[1].state_bytes(0)),
    _TAYLOR[3].with_window_of(_TAYLOR[3].state_bytes(0)),
    _HYBRID,
    Mixer("taylor", 8, degree=2, window=_WINDOW - _HEAVY, sinks=_SINKS, heavy=_HEAVY),
    Mixer("elu", 16),
    Mixer("elu", 64),
    Mixer("delta", 16),
    Mixer("delta", 64),
]
"""All of them on associative recall; on the other tasks some."""

SOME = [MIXERS[i] for i in (0, 2, 4, 5, 6, 8, 11, 13)]


def plan(quick: bool) -> list[Case]:
    """Tasks and contestants: of each family one on associative recall for a quick look."""
    if quick:
        return [_case("mqar", MIXERS[i], _QUICK_STEPS) for i in (0, 2, 6, 8, 11, 13)]
    chosen = {task: MIXERS if task == "mqar" else SOME for task in TASKS}
    return [_case(task, mixer, STEPS[task]) for task, mixers in chosen.items() for mixer in mixers]


def _case(task: str, mixer: Mixer, steps: int) -> Case:
    return {"task": task, "steps": steps, **mixer.to_dict()}


EXPERIMENT = Experiment(
    "recall",
    "What is remembered, and in how many bytes",
    "How much of its context can a model look up with a state of so many bytes?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

"""What attention costs on a machine, beside softmax, the plain recurrence, rivals and the machine's own limits.

`taylor-attention bench` measures it; this tells it.
"""

from __future__ import annotations

from dataclasses import asdict

from .. import plans
from .experiment import Case, Topic
from .speed_drawn import pictures
from .speed_shown import conclusions, tables


def plan(quick: bool) -> list[Case]:
    """What a run without options measures."""
    return [asdict(case) for case in plans.plan({}, quick)]


TOPIC = Topic(
    "speed",
    "What it costs on a CPU",
    "How fast are prefill, decoding and training, beside softmax, other code and what the machine can do?",
    plan,
    tables,
    pictures,
    conclusions,
    command="taylor-attention bench",
)

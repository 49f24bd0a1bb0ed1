"""Training a contestant on a task and asking it: a function of the case and the seed alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...core.threads import thread_count
from .recall_models import Mixer, RecallModel
from .recall_tasks import IGNORED, TASKS, Task

TOKENS = 2048
"""Of a batch, or a little fewer."""

RATE, WARM = 1e-2, 0.1
"""Largest learning rate of AdamW, and the part of the steps in which it rises to it; it falls to 0 by a cosine."""

_ASKED = 512  # answers per size, at least
_PIECE = 2**13  # tokens that are asked at once


def train(mixer: Mixer, task: Task, steps: int, seed: int) -> tuple[RecallModel, list[float]]:
    """A model after so many steps, each on sequences of one size drawn anew, and its loss in ten stretches."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = RecallModel(mixer, task.symbols)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    losses = []
    for _ in range(steps):
        size = task.train[int(torch.randint(len(task.train), (1,), generator=generator))]
        tokens, targets = task.draw(generator, max(1, TOKENS // task.tokens(size)), size, False)
        asked = targets != IGNORED
        loss = functional.cross_entropy(model(tokens, asked), targets[asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    stretches = torch.tensor(losses).tensor_split(10)
    return model.eval(), [stretch.mean().item() for stretch in stretches if len(stretch)]


def _rate(part: float) -> float:
    return min(1.0, (part + 1e-3) / WARM) * (0.5 + 0.5 * math.cos(math.pi * part))


@torch.no_grad()
def ask(model: RecallModel, task: Task, size: int, seed: int) -> float:
    """The part of answers that are right, every symbol of them, on sequences of a size that were not trained on."""
    generator = torch.Generator().manual_seed(seed + 2)
    right: list[Tensor] = []
    while sum(map(len, right)) < _ASKED:
        tokens, targets = task.draw(generator, max(1, _PIECE // task.tokens(size)), size, True)
        asked = targets != IGNORED
        good = model(tokens, asked).argmax(-1) == targets[asked]
        right.append(good.view(-1, task.answer).all(-1))
    return torch.cat(right).double().mean().item()


def measure(case: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and ask at every size of the task."""
    task, steps = TASKS[case["task"]], case["steps"]
    mixer = Mixer(**{name: value for name, value in case.items() if name not in ("task", "steps")})
    with thread_count(1):
        model, losses = train(mixer, task, steps, seed)
        accuracy = {str(size): ask(model, task, size, seed) for size in task.test}
    return {
        "accuracy": accuracy,
        "state_bytes": {str(size): mixer.state_bytes(task.tokens(size)) for size in task.test},
        "losses": losses,
        "parameters": sum(each.numel() for each in model.parameters()),
    }

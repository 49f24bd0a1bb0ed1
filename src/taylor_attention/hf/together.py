"""Learning the far parts of all layers at once, through the whole model, after each has been learned alone.

A layer that is learned alone sees what softmax layers hand it. In use it sees what the other far parts hand it, and
small errors of outputs add up. Here the model itself reads with far parts in all its layers, and key centres, maps and
gains learn to make its next-token distribution that of the same model with softmax: by the Kullback-Leibler divergence
from the latter, which getting used to the texts cannot lower, as it could a loss of the texts' own tokens. The model's
weights do not change; a piece of text costs two forward passes and one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import expect, expect_int
from . import layer_tensors
from .centres import NAME as CENTRE
from .distilled import Distilled
from .far_maps import FarMap, with_offsets
from .models import check_settings, sizes_of, text_config
from .profiling.effect import divergence, log_shares, using
from .settings import HeadSettings, ModelSettings
from .unfinished import keep, mark, put_back, take_up, tensors_of

RATE, SHARE = 0.05, 0.03
"""Learning rates, at their highest, of gains and offsets, and of centres and maps as a share of their typical entry."""

WARM = 4
"""Steps until the learning rate is at its highest."""

_POSITION = "together.safetensors"


class Student(nn.Module):
    """The small parts of all layers, while they are learned together.

    Args:
        learned: where they start from.
        total: tokens that it will learn from, for the learning rate.
    """

    def __init__(self, learned: Distilled, total: int) -> None:
        super().__init__()
        self.total, self.tokens, self.steps = total, 0, 0
        self.layers = list(map(_parameters, learned.centres, learned.maps))
        for index, each in enumerate(self.layers):
            self.add_module(str(index), each)
        rates = [
            (x, RATE if name.endswith(("gain", "offset")) else SHARE * float(x.detach().square().mean().sqrt()))
            for name, x in self.named_parameters()
        ]
        groups = [{"params": [x], "lr": rate, "top": rate} for x, rate in rates]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))

    def tensors_of_layers(self) -> list[dict[str, Tensor]]:
        """What each attention layer uses, by name, with gradients to the parameters."""
        found = []
        for each in self.layers:
            query_map = with_offsets(each["query_map"], each["query_offset"])
            maps = FarMap(query_map, with_offsets(each["key_map"], each["key_offset"]), each["gain"])
            found.append({CENTRE: each["centre"], **maps._asdict()})
        return found

    def learn(self, loss: Callable[[], Tensor], tokens: int) -> float:
        """One step down this loss of so many tokens, which is returned as it was before."""
        share = (1 + math.cos(math.pi * (self.tokens + tokens / 2) / self.total)) / 2
        self.tokens, self.steps = self.tokens + tokens, self.steps + 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * min(1.0, self.steps / WARM) * (0.05 + 0.95 * share)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            found = loss()
            found.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return float(found.detach())

    def result(self, settings: ModelSettings) -> Distilled:
        """What was learned."""
        layers = [{name: x.detach().clone() for name, x in each.items()} for each in self.tensors_of_layers()]
        centres = [each.pop(CENTRE) for each in layers]
        return Distilled(settings, centres, [FarMap(**each) for each in layers])

    def tensors(self) -> dict[str, Tensor]:
        """Everything to go on from."""
        counts = {"tokens": torch.tensor(self.tokens), "steps": torch.tensor(self.steps)}
        return tensors_of(self, self.optimizer) | counts

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; KeyError or RuntimeError if it is of another model."""
        put_back(self, self.optimizer, tensors)
        self.tokens, self.steps = int(tensors["tokens"]), int(tensors["steps"])


def learn_together(
    model: Any,
    learned: Distilled,
    pieces: Sequence[Tensor],
    *,
    positions: int = 1024,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    notify: Callable[[float], None] | None = None,
) -> Distilled:
    """Go on learning what `distill` learned, in all layers at once, by the next-token distributions of the whole model.

    Args:
        model: the one that was learned from.
        learned: to start from; its settings stay.
        pieces: of text, int64 [T] each: one step from each (see `parts`).
        positions: of each piece at which next-token distributions are compared, of those that see far tokens.
        seed: of the choice of positions.
        folder: where what is learned so far is written after each piece; None: nowhere.
        resume: go on from there.
        notify: called after each piece with its mean divergence from softmax before the step, in nats per token.

    Raises:
        ArgumentError: an argument is not as above, or no piece is longer than the windows.
        StorageError: the folder cannot be written, or holds the work on other texts, settings or maps.
    """
    check_settings(learned.settings, text_config(model))
    expect_int("positions", positions, 1)
    sizes = sizes_of(text_config(model))
    reach = _reach([head for layer in range(sizes.layers) for head in learned.settings.layer(layer, sizes.kv_heads)])
    shortest = min(map(len, pieces), default=0)
    expect(shortest > reach, "pieces", f"more than {reach} tokens each, as many as a window and sinks", shortest)
    student = Student(learned, sum(map(len, pieces)))
    start = mark([*learned.centres, *(x for each in learned.maps for x in each)])
    about = {"texts": mark(pieces), "settings": str(learned.settings.to_dict()), "start": start}
    about |= {"numbers": str((positions, seed))}
    first = take_up(Path(folder, _POSITION), [student], about) if folder is not None and resume else 0
    for number in range(first, len(pieces)):
        draw = torch.Generator().manual_seed(seed + number)
        asked = (reach + torch.randperm(len(pieces[number]) - reach, generator=draw)[:positions]).sort().values
        with _frozen(model):
            found = _step(model, student, learned.settings, pieces[number], asked)
        if folder is not None:
            student.result(learned.settings).save(folder)
            keep(Path(folder, _POSITION), [student], about, number + 1)
        if notify is not None:
            notify(found)
    return student.result(learned.settings)


def parts(pieces: Sequence[Tensor], settings: ModelSettings, tokens: int, seed: int = 0) -> list[Tensor]:
    """What to learn from, of so many tokens of these texts at most: short parts of some, then others whole.

    A third of the tokens goes into parts eight times as long as the shortest window with sinks, which are many steps
    for little time; the rest into whole pieces, since what is learned from short texts alone weighs far tokens too much
    in longer ones. The order is by chance, and there is one whole piece at least.
    """
    expect_int("tokens", tokens, 1)
    expect(len(pieces) > 0, "pieces", "at least one", "none")
    draw = torch.Generator().manual_seed(seed)
    order = _shuffled(pieces, draw)
    whole = order[: max(1, 2 * tokens // (3 * max(map(len, pieces))))]
    length = 8 * _reach([settings.default, *settings.heads.values()])
    short = [part for piece in order[len(whole) :] for part in piece.split(length) if len(part) == length]
    return _shuffled(short, draw)[: tokens // (3 * length)] + whole


def _shuffled(pieces: Sequence[Tensor], draw: torch.Generator) -> list[Tensor]:
    return [pieces[index] for index in torch.randperm(len(pieces), generator=draw).tolist()]


def _step(model: Any, student: Student, settings: ModelSettings, piece: Tensor, positions: Tensor) -> float:
    """One step from the next-token distributions at these positions; their mean divergence before it."""
    with using(model, None), torch.no_grad():
        exact = log_shares(model, piece, positions)

    def loss() -> Tensor:
        return divergence(exact, log_shares(model, piece, positions))

    with using(model, settings), torch.enable_grad(), layer_tensors.lending(model, student.tensors_of_layers()):
        return student.learn(loss, len(piece))


def _reach(heads: Sequence[HeadSettings]) -> int:
    """The first position, from 0, at which one of these heads with a far part sees far tokens."""
    reaches = [head.window + head.sinks for head in heads if head.window is not None and head.far_dim is not None]
    expect(bool(reaches), "settings", "heads with a far part", "none in all")
    return min(reaches)


def _parameters(centre: Tensor, maps: FarMap) -> nn.ParameterDict:
    (query_map, query_offset), (key_map, key_offset) = maps.parts(centre.shape[1])
    named = {"centre": centre, "query_map": query_map, "query_offset": query_offset}
    named |= {"key_map": key_map, "key_offset": key_offset, "gain": maps.gain}
    return nn.ParameterDict({name: nn.Parameter(x.detach().clone()) for name, x in named.items()})


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient be made for the model's weights inside the block; then as before."""
    wanted = [x for x in model.parameters() if x.requires_grad]
    for x in wanted:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in wanted:
            x.requires_grad_(True)

"""Learning far maps for a pretrained model: each layer's attention is brought near to what softmax gives it.

The model reads pieces of text as it is. Every layer's queries, keys and values are seen as they meet (see
`profiling.observe`); from some of its queries the layer's maps learn to make the output of near and far tokens together
that of softmax, by its relative squared error, head by head. Weights of the model do not change, and no layer sees what
the others do, so a piece costs one forward pass and a few steps for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.threads import thread_count
from ..errors import expect, expect_int
from .distilled import Distilled
from .learner import Learner
from .models import check_settings, sizes_of, text_config
from .profiling.observe import Observation, observing
from .settings import ModelSettings
from .unfinished import keep, mark, take_up

_POSITION = "position.safetensors"


def _here(seen: Observation) -> Observation:
    """The same on the CPU, where maps are learned wherever the model runs."""
    return replace(seen, query=seen.query.cpu(), key=seen.key.cpu(), value=seen.value.cpu())


def distill(
    model: Any,
    pieces: Sequence[Tensor],
    settings: ModelSettings,
    *,
    steps: int = 5,
    queries: int = 32,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    notify: Callable[[list[float]], None] | None = None,
) -> Distilled:
    """Learn far maps for a model from texts.

    Args:
        model: a language model of transformers, of plain causal attention.
        pieces: of text, int64 [T] each.
        settings: what heads keep, as `with_far_maps` makes them.
        steps: for each layer and piece.
        queries: that a step looks at.
        seed: of the choice of queries.
        folder: where what is learned so far is written after each piece; None: nowhere.
        resume: go on from there.
        notify: called after each piece with every layer's mean relative squared error.

    Raises:
        ArgumentError: an argument is not as above, or no piece is longer than the windows.
        StorageError: the folder cannot be written, or holds the work on other texts or settings.
    """
    sizes, config = sizes_of(text_config(model)), text_config(model)
    check_settings(settings, config)
    for name, count in {"steps": steps, "queries": queries}.items():
        expect_int(name, count, 1)
    total = steps * len(pieces)
    learners = [Learner(settings.layer(index, sizes.kv_heads), sizes, total) for index in range(sizes.layers)]
    expect(any(each.has_far for each in learners), "settings", "heads that drop tokens", "softmax in all")
    reach = min(int((each.windows + each.sinks).min()) for each in learners)
    shortest = min(map(len, pieces), default=0)
    expect(shortest > reach, "pieces", f"more than {reach} tokens each, as many as a window and sinks", shortest)
    about = {"texts": mark(pieces), "settings": str(settings.to_dict()), "numbers": str((steps, queries, seed))}
    first = take_up(Path(folder, _POSITION), learners, about) if folder is not None and resume else 0
    for number in range(first, len(pieces)):
        errors = _learn(model, learners, pieces[number], steps, queries, seed + number)
        if folder is not None:
            _result(learners, settings).save(folder)
            keep(Path(folder, _POSITION), learners, about, number + 1)
        if notify is not None:
            notify(errors)
    return _result(learners, settings)


@torch.no_grad()
def choose(
    model: Any, learned: Distilled, pieces: Sequence[Tensor], *, queries: int = 96, share: float = 0.9
) -> Distilled:
    """Leave the far part out of every head where it does not earn its bytes; what was learned for the others stays.

    Args:
        model: the one that was learned from.
        pieces: of text, int64 [T] each, that were not learned from.
        queries: of each piece that are looked at, evenly over all that have far tokens.
        share: a head keeps its far part if that leaves at most this share of the error of far tokens dropped.

    Raises:
        ArgumentError: a piece has no tokens that are far.
    """
    sizes = sizes_of(text_config(model))
    learners = [Learner(learned.settings.layer(index, sizes.kv_heads), sizes, 1) for index in range(sizes.layers)]
    reach = max(min(int((each.windows + each.sinks).min()) for each in learners), 1)
    shortest = min(map(len, pieces), default=0)
    expect(shortest > reach, "pieces", f"more than {reach} tokens each, as many as a window and sinks", shortest)
    found = torch.zeros(2, sizes.layers, sizes.kv_heads, dtype=torch.float64)

    def receive(there: Observation) -> None:
        seen = _here(there)
        learner = learners[seen.layer]
        learner.take(learned.centres[seen.layer], learned.maps[seen.layer], seen.scale)
        gain, none = learner.gain.clone(), torch.full_like(learner.gain, -torch.inf)
        positions = torch.linspace(reach, seen.key.shape[1] - 1, queries).long()
        for way, each in enumerate((none, gain)):
            learner.gain.copy_(each)
            found[way, seen.layer] += learner.errors(seen, positions).sum(1)

    with observing(model, receive):
        for piece in pieces:
            model.base_model(input_ids=piece.to(model.device)[None], use_cache=False)
    heads = {}
    for layer in range(sizes.layers):
        for head, kept in enumerate(learned.settings.layer(layer, sizes.kv_heads)):
            earns = bool(found[1, layer, head] <= share * found[0, layer, head])
            drops = kept.far_dim is not None and not earns
            heads[layer, head] = replace(kept, degree=None, far_dim=None) if drops else kept
    return replace(learned, settings=ModelSettings(learned.settings.default, heads))


def _learn(model: Any, learners: list[Learner], piece: Tensor, steps: int, queries: int, seed: int) -> list[float]:
    """A few steps of every layer from one piece; each layer's mean error.

    As many layers as there are threads learn side by side, on one thread each, while the model waits: their products
    are too small to share.
    """
    found = [0.0] * len(learners)
    waiting: list[Observation] = []

    def learn(seen: Observation) -> None:
        learner = learners[seen.layer]
        draw = torch.Generator().manual_seed(seed * 1009 + seen.layer)
        low = min(int((learner.windows + learner.sinks).min()), len(piece) - 1)
        for _ in range(steps):
            positions = torch.randint(low, len(piece), (queries,), generator=draw)
            found[seen.layer] += learner.learn(seen, positions) / steps

    def learn_all() -> None:
        with thread_count(1), ThreadPoolExecutor(max(1, len(waiting))) as pool:
            list(pool.map(learn, waiting))
        waiting.clear()

    def receive(seen: Observation) -> None:
        if learners[seen.layer].has_far:
            waiting.append(_here(seen))
        if len(waiting) >= torch.get_num_threads():
            learn_all()

    with observing(model, receive), torch.no_grad():
        model.base_model(input_ids=piece.to(model.device)[None], use_cache=False)
        learn_all()
    return found


def _result(learners: list[Learner], settings: ModelSettings) -> Distilled:
    centres, maps = zip(*(each.result() for each in learners), strict=True)
    return Distilled(settings, list(centres), list(maps))

"""Learning far maps for a pretrained model: each layer's attention is brought near to what softmax gives it.

The model reads pieces of text as it is. Every layer's queries, keys and values are seen as they meet (see
`profiling.observe`); from some of its queries the layer's maps learn to make the output of near and far tokens together
that of softmax, by its relative squared error, head by head. Weights of the model do not change, and no layer sees what
the others do, so a piece costs one forward pass and a few steps for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.series import EXP
from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError, expect, expect_int
from .distilled import Distilled
from .far_maps import FarMap
from .models import Sizes, check_settings, sizes_of, text_config
from .profiling.observe import Observation, observing
from .settings import HeadSettings, ModelSettings

KIND = "distillation"
RATE, MAP_RATE = 1e-2, 3e-3
"""Learning rates, at their highest, of gains and centres, and of maps."""

_POSITION = "position.safetensors"

_SOFTMAX = 2**31
"""Stands for the window of a softmax head, which has nothing far."""


class Learner(nn.Module):
    """The maps of one layer, while they are learned.

    Args:
        heads: what each key/value head keeps, with far maps.
        sizes: of the model.
        total: steps that there will be, for the learning rate.
    """

    def __init__(self, heads: Sequence[HeadSettings], sizes: Sizes, total: int) -> None:
        super().__init__()
        self.total, self.step = total, 0
        self.scale = 1.0  # of the layer's scores: maps are learned for scaled queries
        self.is_begun = False
        far = [head.far_dim for head in heads if head.far_dim is not None]
        degrees = {head.degree for head in heads if head.degree is not None}
        self.coefficients = EXP.coefficients(max(degrees, default=0))
        windows = [_SOFTMAX if head.window is None else head.window for head in heads]
        self.windows, self.sinks = torch.tensor(windows), torch.tensor([head.sinks for head in heads])
        wide, (_, count, kv_heads, head_dim) = max(far, default=1), sizes
        self.centre = nn.Parameter(torch.zeros(kv_heads, head_dim))
        self.query_map = nn.Parameter(torch.zeros(kv_heads, count // kv_heads, head_dim, wide))
        self.key_map = nn.Parameter(torch.zeros(kv_heads, head_dim, wide))
        self.gain = nn.Parameter(torch.zeros(kv_heads, count // kv_heads))
        fast, slow = [self.centre, self.gain], [self.query_map, self.key_map]
        rates = [{"params": fast, "lr": RATE, "top": RATE}, {"params": slow, "lr": MAP_RATE, "top": MAP_RATE}]
        self.optimizer = torch.optim.Adam(rates)

    @property
    def has_far(self) -> bool:
        """Whether some head of the layer drops tokens."""
        return bool((self.windows < _SOFTMAX).any())

    @torch.no_grad()
    def begin(self, seen: Observation) -> None:
        """Start from the mean key, and from the entries in which scores differ most."""
        query, key = _grouped(seen), seen.key.float()
        self.scale = seen.scale
        self.centre.copy_(key.mean(1))
        key = key - self.centre[:, None]
        root, inverse = _roots(key.mT @ key / key.shape[1])
        asked = query.flatten(1, 2)
        _, axes = torch.linalg.eigh(root @ (asked.mT @ asked / asked.shape[1]) @ root)
        axes = axes[..., -self.key_map.shape[2] :]  # q . k = (q root axes) . (axes^T inverse k), the largest of it
        self.query_map.copy_((root @ axes)[:, None].expand_as(self.query_map))
        self.key_map.copy_(inverse @ axes)
        self.is_begun = True

    def learn(self, seen: Observation, positions: Tensor) -> float:
        """One step from the queries at these positions, int64 [n]; the mean relative squared error before it."""
        if not self.is_begun:
            self.begin(seen)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * (0.05 + 0.95 * (1 + math.cos(math.pi * self.step / (self.total + 1))) / 2)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            errors = self.errors(seen, positions)
            loss = errors[self.windows < _SOFTMAX].sum()
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return float(errors.detach()[self.windows < _SOFTMAX].mean())

    def errors(self, seen: Observation, positions: Tensor) -> Tensor:
        """Relative squared error of the outputs of some queries, [Hkv, G]."""
        query, key, value = _grouped(seen)[:, :, positions], seen.key.float(), seen.value.float()
        scores = torch.einsum("hgnd,htd->hgnt", query, key - self.centre[:, None])
        place = torch.arange(key.shape[1])
        visible = place <= positions[:, None]
        near = place > positions[:, None] - self.windows[:, None, None]
        near = (near | (place < self.sinks[:, None, None])) & visible  # [Hkv, n, T]
        with torch.no_grad():
            exact = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[:, None]
            top = scores.masked_fill(~near[:, None], -torch.inf).amax(-1, keepdim=True)
        asked = torch.einsum("hgnd,hgdf->hgnf", query, self.query_map)
        far = torch.einsum("hgnf,htf->hgnt", asked, (key - self.centre[:, None]) @ self.key_map)
        weight = torch.zeros_like(far)
        for coefficient in reversed(self.coefficients):
            weight = weight * far + coefficient
        weight = weight * (self.gain[..., None, None] - top).clamp(max=40).exp()
        weight = weight * (visible & ~near)[:, None] + (scores - top).exp() * near[:, None]
        found = weight @ value[:, None] / weight.sum(-1, keepdim=True)
        return (found - exact).square().sum((2, 3)) / exact.square().sum((2, 3))

    @torch.no_grad()
    def take(self, centre: Tensor, maps: FarMap, scale: float) -> None:
        """Take over what `result` gave."""
        self.scale = scale
        self.centre.copy_(centre)
        self.query_map.copy_(maps.query_map.view_as(self.query_map) / scale)
        self.key_map.copy_(maps.key_map)
        self.gain.copy_(maps.gain.view_as(self.gain))

    def result(self) -> tuple[Tensor, FarMap]:
        """The key centre and the maps."""
        maps = (self.query_map.flatten(0, 1) * self.scale, self.key_map, self.gain.flatten())
        return self.centre.detach().clone(), FarMap(*(x.detach().clone() for x in maps))

    def tensors(self) -> dict[str, Tensor]:
        """Everything to go on from."""
        found = {name: x.detach() for name, x in self.named_parameters()}
        for name, x in self.named_parameters():
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state[x].items()}
        return found | {"step": torch.tensor(self.step), "scale": torch.tensor(self.scale, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; KeyError or RuntimeError if it is of another layer."""
        with torch.no_grad():
            for name, x in self.named_parameters():
                x.copy_(tensors[name])
                keys = ("step", "exp_avg", "exp_avg_sq")
                found = {key: tensors[f"{name}.{key}"].clone() for key in keys if f"{name}.{key}" in tensors}
                if found:
                    self.optimizer.state[x] = found
        self.step, self.scale = int(tensors["step"]), float(tensors["scale"])
        self.is_begun = self.step > 0


def _here(seen: Observation) -> Observation:
    """The same on the CPU, where maps are learned wherever the model runs."""
    return replace(seen, query=seen.query.cpu(), key=seen.key.cpu(), value=seen.value.cpu())


def _grouped(seen: Observation) -> Tensor:
    """Scaled queries by key/value head, [Hkv, G, T, d]."""
    return (seen.query.float() * seen.scale).unflatten(0, (len(seen.key), -1))


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric matrix and its inverse, of small eigenvalues cut off."""
    values, axes = torch.linalg.eigh(covariance)
    values = values.clamp(min=1e-6 * float(values.max()))
    return (axes * power[..., None, :] @ axes.mT for power in (values.sqrt(), values.rsqrt()))  # type: ignore[return-value]


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
    about = _about(pieces, settings, steps, queries, seed)
    first = _restore(learners, Path(folder), about) if folder is not None and resume else 0
    for number in range(first, len(pieces)):
        errors = _learn(model, learners, pieces[number], steps, queries, seed + number)
        if folder is not None:
            _result(learners, settings).save(folder)
            _keep(learners, Path(folder), {**about, "pieces": str(number + 1)})
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
    """A few steps of every layer from one piece; each layer's mean error."""
    found = [0.0] * len(learners)

    def receive(there: Observation) -> None:
        seen = _here(there)
        learner = learners[seen.layer]
        draw = torch.Generator().manual_seed(seed * 1009 + seen.layer)
        low = min(int((learner.windows + learner.sinks).min()), len(piece) - 1)
        for _ in range(steps if learner.has_far else 0):
            positions = torch.randint(low, len(piece), (queries,), generator=draw)
            found[seen.layer] += learner.learn(seen, positions) / steps

    with observing(model, receive), torch.no_grad():
        model.base_model(input_ids=piece.to(model.device)[None], use_cache=False)
    return found


def _result(learners: list[Learner], settings: ModelSettings) -> Distilled:
    centres, maps = zip(*(each.result() for each in learners), strict=True)
    return Distilled(settings, list(centres), list(maps))


def _about(pieces: Sequence[Tensor], settings: ModelSettings, *numbers: int) -> dict[str, str]:
    """What work that is gone on with must have in common."""
    texts = [int((piece * torch.arange(1, len(piece) + 1)).sum()) for piece in pieces]
    return {"texts": str(texts), "settings": str(settings.to_dict()), "numbers": str(numbers)}


def _keep(learners: list[Learner], folder: Path, metadata: dict[str, str]) -> None:
    tensors = {f"{index}.{name}": x for index, each in enumerate(learners) for name, x in each.tensors().items()}
    write_tensors(folder / _POSITION, tensors, kind=KIND, metadata=metadata)


def _restore(learners: list[Learner], folder: Path, about: dict[str, str]) -> int:
    """Take up what was kept, if anything was: how many pieces are done."""
    path = folder / _POSITION
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        for name, text in about.items():
            expect(metadata[name] == text, name, "those of the work begun", "others")
        for index, learner in enumerate(learners):
            learner.restore(dict(_of_layer(tensors, f"{index}.")))
        return int(metadata["pieces"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"{path}: expected the work on these texts with these settings, got {error}") from error


def _of_layer(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, x in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), x

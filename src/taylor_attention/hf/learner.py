"""The far part of one layer while it is learned alone, from what softmax gives for some of the layer's own queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.series import EXP
from .far_maps import FarMap, with_offsets
from .models import Sizes
from .profiling.observe import Observation
from .settings import HeadSettings
from .unfinished import put_back, tensors_of

RATE, MAP_RATE = 1e-2, 3e-3
"""Learning rates, at their highest, of gains, centres and offsets, and of maps."""

SOFTMAX = 2**31
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
        windows = [SOFTMAX if head.window is None else head.window for head in heads]
        self.windows, self.sinks = torch.tensor(windows), torch.tensor([head.sinks for head in heads])
        wide, (_, count, kv_heads, head_dim) = max(far, default=1), sizes
        self.centre = nn.Parameter(torch.zeros(kv_heads, head_dim))
        self.query_map = nn.Parameter(torch.zeros(kv_heads, count // kv_heads, head_dim, wide))
        self.key_map = nn.Parameter(torch.zeros(kv_heads, head_dim, wide))
        self.query_offset = nn.Parameter(torch.zeros(kv_heads, count // kv_heads, 1, wide))
        self.key_offset = nn.Parameter(torch.zeros(kv_heads, 1, wide))
        self.gain = nn.Parameter(torch.zeros(kv_heads, count // kv_heads))
        slow, offsets = [self.query_map, self.key_map], [self.query_offset, self.key_offset]
        fast = [self.centre, self.gain, *offsets]
        rates = [{"params": fast, "lr": RATE, "top": RATE}, {"params": slow, "lr": MAP_RATE, "top": MAP_RATE}]
        self.optimizer = torch.optim.Adam(rates)

    @property
    def has_far(self) -> bool:
        """Whether some head of the layer drops tokens."""
        return bool((self.windows < SOFTMAX).any())

    @torch.no_grad()
    def begin(self, seen: Observation) -> None:
        """Start from the mean key, and from the entries in which scores differ most."""
        query, key = _grouped(seen, slice(None)), seen.key.float()
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
            loss = errors[self.windows < SOFTMAX].sum()
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return float(errors.detach()[self.windows < SOFTMAX].mean())

    def errors(self, seen: Observation, positions: Tensor) -> Tensor:
        """Relative squared error of the outputs of some queries, [Hkv, G].

        Weights are relative to exp of the highest near score. In what softmax gives and in that of near tokens nothing
        is learned: where the centre shifts their scores, far weights are multiplied by the inverse instead.
        """
        query, key = _grouped(seen, positions), seen.key.float()
        value = torch.cat((seen.value.float(), torch.ones(*key.shape[:2], 1)), 2)  # the sums of weights too
        exact, near, top, is_far = self._fixed(query, key, value, positions)
        asked = query @ self.query_map + self.query_offset  # [Hkv, G, n, f]
        met = (key - self.centre[:, None]) @ self.key_map + self.key_offset  # [Hkv, T, f]
        far = (asked.flatten(1, 2) @ met.mT).view(*query.shape[:3], -1)
        weight = torch.full_like(far, self.coefficients[-1])
        for coefficient in reversed(self.coefficients[:-1]):
            weight = weight * far + coefficient
        shift = (query * self.centre[:, None, None]).sum(-1, keepdim=True)
        factor = (self.gain[..., None, None] + shift - top).clamp(max=40).exp()
        found = _weighed(weight * is_far[:, None], value) * factor + near
        wrong = found[..., :-1] / found[..., -1:] - exact
        return wrong.square().sum((2, 3)) / exact.square().sum((2, 3))

    @torch.no_grad()
    def _fixed(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What softmax gives [Hkv, G, n, d], near tokens with their sums, their highest scores, who is far."""
        place = torch.arange(key.shape[1])
        visible = place <= positions[:, None]
        near = place > positions[:, None] - self.windows[:, None, None]
        near = (near | (place < self.sinks[:, None, None])) & visible  # [Hkv, n, T]
        scores = (query.flatten(1, 2) @ key.mT).view(*query.shape[:3], -1).masked_fill_(~visible, -torch.inf)
        of_near = scores.masked_fill(~near[:, None], -torch.inf)
        top = of_near.amax(-1, keepdim=True)
        total = _weighed((of_near - top).exp_(), value)
        exact = _weighed(scores.softmax(-1), value)[..., :-1]
        return exact, total, top, visible & ~near

    @torch.no_grad()
    def take(self, centre: Tensor, maps: FarMap, scale: float) -> None:
        """Take over what `result` gave."""
        self.scale = scale
        self.centre.copy_(centre)
        (query_map, query_offset), (key_map, key_offset) = maps.parts(len(centre[0]))
        self.query_map.copy_(query_map.view_as(self.query_map) / scale)
        self.query_offset.copy_(query_offset.view_as(self.query_offset))
        self.key_map.copy_(key_map)
        self.key_offset.copy_(key_offset)
        self.gain.copy_(maps.gain.view_as(self.gain))

    def result(self) -> tuple[Tensor, FarMap]:
        """The key centre and the maps."""
        query_map = with_offsets(self.query_map * self.scale, self.query_offset).flatten(0, 1)
        maps = (query_map, with_offsets(self.key_map, self.key_offset), self.gain.flatten())
        return self.centre.detach().clone(), FarMap(*(x.detach().clone() for x in maps))

    def tensors(self) -> dict[str, Tensor]:
        """Everything to go on from."""
        found = {"step": torch.tensor(self.step), "scale": torch.tensor(self.scale, dtype=torch.float64)}
        return tensors_of(self, self.optimizer) | found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; KeyError or RuntimeError if it is of another layer."""
        put_back(self, self.optimizer, tensors)
        self.step, self.scale = int(tensors["step"]), float(tensors["scale"])
        self.is_begun = self.step > 0


def _grouped(seen: Observation, positions: Tensor | slice) -> Tensor:
    """Scaled queries of these positions by key/value head, [Hkv, G, n, d]."""
    return (seen.query[:, positions].float() * seen.scale).unflatten(0, (len(seen.key), -1))


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """Values [Hkv, T, E] by weights [Hkv, G, n, T]: [Hkv, G, n, E]."""
    return (weight.flatten(1, 2) @ value).view(*weight.shape[:3], -1)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric matrix and its inverse, of small eigenvalues cut off."""
    values, axes = torch.linalg.eigh(covariance)
    values = values.clamp(min=1e-6 * float(values.max()))
    return (axes * power[..., None, :] @ axes.mT for power in (values.sqrt(), values.rsqrt()))  # type: ignore[return-value]

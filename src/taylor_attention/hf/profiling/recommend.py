"""What each key/value head should keep: the cheapest that is good enough, or the best that a budget of bytes allows."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ...errors import expect, is_number, shown
from ..settings import HeadSettings, ModelSettings
from .statistics import KINDS, Choice, Profile

Place = tuple[int, int]


@dataclass(frozen=True)
class Recommendation:
    """What each key/value head should keep.

    Attributes:
        choices: by (layer, key/value head).
        cache_bytes: of all keys and values of one sequence of the profile's length, over all heads.
        centres: what `set_key_centres` is to take off keys beside; None: nothing.
    """

    choices: Mapping[Place, Choice]
    cache_bytes: int
    centres: Sequence[Tensor] | None = None

    @property
    def settings(self) -> ModelSettings:
        """As `use` takes them: heads that are not named stay softmax."""
        kept = {place: choice.settings for place, choice in self.choices.items() if not choice.settings.is_softmax}
        return ModelSettings(HeadSettings(window=None), kept)

    @property
    def nbytes(self) -> int:
        """Of one sequence of the profile's length, over all heads."""
        return sum(choice.nbytes for choice in self.choices.values())

    def count(self) -> dict[str, int]:
        """How many heads of each kind."""
        kinds = [choice.kind for choice in self.choices.values()]
        return {kind: kinds.count(kind) for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        rows = [
            {"layer": layer, "head": head, "kind": each.kind, **asdict(each)}
            for (layer, head), each in self.choices.items()
        ]
        return {"nbytes": self.nbytes, "cache_bytes": self.cache_bytes, "heads": self.count(), "choices": rows}


def recommend(profile: Profile, *, error: float = 0.1, centred: bool = False) -> Recommendation:
    """Choose for each key/value head what takes the fewest bytes of all whose relative error is at most `error`.

    Only what takes fewer bytes than the keys and values of the profile's length is looked at; where none of it is good
    enough the head stays softmax.

    Args:
        error: of a head's outputs.
        centred: take the profile's mean keys off all keys.

    Raises:
        ArgumentError: error is no number > 0.
    """
    expect(is_number(error) and error > 0, "error", "a finite number > 0", shown(error))
    given = {place: profile.choices(place, centred=centred) for place in profile.shared}
    choices = {place: next(each for each in some if each.error <= error) for place, some in given.items()}
    return Recommendation(choices, profile.cache_bytes * len(choices), profile.centres if centred else None)


def recommend_within(profile: Profile, budget: float, *, centred: bool = False) -> Recommendation:
    """Choose for all key/value heads together what makes the sum of squared errors small within a budget of bytes.

    Each head begins with the cheapest that there is; then, again and again, the step that takes off most for its bytes
    is made, of all that still fit. Steps go along the lower convex hull of a head's (bytes, squared error), where what
    a byte takes off falls with each step, so this is the least sum for the bytes that it takes.

    Args:
        budget: bytes, as a share of those of all keys and values at the profile's length.
        centred: as `recommend` takes it.

    Raises:
        ArgumentError: budget is no number in (0, 1], or the cheapest of all heads take more.
    """
    expect(is_number(budget) and 0 < budget <= 1, "budget", "a number in (0, 1]", shown(budget))
    paths = {place: hull(profile.choices(place, centred=centred)) for place in profile.shared}
    taken, total = dict.fromkeys(paths, 0), profile.cache_bytes * len(paths)
    left = int(budget * total) - sum(path[0].nbytes for path in paths.values())
    least = (int(budget * total) - left) / total
    expect(left >= 0, "budget", f"at least {least:.3g}, the share that the cheapest choices take", budget)
    steps = [(-_slope(*path[:2]), place) for place, path in paths.items() if len(path) > 1]
    heapq.heapify(steps)
    while steps:
        _, place = heapq.heappop(steps)
        path, at = paths[place], taken[place]
        more = path[at + 1].nbytes - path[at].nbytes
        if more > left:
            continue  # and no later one of this head: the hull's steps are made in order
        left, taken[place] = left - more, at + 1
        if at + 2 < len(path):
            heapq.heappush(steps, (-_slope(*path[at + 1 : at + 3]), place))
    choices = {place: path[taken[place]] for place, path in paths.items()}
    return Recommendation(choices, total, profile.centres if centred else None)


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (bytes, squared error), fewest bytes first, as they have to come."""
    kept: list[Choice] = []
    for choice in choices:
        if kept and choice.error >= kept[-1].error:
            continue
        while kept and kept[-1].nbytes == choice.nbytes:
            kept.pop()
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _slope(one: Choice, other: Choice) -> float:
    """What a byte takes off the squared error between two choices."""
    return (one.error**2 - other.error**2) / (other.nbytes - one.nbytes)

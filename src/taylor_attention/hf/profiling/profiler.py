"""The profile of a model on texts: every layer's queries and keys, as they meet in a forward pass, measured at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.state import wide_dtype
from ...errors import expect, expect_int, shown
from ...ops.attention import attention
from ...ops.normaliser import watch_normalisers
from .observe import Observation, observing
from .scores import WAYS, Sample, Sums, error_sums, measure
from .statistics import HEAVY_FAR, Head, Profile

SINKS = 4
"""First tokens that are told apart and kept."""

SMALLEST_WINDOW = 64

TOGETHER = 16
"""Queries that are measured at once."""


def profile(
    model: Any,
    pieces: Sequence[Tensor],
    *,
    queries: int = 128,
    windows: Sequence[int] | None = None,
    ways: Collection[str] = WAYS,
    seed: int = 0,
    notify: Callable[[], None] | None = None,
) -> Profile:
    """Measure every attention layer of a model of transformers on texts: scores, weights, errors of cheaper ways.

    Everything is computed in float64, from some queries of the later half of each text (of all of it in an encoder)
    against all keys that they see, as dense rows [queries, T]; so a text of 8K tokens fits in memory.

    Args:
        model: plain softmax attention, causal or over all keys, in all layers, through the interface of transformers.
        pieces: the texts as token numbers, int64 [T] each, of one length.
        queries: of each head, in all texts together.
        windows: to try, in tokens; powers of two from 64 below T if None. Encoders have none.
        ways: what is tried beside sinks and windows alone: "pure" polynomials of all keys, polynomials of the "far"
            ones, "heavy" tokens, which take most of the time.
        seed: of the choice of queries.
        notify: called after each layer of each text.

    Raises:
        ArgumentError: an argument is not as above, or the model has another attention.
    """
    _check(pieces, queries, windows, ways)
    tokens = len(pieces[0])
    if windows is None:
        windows = [2**n for n in range(SMALLEST_WINDOW.bit_length() - 1, 63) if 2**n < tokens]
    made = Profiler(windows, -(-queries // len(pieces)), notify, ways)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch_normalisers(), observing(model, made.see):  # unsafe queries are errors of NaN
            for number, piece in enumerate(pieces):
                made.seed = seed + number
                model.base_model(input_ids=piece.to(model.device)[None], use_cache=False)
    finally:
        model.train(training)
    return made.result(tokens, len(pieces))


def _check(pieces: Sequence[Tensor], queries: int, windows: Sequence[int] | None, ways: Collection[str]) -> None:
    good = len(pieces) > 0 and all(isinstance(piece, Tensor) and piece.dtype == torch.int64 for piece in pieces)
    good = good and len({tuple(piece.shape) for piece in pieces}) == 1 and pieces[0].ndim == 1 and len(pieces[0]) > 1
    expect(good, "pieces", "int64 tensors [T] of one length, T > 1", "" if good else shown(pieces))
    expect_int("queries", queries, 1)
    for window in windows or ():
        expect_int("windows", window, 1)
    known = not isinstance(ways, str) and isinstance(ways, Collection) and set(ways) <= set(WAYS)
    expect(known, "ways", f"some of {', '.join(WAYS)}", shown(ways))


class Profiler:
    """Takes in observations and adds up what is measured of them, by layer and key/value head."""

    def __init__(
        self, windows: Sequence[int], queries: int, notify: Callable[[], None] | None, ways: Collection[str] = WAYS
    ) -> None:
        self.seed, self._ways = 0, ways
        self._windows = [0, *sorted(set(windows))]
        self._queries, self._notify = queries, notify
        self._sums: dict[tuple[int, int], Sums] = {}
        self._keys: dict[int, list[Tensor]] = {}
        self._seen: Observation | None = None

    def see(self, layer: Observation) -> None:
        """Measure one layer on one text."""
        places = self._places(layer)
        group = len(layer.query) // len(layer.key)
        self._keys.setdefault(layer.layer, []).append(layer.key.mean(1, dtype=wide_dtype(layer.key.device)))
        for head, (key, value) in enumerate(zip(layer.key, layer.value, strict=True)):
            query = layer.query[head * group : (head + 1) * group]
            sums, output = self._measure(query, key, value, places, layer)
            if "heavy" in self._ways:
                sums |= self._heavy(query, key, value, places, layer, output)
            self._sums[layer.layer, head] = added(self._sums.get((layer.layer, head)), sums)
        self._seen = layer
        if self._notify is not None:
            self._notify()

    def _places(self, layer: Observation) -> Tensor:
        """Which queries are looked at; the same in all layers."""
        tokens = layer.query.shape[1]
        first = tokens // 2 if layer.causal else 0
        chosen = torch.randperm(tokens - first, generator=torch.Generator().manual_seed(self.seed))
        return (first + chosen[: self._queries].sort().values).to(layer.query.device)

    def _measure(
        self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, layer: Observation
    ) -> tuple[Sums, Tensor]:
        """As `scores.measure`, some queries at a time: those of about the same place have the same parts of keys."""
        total, outputs = None, []
        for some in places.split(TOGETHER):
            sums, output = measure(
                _sample(query, key, value, some, layer),
                sinks=SINKS,
                windows=self._windows if layer.causal else [0],
                near=layer.causal,
                ways=self._ways,
            )
            total = added(total, sums)
            outputs.append(output)
        assert total is not None
        return total, torch.cat(outputs, 1)

    def _heavy(
        self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, layer: Observation, exact: Tensor
    ) -> Sums:
        """Errors with as many heavy tokens as a window has, [G, W, 2]: far keys dropped, or fitted to degree 1.

        Which tokens those are, all queries decide; so it is the library's own attention over all of them.
        """
        windows = [window for window in self._windows if window and 2 * window < len(key)]
        if not layer.causal or not windows:
            return {}
        outputs = [
            attention(
                query[None],
                key[None, None],
                value[None, None],
                degree=degree,
                reading=reading,
                window=window,
                sinks=SINKS,
                heavy=window,
                scale=layer.scale,
            )[0, :, places]
            for window in windows
            for degree, reading in HEAVY_FAR
        ]
        errors = error_sums(torch.stack(outputs, 1).to(exact.dtype), exact)
        return {"heavy": errors.unflatten(1, (len(windows), len(HEAVY_FAR)))}

    def result(self, tokens: int, sequences: int) -> Profile:
        """The profile of all that was seen."""
        seen = self._seen
        expect(seen is not None, "model", "attention through the interface of transformers", "none was called")
        assert seen is not None
        windows = self._windows if seen.causal else [0]
        heads, shared = {}, {}
        for (layer, kv_head), sums in sorted(self._sums.items()):
            group = len(sums["queries"])
            shared[layer, kv_head] = Head.of_group(sums, windows)
            for own in range(group):
                chosen = {name: each[own] for name, each in sums.items()}
                heads[layer, kv_head * group + own] = Head.from_sums(chosen, windows)
        return Profile(
            tokens,
            sequences,
            int(sums["queries"][0]),
            seen.causal,
            len(seen.key),
            seen.key.shape[2],
            seen.value.shape[2],
            seen.key.dtype,
            SINKS,
            heads,
            shared,
            [torch.stack(self._keys[layer]).mean(0).to(seen.key) for layer in sorted(self._keys)],
        )


def added(before: Sums | None, sums: Sums) -> Sums:
    """Both together."""
    return sums if before is None else {name: before[name] + each for name, each in sums.items()}


def _sample(query: Tensor, key: Tensor, value: Tensor, places: Tensor, layer: Observation) -> Sample:
    dtype = wide_dtype(key.device)
    age = places[:, None] - torch.arange(len(key), device=key.device)  # [n, T]
    visible = age >= 0 if layer.causal else torch.ones_like(age, dtype=torch.bool)
    return Sample(query[:, places].to(dtype), key.to(dtype), value.to(dtype), layer.scale, visible, age)

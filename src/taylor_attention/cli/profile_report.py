"""How `taylor-attention profile` shows what it found: a table by layer or by head, the advice, and its end effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .console import size, table

if TYPE_CHECKING:
    from ..hf.profiling import Head, Profile, Recommendation
    from ..hf.settings import HeadSettings

WIDE = 160  # columns where stdout is no terminal

LEVEL = 0.1
"""The relative error for which the needed window and degree are shown."""


def report(
    console: Console, found: Profile, advice: Recommendation, effect: Mapping[str, Any] | None, *, each_head: bool
) -> None:
    """Print tables, the advice in numbers, and the end effect."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    kind = "causal" if found.causal else "all keys visible"
    texts = f"{found.sequences} text{'s' if found.sequences > 1 else ''} of {found.tokens:,} tokens"
    console.print(f"{texts}, {found.queries:,} queries of each head, {kind}", markup=False, soft_wrap=True)
    console.print(_by_head(found, advice) if each_head else _by_layer(found, advice))
    for line in (*_legend(found), *_advice(advice), *_effect(effect)):
        console.print(line, markup=False, soft_wrap=True)


def _by_layer(found: Profile, advice: Recommendation) -> Table:
    """Means over the heads of each layer, and how its key/value heads are advised."""
    shown = table("By layer, means over heads", "layer", *_columns(found), "recommended", "bytes")
    for layer in found.layers:
        rows = [_numbers(found, head) for place, head in found.heads.items() if place[0] == layer]
        means = [_mean([row[column] for row in rows]) for column in rows[0]]
        own = [choice for place, choice in advice.choices.items() if place[0] == layer]
        kinds = Counter(choice.kind for choice in own)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        shown.add_row(str(layer), *means, told, _share([choice.nbytes for choice in own], found))
    return shown


def _by_head(found: Profile, advice: Recommendation) -> Table:
    shown = table("By query head", "layer", "head", *_columns(found), "recommended", "error", "bytes")
    group = len(found.heads) // len(found.shared)
    for (layer, head), each in found.heads.items():
        numbers = [_mean([number]) for number in _numbers(found, each).values()]
        choice = advice.choices[layer, head // group]
        ends = describe(choice.settings), f"{choice.error:.1%}", _share([choice.nbytes], found)
        shown.add_row(str(layer), str(head), *numbers, *ends)
    return shown


def _columns(found: Profile) -> list[str]:
    return list(_numbers(found, next(iter(found.heads.values()))))


def _numbers(found: Profile, head: Head) -> dict[str, float | None]:
    """What is told of a head, by the column's name; None: more than all that was tried."""
    window, errors = found.middle_window, head.errors
    numbers: dict[str, float | None] = {
        "std": head.spread.std,
        "mean": head.spread.mean,
        "centred": head.spread.centred_mean,
        "sinks %": 100 * head.weight.sinks,
        "far %": 100 * head.weight.far[window],
    }
    if found.causal:
        numbers |= {
            "dropped %": 100 * errors.dropped[window],
            "fitted %": 100 * errors.far["fitted"][window][1],
            "window": errors.window_for(LEVEL),
        }
    return numbers | {f"P {reading}": errors.degree_for(reading, LEVEL) for reading in errors.pure}


def _legend(found: Profile) -> list[str]:
    """What the columns mean."""
    near = f"{found.sinks} sinks and a window of {found.middle_window}" if found.causal else f"{found.sinks} sinks"
    lines = [
        "std, mean: of a query's scores, without their mean and the size of it; centred: that size without the head's "
        f"mean key. sinks, far: the weight on the first {found.sinks} keys, and on all but {near}."
    ]
    if found.causal:
        lines.append(
            f"dropped, fitted: relative error of {near} without far keys, and with these fitted to degree 1. "
            f"window: needed for {LEVEL:.0%} without far keys."
        )
    lines.append(
        f"P: degree needed for {LEVEL:.0%} by a polynomial alone. >, -: some heads, or all, need more than was tried."
    )
    return lines


def _mean(numbers: list[float | None]) -> str:
    """The mean of those that are known, with > where others are beyond what was tried; a dash where all are."""
    known = [number for number in numbers if number is not None]
    return f"{'>' * (len(known) < len(numbers))}{fmean(known):.3g}" if known else "-"


def _share(nbytes: list[int], found: Profile) -> str:
    return f"{sum(nbytes) / (found.cache_bytes * len(nbytes)):.0%}"


def describe(settings: HeadSettings) -> str:
    """What a head keeps, in a few words."""
    if settings.is_softmax:
        return "softmax"
    near = [(settings.sinks, "sinks"), (settings.window, "window"), (settings.heavy, "heavy")]
    parts = [f"{name} {count}" for count, name in near if count]
    parts += [] if settings.degree is None else [f"{settings.reading} {settings.degree}"]
    return " + ".join(parts)


def _advice(advice: Recommendation) -> list[str]:
    count = advice.count()
    kinds = ", ".join(f"{many} {kind}" for kind, many in count.items())
    share = advice.nbytes / advice.cache_bytes
    longer = "heads that are softmax take more for longer ones" if count["softmax"] else "as many for longer ones"
    return [
        f"Recommended for {len(advice.choices)} key/value heads: {kinds}.",
        f"They keep {size(advice.nbytes)} of one text, {share:.1%} of the {size(advice.cache_bytes)} of all keys and "
        f"values; {longer}.",
    ]


def _effect(effect: Mapping[str, Any] | None) -> list[str]:
    if effect is None:
        return []
    if effect["measure"] == "cosine":
        return [
            f"Held-out embeddings: cosine with softmax's {effect['recommended']:.4f}, lowest {effect['lowest']:.4f}."
        ]
    losses = ", ".join(f"{name} {effect[name]:.4f}" for name in ("softmax", "recommended", "uniform"))
    plain = " + ".join(f"{name} {effect['uniform_settings'][name]}" for name in ("sinks", "window"))
    return [f"Held-out text, nats per token: {losses} ({plain} in every head, at the bytes of the recommended ones)."]

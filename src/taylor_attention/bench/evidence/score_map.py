"""Where a truncated exp is in range: relative errors by the spread of scores, their mean, length, and needles.

Streams in which every query's scores are normal, of one spread and one mean: the first entry of all queries and of all
keys is the same, so that it gives the mean, and the others are normal. A needle is a key whose score is the mean and a
margin, for every query. Values are normal and have nothing to do with the scores; what they share would come out right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.series import expected_error
from ...lm.checkpoint import load_checkpoint, shipped
from ...lm.data import load_split, sample_batch, to_tensor
from ...nn.layer import Attention
from ...nn.transformer import LanguageModel
from ...ops.attention import attention
from ...ops.normaliser import watch_normalisers
from ...ops.reference import softmax_reference
from .experiment import Case, Experiment
from .score_map_drawn import pictures
from .score_map_shown import LENGTH, MODEL, NEEDLE, OFFSET, SPREAD, conclusions, tables

HEAD_DIM = 8
DEGREES = (1, 2, 3, 4, 5, 6)
FEW_DEGREES = (2, 4)
"""Where the length and needles change."""
TOKENS = 4096
HEADS, ROWS = 16, 16
"""Streams at once, and how many of their last queries are compared."""
LONG = 10**4
"""Tokens beyond which there are fewer streams."""
SPREADS = tuple(round(0.1 * 40 ** (i / 14), 3) for i in range(15))
"""From 0.1 to 4."""
OFFSETS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
LENGTHS = (100, 1000, 10_000, 100_000)
MARGINS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
TIES = (1, 16, 256)
TEXT = (8, 512)
"""Windows of text that a model reads, and their bytes."""
SETTLED = 64
"""Positions in a window from which on a query has scores enough."""


def plan(quick: bool) -> list[Case]:
    """Spreads; offsets, lengths and needles at a few spreads; the shipped models and one that has not been trained."""
    step, tokens = (3, 512) if quick else (1, TOKENS)
    spreads, offsets, lengths, margins, ties = (x[::step] for x in (SPREADS, OFFSETS, LENGTHS, MARGINS, TIES))
    return [
        *({"what": SPREAD, "spread": spread, "tokens": tokens} for spread in spreads),
        *({"what": OFFSET, "spread": 0.5, "offset": offset, "tokens": tokens} for offset in offsets),
        *({"what": LENGTH, "spread": spread, "tokens": n} for spread in (0.5, 1.0, 2.0) for n in lengths),
        *(
            {"what": NEEDLE, "spread": 0.5, "margin": margin, "ties": count, "tokens": tokens}
            for count in ties
            for margin in margins
        ),
        *({"what": MODEL, "name": name} for name in ("taylor", "softmax", "untrained")),
    ]


@torch.no_grad()
def measure(case: Case, seed: int) -> dict[str, Any]:
    """Quartiles of the relative error by degree and reading, beside what is expected; or spreads in a model."""
    if case["what"] == MODEL:
        return {"layers": measure_model(case["name"], seed)}
    inputs = draw(case, torch.Generator().manual_seed(seed))
    exact = softmax_reference(inputs[0][:, :, -ROWS:], inputs[1], inputs[2])
    degrees = DEGREES if case["what"] in (SPREAD, OFFSET) else FEW_DEGREES
    return {
        reading: {str(degree): _errors(reading, degree, inputs, exact, case) for degree in degrees}
        for reading in ("taylor", "centred", "fitted")
        if reading != "centred" or case.get("offset") or case["what"] == NEEDLE  # else it is Taylor's once more
    }


def draw(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, H, n, d] of a case's streams."""
    tokens, spread, offset = case["tokens"], case["spread"], case.get("offset", 0.0)
    heads = HEADS if tokens <= LONG else HEADS // 4
    query, key, value = torch.randn(3, 1, heads, tokens, HEAD_DIM, generator=generator)
    query[..., 0], key[..., 0] = 0, offset
    query *= spread * HEAD_DIM**0.5 / query.norm(dim=-1, keepdim=True)
    query[..., 0] = HEAD_DIM**0.5
    if "margin" in case:
        places = torch.randperm(tokens // 2, generator=generator)[: case["ties"]]
        key[:, :, places] = 0
        key[:, :, places, 0] = offset + case["margin"]
    return query, key, value


def _errors(
    reading: str, degree: int, inputs: tuple[Tensor, Tensor, Tensor], exact: Tensor, case: Case
) -> dict[str, Any]:
    query, key, value = inputs
    if reading == "centred":
        key = key - key.mean(dim=2, keepdim=True)
    with watch_normalisers():
        y = attention(query, key, value, degree=degree, reading="fitted" if reading == "fitted" else "taylor")
    rows = y[:, :, -ROWS:].double()
    error = (rows - exact).norm(dim=-1) / exact.norm(dim=-1)
    mean = case.get("offset", 0.0) if reading == "taylor" else 0.0
    return {
        "error": quartiles(error),
        "unsafe": float(error.isnan().double().mean()),
        "expected": expected_error(case["spread"], degree, mean=mean, fitted=reading == "fitted"),
    }


def quartiles(x: Tensor) -> list[float | None]:
    """Of all entries; NaN counts as the largest, and is None."""
    ordered = x.flatten().nan_to_num(torch.inf, torch.inf).sort().values
    found = [float(ordered[int(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75)]
    return [None if value == torch.inf else value for value in found]


# ---- models ----------------------------------------------------------------------------------------------------------


def measure_model(name: str, seed: int) -> list[dict[str, float]]:
    """Of each layer of a model on text: the spread of a query's scores, and how far their mean is from 0.

    The text is held out of Python's own library, which the shipped models have learned. Medians over queries, of each
    head: the lowest, the middle one and the highest.
    """
    model, _ = load_checkpoint(shipped("taylor" if name == "untrained" else name))
    if name == "untrained":
        torch.manual_seed(seed)
        model = LanguageModel(model.config).eval()
    tokens, _ = sample_batch(to_tensor(load_split("stdlib")[1]), *TEXT, seed=seed, step=0)
    found: list[dict[str, float]] = []
    hooks = [
        each.register_forward_pre_hook(lambda layer, given: found.append(measure_layer(layer, given[0])))
        for each in model.modules()
        if isinstance(each, Attention)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def measure_layer(layer: Attention, x: Tensor) -> dict[str, float]:
    """Spread and mean of the scores of a layer that reads x [B, T, d_model]."""
    heads = layer._project(x, None, None)
    group = layer.num_heads // layer.num_kv_heads
    spread, mean = measure_scores(heads.query, heads.key.repeat_interleave(group, 1), layer.scale)
    return {
        "lowest": float(spread.min()),
        "middle": float(spread.median()),
        "highest": float(spread.max()),
        "mean": float(mean.abs().median()),
    }


def measure_scores(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Medians over queries of the spread and of the mean of their scores, [H] each, from [B, H, T, d] twice."""
    scores = scale * (query @ key.mT)
    scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), torch.nan)[:, :, SETTLED:]
    mean = scores.nanmean(-1, keepdim=True)
    spread = (scores - mean).square().nanmean(-1).sqrt()
    both = (each.transpose(0, 1).flatten(1).median(1).values for each in (spread, mean[..., 0]))
    spread, mean = both
    return spread, mean


EXPERIMENT = Experiment(
    "map",
    "Where a truncated exp is in range",
    "How far from softmax is a degree at a spread of scores, and where do models lie?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

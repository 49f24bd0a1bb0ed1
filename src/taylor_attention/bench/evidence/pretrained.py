"""Pretrained models in fewer bytes: the loss of SmolLM2 on long texts, and the embeddings of MiniLM.

Every way to keep less is measured beside sinks and a window of the same bytes, which anybody can have without a series:
what a far field or a choice by head adds has to show there.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ...core.cost import cache_size
from ...core.state import State
from ...errors import NormaliserWarning
from . import pretrained_models as source
from .experiment import Case, Experiment
from .pretrained_shown import (
    BY_HEAD,
    DEGREES,
    FAR,
    LEARNED,
    SOFTMAX,
    WINDOW,
    conclusions,
    pictures,
    tables,
)

if TYPE_CHECKING:
    from ...hf import FarMap, HeadSettings, ModelSettings

TOKENS, QUICK = 8192, 1024
RANGES = ((0, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
"""Positions over which losses are averaged."""

BUDGETS = (0.25, 0.125)
"""Bytes, as shares of those of all keys and values at the end of the text."""

HEAD_DIM = 64
"""Of SmolLM2."""


def plan(quick: bool) -> list[Case]:
    """Every method at every budget that it fits, on every speech; then the encoder."""
    if quick:
        methods: list[dict[str, Any]] = [
            {"method": name, "budget": budget} for name, budget in ((SOFTMAX, 1.0), (WINDOW, 0.25), (BY_HEAD, 0.25))
        ]
        return [_case(method, source.SPEECHES[0], QUICK) for method in methods]
    methods = [{"method": SOFTMAX, "budget": 1.0}]
    for budget in BUDGETS:
        far = [name for name, (degree, _) in FAR.items() if _fits(degree, budget)]
        names = [WINDOW, BY_HEAD, *far]
        methods += [{"method": name, "budget": budget} for name in names]
    methods += [{"method": name, "budget": each} for each in source.learned() for name in (WINDOW, BY_HEAD, LEARNED)]
    encoder: list[Case] = [{"model": "minilm", "degree": None, "centred": False}]
    encoder += [{"model": "minilm", "degree": degree, "centred": c} for c in (False, True) for degree in DEGREES]
    return [_case(method, name, TOKENS) for name in source.SPEECHES for method in methods] + encoder


def _fits(degree: int, budget: float) -> bool:
    """Whether moments of a head of SmolLM2 take no more than a share of the bytes of its keys and values."""
    state = State.zeros(1, 1, HEAD_DIM, HEAD_DIM, degree=degree, sinks=source.SINKS, dtype=torch.float32, device="meta")
    return state.nbytes <= budget * cache_size(TOKENS, HEAD_DIM) * torch.float32.itemsize


def _case(method: dict[str, Any], name: str, tokens: int) -> Case:
    return {"model": "smollm2", **method, "speech": name, "tokens": tokens}


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Losses by position, or embeddings; with the bytes of the state. Nothing is random but what the profiler draws."""
    return _measure_language(case) if case["model"] == "smollm2" else _measure_encoder(case)


def _measure_language(case: Case) -> dict[str, Any]:
    from ...hf import profiling
    from ...hf.profiling.effect import CHUNK, beside_softmax, centred

    model, tokenizer = source.load("smollm2")
    text = source.speech(tokenizer, case["speech"], case["tokens"])
    settings, centres, maps = _keeping(case)
    kept = _softmax() if settings is None else settings
    found = {"bytes": _bytes(kept, case["tokens"], model), "heads": _told(kept, model)}
    chunks: list[None] = []
    try:
        with warnings.catch_warnings(), centred(model, centres), source.with_learned(model, maps):
            warnings.simplefilter("error", NormaliserWarning)
            if isinstance(case["budget"], str) and case["method"] in (WINDOW, LEARNED):
                losses, apart = beside_softmax(model, text, kept, notify=lambda: chunks.append(None))
                measured = {"loss": losses, "divergence": apart}
            else:
                measured = {"loss": profiling.token_losses(model, text, settings, notify=lambda: chunks.append(None))}
    except NormaliserWarning:
        return found | {"ranges": [], "failed": CHUNK * len(chunks)}
    count = len(measured["loss"])
    ranges = [(a, min(b, count)) for a, b in RANGES if a < count]
    means = [{name: float(x[a:b].double().mean()) for name, x in measured.items()} for a, b in ranges]
    told = [{"from": a, "to": b} | mean for (a, b), mean in zip(ranges, means, strict=True)]
    return found | {"ranges": told, "failed": None}


def _keeping(case: Case) -> tuple[ModelSettings | None, list[Tensor] | None, list[FarMap] | None]:
    """Settings of a case (None: softmax by sdpa), what is taken off keys, and maps."""
    from ...hf import HeadSettings, ModelSettings, profiling
    from ...hf.distilled import Distilled

    method, budget, tokens = case["method"], case["budget"], case["tokens"]
    if method == SOFTMAX:
        return None, None, None
    if isinstance(budget, str):
        learned = Distilled.load(source.folder() / budget)
        if method == LEARNED:
            return learned.settings, learned.centres, learned.maps
        model, _ = source.load("smollm2")
        budget = _bytes(learned.settings, tokens, model) / _bytes(_softmax(), tokens, model)
    if method == BY_HEAD:
        advice = profiling.recommend_within(source.profiled(tokens), budget)
        return advice.settings, None, None
    degree, reading = FAR.get(method, (None, "taylor"))
    centres = source.key_centres("smollm2", tokens) if method in FAR else None
    return ModelSettings(_widest(HeadSettings(0, source.SINKS, 0, degree, reading), budget, tokens)), centres, None


def _widest(settings: HeadSettings, budget: float, tokens: int) -> HeadSettings:
    """With the longest window within a share of the bytes of all keys and values."""
    from ...hf import profiling

    model, _ = source.load("smollm2")
    head_dim = _sizes(model).head_dim
    whole = _softmax().default.nbytes(tokens, head_dim, head_dim)
    found = profiling.widest(settings, int(budget * whole), head_dim, head_dim)
    assert found is not None, "the plan leaves out what does not fit"
    return found


def _softmax() -> ModelSettings:
    from ...hf import HeadSettings, ModelSettings

    return ModelSettings(HeadSettings(window=None))


def _sizes(model: Any) -> Any:
    from ...hf.models import sizes_of

    return sizes_of(model.config)


def _bytes(settings: ModelSettings, tokens: int, model: Any) -> int:
    sizes = _sizes(model)
    return settings.nbytes(tokens, sizes.layers, sizes.kv_heads, sizes.head_dim)


def _told(settings: ModelSettings, model: Any) -> list[dict[str, Any]]:
    """How many heads keep what, those of the longest windows last."""
    sizes = _sizes(model)
    every = [head for layer in range(sizes.layers) for head in settings.layer(layer, sizes.kv_heads)]
    kinds = sorted(set(every), key=lambda head: (head.window is None, head.window or 0, str(head)))
    names = ("window", "heavy", "degree", "reading", "far_dim")
    return [{"count": every.count(head), **{name: getattr(head, name) for name in names}} for head in kinds]


def _measure_encoder(case: Case) -> dict[str, Any]:
    from ...hf import HeadSettings, profiling
    from ...hf.profiling.effect import centred

    model, tokenizer = source.load("minilm")
    texts = source.lee_documents(tokenizer)
    kept = HeadSettings(None) if case["degree"] is None else HeadSettings(0, 0, 0, case["degree"])
    centres = source.key_centres("minilm", source.MOST) if case["centred"] else None
    exact = profiling.embeddings(model, texts, None)
    with warnings.catch_warnings(), centred(model, centres):
        warnings.simplefilter("ignore", NormaliserWarning)  # counted below
        found = profiling.embeddings(model, texts, kept)
    good = found.isfinite().all(1)
    cosine = functional.cosine_similarity(exact[good], found[good])
    sizes = _sizes(model)
    return {
        "unsafe": int((~good).sum()),
        "cosine": float(cosine.mean()) if len(cosine) else None,
        "lowest": float(cosine.min()) if len(cosine) else None,
        "pearson": _pearson(found) if bool(good.all()) else None,
        "bytes": sizes.layers * kept.nbytes(source.MOST, sizes.head_dim, sizes.head_dim, kv_heads=sizes.kv_heads),
    }


def _pearson(embeddings: Tensor) -> float:
    """Correlation of cosines between documents with the ratings, over all pairs."""
    unit = functional.normalize(embeddings.double(), dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    pairs = torch.stack([(unit @ unit.T)[first, second], source.lee_ratings()[first, second]])
    return float(torch.corrcoef(pairs)[0, 1])


EXPERIMENT = Experiment(
    "pretrained",
    "Pretrained models in fewer bytes",
    "What does a pretrained model lose when its heads keep less of the past, and does a far field earn its bytes?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
    timed=True,
    missing=source.missing,
)

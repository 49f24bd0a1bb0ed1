"""A model and its tokenizer from a folder or by name, and a text cut into the pieces that are profiled and held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ...errors import StorageError, expect, first_line, shown

SHORTEST = 32
"""Tokens of a piece."""

_HEADS = ("CausalLM", "LMHeadModel")


def load_model(name: str, *, gguf_file: str | None = None, dtype: str = "float32", device: str = "cpu") -> Any:
    """A model of transformers, ready to run: with its head if it is a language model, else without any.

    Args:
        name: a folder, or a name on the hub, which is asked only if it can be reached.
        gguf_file: a file in it.
        dtype: of weights, keys and values.
        device: where it runs.

    Raises:
        StorageError: there is no such model, or it cannot be read.
    """
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    model: Any
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name, **more)
            is_causal = any(each.endswith(_HEADS) for each in config.architectures or ()) or gguf_file is not None
            kind = AutoModelForCausalLM if is_causal else AutoModel
            model = kind.from_pretrained(name, dtype=getattr(torch, dtype), attn_implementation="sdpa", **more)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise StorageError(f"model {shown(name)}: cannot be loaded ({first_line(error)})") from error
    return model.to(device).eval()


def load_tokenizer(name: str, *, gguf_file: str | None = None) -> Any:
    """Its tokenizer; StorageError if there is none."""
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(name, **more)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise StorageError(f"model {shown(name)}: its tokenizer cannot be loaded ({first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing to stderr inside the block: what matters is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8; StorageError if it cannot be read."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise StorageError(f"text {shown(str(path))}: cannot be read ({first_line(error)})") from error


def longest(model: Any, tokenizer: Any) -> int:
    """The most tokens that a model takes at once."""
    known = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(known, tokenizer.model_max_length))


def pieces(tokenizer: Any, texts: Sequence[str], length: int) -> list[Tensor]:
    """Texts as pieces of one length, int64 [length] each, without their last, shorter ones."""
    found = [torch.tensor(piece) for text in texts for piece in _split(tokenizer, text, length)]
    return [piece for piece in found if len(piece) == length]


def cut(tokenizer: Any, text: str, tokens: int, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut a text into pieces to profile and as many, later ones, that are held out: int64 [T] each, of one length.

    Args:
        tokens: to profile in all; fewer where the text has not twice as many.
        most: in one piece.

    Raises:
        ArgumentError: the text has not twice 32 tokens.
    """
    length = min(tokens, most)
    pieces = _split(tokenizer, text, length)
    if len(pieces) < 2 or len(pieces[1]) < length:
        length = sum(map(len, pieces)) // 2
        expect(length >= SHORTEST, "text", f"at least {2 * SHORTEST} tokens", str(sum(map(len, pieces))))
        pieces = _split(tokenizer, text, length)
    whole = [torch.tensor(piece) for piece in pieces if len(piece) == length]
    count = max(1, min(tokens // length, len(whole) // 2))
    return whole[:count], whole[count : 2 * count]


def _split(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    return tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]

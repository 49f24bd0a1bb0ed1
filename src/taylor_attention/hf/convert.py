"""Checkpoints of `taylor-attention train` as models of transformers, and back."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from ..core.storage import check_path
from ..errors import StorageError, expect, first_line
from ..nn.checkpoint import check_weights, load_checkpoint, save_checkpoint
from .configuration import TaylorConfig
from .modeling import TaylorForCausalLM
from .tokenizer import END_ID, byte_tokenizer

BYTES = 256


def from_checkpoint(path: str | Path) -> TaylorForCausalLM:
    """The model of a checkpoint, in transformers: in float32 and eval mode, with the same logits.

    A model over bytes gets the token ids of `byte_tokenizer`.

    Raises:
        StorageError: the file is missing, damaged or no checkpoint.
    """
    model, _ = load_checkpoint(path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id") if model.config.vocab_size == BYTES else ()
    return TaylorForCausalLM.from_language_model(model, **dict.fromkeys(names, END_ID))


def to_checkpoint(model: TaylorForCausalLM, path: str | Path) -> None:
    """Write a model as a checkpoint that `taylor-attention generate` and the other commands read, atomically.

    Raises:
        ArgumentError: it is no `TaylorForCausalLM`.
        StorageError: the file cannot be written, or a weight is not finite.
    """
    expect(isinstance(model, TaylorForCausalLM), "model", "a TaylorForCausalLM", type(model))
    check_weights(model.model, model.model.state_dict(), path)
    save_checkpoint(path, model.model)


def convert(source: str | Path, out: str | Path, *, force: bool = False) -> TaylorForCausalLM:
    """Write the checkpoint `source` as a folder for transformers, or such a folder as a checkpoint.

    The folder appears whole or not at all; a model over bytes comes with its tokenizer.

    Args:
        source: a checkpoint, or a folder that `save_pretrained` wrote.
        out: what to write; must not exist.
        force: allow it to exist: a checkpoint is replaced, in a folder the files of a model are.

    Returns:
        The model.

    Raises:
        ArgumentError: `out` exists.
        StorageError: `source` cannot be read as a model of ours, or `out` cannot be written.
    """
    check_path(source)
    check_path(out)
    expect(force or not os.path.lexists(out), "out", "a name that is free, or force", f"{out}, which exists")
    with _without_progress_bars():
        if os.path.isdir(source):
            model = _read_folder(Path(source))
            to_checkpoint(model, out)
        else:
            model = from_checkpoint(source)
            _write_folder(model, Path(out))
    return model


def _read_folder(folder: Path) -> TaylorForCausalLM:
    try:
        config = AutoConfig.from_pretrained(folder)
        ours = isinstance(config, TaylorConfig)
        expect(ours, "model_type", repr(TaylorConfig.model_type), repr(getattr(config, "model_type", None)))
        read: Any = TaylorForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
        model, found = read
        expect(not found["unexpected_keys"], "weights", "those of its configuration", sorted(found["unexpected_keys"]))
    except (OSError, ValueError, RuntimeError, SafetensorError, StorageError) as error:
        raise StorageError(f"{folder}: cannot be read as a model of ours: {first_line(error)}") from error
    return cast("TaylorForCausalLM", model)


def _write_folder(model: TaylorForCausalLM, folder: Path) -> None:
    """Write the files into a folder beside it first, which then takes its name, or gives its files."""
    target = Path(os.path.realpath(folder))
    part = target.parent / f".{target.name}.{secrets.token_hex(8)}.part"
    try:
        part.mkdir()
        try:
            model.save_pretrained(part)
            if model.config.vocab_size == BYTES:
                byte_tokenizer().save_pretrained(part)
            _sync(part)
            if target.is_dir():
                for path in part.iterdir():
                    os.replace(path, target / path.name)
            else:
                part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror or first_line(error)})") from error


def _sync(folder: Path) -> None:
    """Have the files on the disk before a name leads to them."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

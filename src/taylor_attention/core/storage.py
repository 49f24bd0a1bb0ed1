"""The one place that reads and writes files of tensors: safetensors, replaced atomically, validated on load.

A file carries its kind (what it holds), a layout version and a digest of every tensor's bytes, so that a truncated,
altered, foreign or outdated file is refused with one clear line. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import StorageError, expect, require

LAYOUT_VERSION = 1
"""Version of every file's layout; a reader refuses any other."""

_FORMAT = "taylor-attention"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, metadata: Mapping[str, str]) -> None:
    """Write tensors and text to a file, replacing it atomically: at any instant it is the old or the new one, whole.

    Args:
        path: the file; its folder must exist.
        tensors: name -> tensor, any device.
        kind: what the file holds ("state", "model", ...); `read_tensors` asks for the same.
        metadata: text to keep with the tensors.

    Raises:
        StorageError: the file cannot be written; what stood there before still stands.
    """
    safetensors = require("safetensors.torch", "io", "writing tensors to a file")
    plain = _separate(tensors)
    header = {"format": _FORMAT, "version": str(LAYOUT_VERSION), "kind": kind, "digest": _digest(plain, metadata)}
    expect(not header.keys() & metadata.keys(), "metadata", f"names other than {sorted(header)}", sorted(metadata))
    content = safetensors.save(plain, metadata={**metadata, **header})
    with replacing(path) as file:
        file.write(content)


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote under the same kind, on the CPU.

    Raises:
        StorageError: the file is missing, unreadable, truncated, altered, of another kind or of another version.
    """
    safetensors = require("safetensors.torch", "io", "reading tensors from a file")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        tensors = safetensors.load(content)
        header = dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {}))
    except Exception as error:
        raise StorageError(f"{path}: not a whole safetensors file ({type(error).__name__})") from error
    found = {name: header.pop(name, None) for name in ("format", "version", "kind", "digest")}
    for name, wanted in {"format": _FORMAT, "kind": kind, "version": str(LAYOUT_VERSION)}.items():
        if found[name] != wanted:
            raise StorageError(f"{path}: expected {name} {wanted!r}, got {found[name]!r}")
    if found["digest"] != _digest(tensors, header):
        raise StorageError(f"{path}: the content does not match its digest; the file was altered or damaged")
    return tensors, header


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) atomically.

    Raises:
        StorageError: the file cannot be written; what stood there before still stands.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the place of `path`, durably, only when the block ends without an error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another: the format refuses what is shared."""
    found: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if memory in taken else plain
        taken.add(memory)
    return found


def _sync_folder(folder: Path) -> None:
    """Make the new name durable where the system lets a folder be synchronised (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors and over the text, in a fixed order."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""The one place that reads and writes files of tensors: safetensors, replaced atomically, validated on load.

A file carries its kind (what it holds), a layout version and a digest of every tensor's bytes, so that a truncated,
altered, foreign or outdated file is refused with one clear line. Nothing is ever unpickled, and a file is judged by its
size and its header before the rest is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import StorageError, expect, require, shown
from .locks import is_at, remove_if_unlocked, try_lock

LAYOUT_VERSION = 1
"""Version of every file's layout; a reader refuses any other."""

_FORMAT = "taylor-attention"
_MAX_HEADER_BYTES = 2**24  # a hundred thousand tensors


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
        StorageError: the file is missing, unreadable, truncated, altered, of another kind or of another version, or too
            large for this machine's memory.
    """
    safetensors = require("safetensors.torch", "io", "reading tensors from a file")
    check_path(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            size, header = _read_header(path, file)
            _check_header(path, header, kind)
            _check_size(path, size)
            file.seek(0)
            content = file.read(size)
    except (OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else "out of memory"
        raise StorageError(f"{path}: cannot be read ({reason})") from error
    metadata = {name: text for name, text in header.items() if name not in ("format", "version", "kind", "digest")}
    try:
        tensors = safetensors.load(content)
        whole = header["digest"] == _digest(tensors, metadata)
    except Exception as error:
        raise _broken(path, error) from error
    if not whole:
        raise StorageError(f"{path}: the content does not match its digest; the file was altered or damaged")
    return tensors, metadata


def _read_header(path: str | Path, file: IO[bytes]) -> tuple[int, dict[str, Any]]:
    """The file's size, which is what its header says, and the text in the header."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    try:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
        text = dict(entries.pop("__metadata__", {}))
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != status.st_size:
            raise EOFError(f"{status.st_size} bytes")
    except Exception as error:
        raise _broken(path, error) from error
    return status.st_size, text


def _check_header(path: str | Path, header: Mapping[str, Any], kind: str) -> None:
    for name, wanted in {"format": _FORMAT, "kind": kind, "version": str(LAYOUT_VERSION)}.items():
        if header.get(name) != wanted:
            raise StorageError(f"{path}: expected {name} {wanted!r}, got {header.get(name)!r}")


def _check_size(path: str | Path, size: int) -> None:
    allowed = _memory() // 2  # while it is read, the file and its tensors are there at once
    if size > allowed:
        raise StorageError(f"{path}: expected at most {allowed:,} bytes, half of this machine's memory, got {size:,}")


def _memory() -> int:
    """Bytes of memory that this machine has, as far as it says so."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _broken(path: str | Path, error: Exception) -> StorageError:
    return StorageError(f"{path}: not a whole safetensors file ({type(error).__name__})")


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for who might write into it, as a pipe would have us do."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_path(path: str | Path) -> None:
    """Refuse what cannot name a file; a number would be a file that is open already, and be closed."""
    named = isinstance(path, str | Path) and str(path) != "" and "\0" not in str(path)
    expect(named, "path", "the name of a file", shown(path))


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) atomically.

    Raises:
        StorageError: the file cannot be written; what stood there before still stands.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes the place of `path`, durably, only when the block ends without an error.

    It keeps the mode of the file that it replaces; where `path` is a link, it replaces what the link leads to. Until
    then it is `.<name>.<random>.part` beside it. A process that is killed leaves that one; the next write removes it.
    """
    check_path(path)
    try:
        target = Path(os.path.realpath(path))
        before = _status_if_writable(target)
        _remove_left_behind(target)
        descriptor, temporary = _open_part(target)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if before is not None:
                    _make_alike(temporary, before)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":
                    file.close()  # there, only closed files can be moved; elsewhere, its lock protects it until it is
                os.replace(temporary, target)
            _sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def _status_if_writable(target: Path) -> os.stat_result | None:
    """Status of the file to replace, None if there is none yet; `OSError` if it is no file or may not be written."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    os.close(os.open(target, os.O_WRONLY))  # moving a file over it would not ask for this permission
    return status


def _make_alike(path: Path, before: os.stat_result) -> None:
    """Give a new file the owner, where we may, and the mode of the one to replace: what is private stays private."""
    made = path.stat()
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        with contextlib.suppress(PermissionError):
            os.chown(path, before.st_uid, before.st_gid)
    if made.st_mode != before.st_mode:
        path.chmod(stat.S_IMODE(before.st_mode))


def _open_part(target: Path) -> tuple[int, Path]:
    """A new file beside the target, locked where there are locks: they show that its writer is alive."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        descriptor = os.open(temporary, flags, 0o666)
        if try_lock(descriptor) is not False and is_at(descriptor, temporary):
            return descriptor, temporary
        os.close(descriptor)  # another process took it for one left behind before it was locked


def _remove_left_behind(target: Path) -> None:
    """Remove the parts of this file whose writers were killed."""
    ours = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.part")
    with contextlib.suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(target.parent)):
            remove_if_unlocked(target.with_name(name))


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

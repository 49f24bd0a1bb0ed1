"""Locks between processes: each belongs to an open file, so the system lifts it however its process ends."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import StorageError

_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither led astray nor kept waiting


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file: True if this process has it now, False if another has, None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def remove_if_unlocked(path: Path) -> None:
    """Remove a file that its writer had locked, if that writer is gone; stays silent about what cannot be told."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, _FLAGS)
        try:
            if try_lock(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one that stands at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep a file to this process while the block runs, by a lock on `<file>.lock` beside it.

    What a crash leaves of it does not hinder. Where the system has no locks (Windows) nothing is locked.

    Raises:
        StorageError: another process holds the file, its folder cannot be written, or a file of that name with content
            stands there, which is left alone.
    """
    side = Path(f"{os.path.realpath(path)}.lock")  # one lock whatever links lead to the file
    descriptor = _acquire(path, side)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if is_at(descriptor, side):
                    side.unlink()
            os.close(descriptor)


def _acquire(path: str | Path, side: Path) -> int | None:
    """The open and locked file; None where there are no locks."""
    while True:
        try:
            descriptor = os.open(side, _FLAGS | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(f"{path}: cannot be locked ({error.strerror})") from error
        held, found = try_lock(descriptor), os.fstat(descriptor)
        if held and is_at(descriptor, side) and stat.S_ISREG(found.st_mode) and found.st_size == 0:
            return descriptor
        os.close(descriptor)
        if held is False:
            raise StorageError(f"{path}: in use by another process")
        if found.st_size or not stat.S_ISREG(found.st_mode):
            raise StorageError(f"{path}: cannot be locked, as {side} is no lock of ours; move it away")
        if held is None:
            side.unlink(missing_ok=True)
            return None
        # Otherwise its owner removed it between our opening and our locking: once more.

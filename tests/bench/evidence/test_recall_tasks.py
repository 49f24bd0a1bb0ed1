"""Recall tasks: every answer stands in the sequence before it is asked for, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from taylor_attention.bench.evidence import recall_tasks
from taylor_attention.bench.evidence.recall_tasks import IGNORED, TASKS, Task
from taylor_attention.lm.data import to_tensor

ALL = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some text, as the speeches are an optional dependency."""
    some = to_tensor(b"fellow citizens of the senate and of the house of representatives, " * 40)
    monkeypatch.setattr(recall_tasks, "_speeches", lambda: (some, some.flip(0)))


def draw(task: Task, size: int, count: int = 4, held_out: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    tokens, targets = task.draw(torch.Generator().manual_seed(0), count, size, held_out)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (count, task.tokens(size))
    return tokens.tolist(), targets.tolist()


def asked(targets: list[int]) -> list[int]:
    return [place for place, target in enumerate(targets) if target != IGNORED]


@ALL
def test_symbols_are_in_the_vocabulary(task: Task) -> None:
    for size in {*task.train, *task.test}:
        tokens, targets = draw(task, size)
        symbols = {x for row in (*tokens, *targets) for x in row} - {IGNORED}
        assert symbols <= set(range(task.symbols))
        assert all(len(asked(row)) % task.answer == 0 and asked(row) for row in targets)


@ALL
def test_sequences_depend_on_the_generator_alone(task: Task) -> None:
    assert draw(task, task.hard) == draw(task, task.hard)
    generator = torch.Generator().manual_seed(0)
    first, second = (task.draw(generator, 4, task.hard, False)[0] for _ in range(2))
    assert not torch.equal(first, second)


@ALL
def test_it_is_compared_at_the_hardest_size_that_is_trained_on(task: Task) -> None:
    assert task.hard == max(task.train)
    assert task.hard in task.test


@pytest.mark.parametrize("pairs", [4, 64])
def test_associations_are_asked_once_each(pairs: int) -> None:
    for tokens, targets in zip(*draw(TASKS["mqar"], pairs), strict=True):
        book = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(book) == pairs
        assert len(set(book.values())) == pairs
        queries = asked(targets)
        assert sorted(tokens[place] for place in queries) == sorted(book)
        assert all(targets[place] == book[tokens[place]] for place in queries)
        fillers = [x for place, x in enumerate(tokens[2 * pairs :], 2 * pairs) if place not in queries]
        assert not set(fillers) & set(range(256))  # no filler is a key


def test_associations_are_asked_soon_rather_than_late() -> None:
    _, targets = TASKS["mqar"].draw(torch.Generator().manual_seed(0), 500, 4, False)
    places = (targets != IGNORED).double().mean(0)[8::2]  # of 28; the first one is the likeliest
    assert places[0] > 0.5 > 0.1 > places[-8:].max()
    assert places.sum() == 4


def test_a_phone_book_has_the_number_of_each_name() -> None:
    for tokens, targets in zip(*draw(TASKS["phone book"], 16), strict=True):
        lines = [tuple(tokens[i : i + 8]) for i in range(0, 16 * 8, 8)]
        book = {line[:3]: line[3:7] for line in lines}
        assert len(book) == 16
        for start in range(16 * 8, len(tokens), 8):
            assert asked(targets[start : start + 8]) == [2, 3, 4, 5]
            assert tuple(targets[start + 2 : start + 6]) == book[tuple(tokens[start : start + 3])]
            assert targets[start + 2 : start + 6] == tokens[start + 3 : start + 7]


def test_a_copy_is_the_same_string() -> None:
    for tokens, targets in zip(*draw(TASKS["copy"], 16), strict=True):
        assert tokens[:17] == tokens[17:]
        assert asked(targets) == list(range(17, 33))
        assert targets[17:33] == tokens[1:17]


def test_induction_asks_what_followed_the_mark() -> None:
    for tokens, targets in zip(*draw(TASKS["induction"], 64, count=64), strict=True):
        first = tokens.index(16)
        assert tokens[first + 1 :].count(16) == 1
        assert asked(targets) == [63]
        assert targets[63] == tokens[first + 1] < 16


def test_needles_are_in_the_text_once_before_they_are_asked_for() -> None:
    for tokens, targets in zip(*draw(TASKS["needles"], 128), strict=True):
        body, questions = bytes(tokens[:100]), bytes(tokens[100:])
        assert len({questions[i : i + 4] for i in range(0, 28, 7)}) == 4
        for start in range(0, 28, 7):
            assert body.count(questions[start : start + 4]) == 1
            assert body.count(questions[start : start + 7]) == 1
            assert asked(targets[100 + start : 107 + start]) == [3, 4]
            assert targets[103 + start : 105 + start] == list(questions[start + 4 : start + 6])


def test_needles_of_a_text_have_different_names() -> None:
    tokens, _ = draw(TASKS["needles"], 64, count=1000)
    assert {len({tuple(row[-28 + i : -24 + i]) for i in range(0, 28, 7)}) for row in tokens} == {4}


def test_needles_are_tested_in_other_text() -> None:
    train, held_out = (draw(TASKS["needles"], 256, held_out=held_out)[0][0] for held_out in (False, True))
    assert b"senate" in bytes(train)
    assert b"etanes" in bytes(held_out)

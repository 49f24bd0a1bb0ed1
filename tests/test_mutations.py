"""The mutations of `mutate.py` still fit the sources; that the tests catch them is what `make mutate` shows."""

from __future__ import annotations

import pytest

from mutate import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_line_is_there_once(mutation: Mutation) -> None:
    assert mutation.path.read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new


def test_names_differ() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 10

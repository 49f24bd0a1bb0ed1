"""The folder of results that the report's tests share, and the page of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pages import ABSENT, WILD, write_sizes, write_wild
from taylor_attention.bench.evidence import sizes
from taylor_attention.bench.evidence.registry import TOPICS
from taylor_attention.bench.evidence.report.chapters import read_chapters
from taylor_attention.bench.evidence.report.page import make_page


@contextmanager
def only_these() -> Iterator[None]:
    """The experiments of these tests; the real one without its picture, which takes a second to write."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(TOPICS):
            patch.delitem(TOPICS, name)
        for experiment in (replace(sizes.EXPERIMENT, pictures=lambda findings: []), WILD, ABSENT):
            patch.setitem(TOPICS, experiment.name, experiment)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Results of the state's sizes, and of an experiment that tries to break the page; a third was not run."""
    write_sizes(tmp_path)
    write_wild(tmp_path)
    with only_these():
        yield tmp_path


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of that folder."""
    folder = tmp_path_factory.mktemp("results")
    write_sizes(folder)
    write_wild(folder)
    with only_these():
        return make_page(*read_chapters(folder))

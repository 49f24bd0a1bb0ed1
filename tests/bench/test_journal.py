"""Results are kept as they come, and taken up again where the settings agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from taylor_attention.bench.cases import Case, Outcome, Result, Settings
from taylor_attention.bench.journal import Journal
from taylor_attention.errors import StorageError

SETTINGS = Settings(against=("a:b",))
FIRST = Result(Case("decode", 16, 2, 1024), {"taylor": Outcome(1.0, error=1e-7)}, {"x": 2.0}, needed=3, peak_bytes=4)
NEAR = Result(Case("prefill", 16, 2, 1024, 64), {"taylor": Outcome(1.0)}, {"x": 2.0}, needed=3, window_needed=2)
SECOND = Result(Case("prefill", 16, 2, 1024), {"taylor": Outcome(skipped="too large: it is")}, chunk=5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "results.jsonl", SETTINGS, Result.from_dict, resume=False)
    journal.append(FIRST)
    journal.append(SECOND)
    return journal.path


def test_what_was_written_is_found_again(path: Path):
    journal = Journal(path, SETTINGS, Result.from_dict, resume=True)
    assert journal.results == [FIRST, SECOND]
    assert journal.find(FIRST.case) == FIRST
    assert journal.find(replace(FIRST.case, length=2048)) is None
    journal.append(NEAR)
    again = Journal(path, SETTINGS, Result.from_dict, resume=True)
    assert (again.find(NEAR.case), again.find(SECOND.case)) == (NEAR, SECOND)


def test_results_of_another_form_are_refused(path: Path):
    path.write_text(path.read_text().replace(', "window_needed": null', ""))
    with pytest.raises(StorageError, match="line 1 is no result of a benchmark"):
        Journal(path, SETTINGS, Result.from_dict, resume=True)


def test_other_settings_are_kept_but_not_used(path: Path):
    before = path.read_text()
    journal = Journal(path, replace(SETTINGS, threads=7), Result.from_dict, resume=True)
    assert journal.results == []
    journal.append(SECOND)
    assert path.read_text().startswith(before)
    assert Journal(path, SETTINGS, Result.from_dict, resume=True).results == [FIRST, SECOND]


def test_without_resume_a_file_begins_anew(path: Path):
    assert Journal(path, SETTINGS, Result.from_dict, resume=False).results == []
    assert path.read_text() == ""


def test_there_need_be_no_file_to_resume(tmp_path: Path):
    assert Journal(tmp_path / "new.jsonl", SETTINGS, Result.from_dict, resume=True).results == []


def test_a_line_that_was_cut_off_is_measured_again(path: Path):
    path.write_text(path.read_text()[:-20])
    journal = Journal(path, SETTINGS, Result.from_dict, resume=True)
    assert journal.results == [FIRST]
    journal.append(SECOND)
    assert Journal(path, SETTINGS, Result.from_dict, resume=True).results == [FIRST, SECOND]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"a": 1}', '{"settings": %s}', '{"settings": %s, "outcomes": 3}'])
def test_a_file_of_something_else_is_refused(path: Path, line: str):
    settings = path.read_text().split('"settings": ')[1].split("}")[0] + "}"
    path.write_text(path.read_text() + line.replace("%s", settings) + "\n")
    with pytest.raises(StorageError, match=r"results.jsonl: line 3 is no result of a benchmark"):
        Journal(path, SETTINGS, Result.from_dict, resume=True)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(StorageError, match="cannot be read"):
        Journal(tmp_path / "results.jsonl", SETTINGS, Result.from_dict, resume=True)


def test_a_file_that_cannot_be_written_is_one_clear_line(path: Path):
    journal = Journal(path, SETTINGS, Result.from_dict, resume=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        journal.append(FIRST)

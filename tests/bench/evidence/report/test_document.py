"""The document: its blocks are what the files of results give, and what people wrote around them stays."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pages import write_wild
from taylor_attention.bench.evidence.report.chapters import Chapter, read_chapters
from taylor_attention.bench.evidence.report.document import FIGURES, remove_blocks, renew, write_block
from taylor_attention.cli.app import app

DOCS = Path(__file__).parents[4] / "docs"
EVIDENCE = DOCS / "evidence.md"
RENEW = "make it so: taylor-attention report --results docs/results --markdown docs/evidence.md --out runs/report.html"


@pytest.fixture(scope="module")
def committed() -> list[Chapter]:
    return read_chapters(DOCS / "results")[0]


def test_the_evidence_is_what_the_committed_results_give(committed: list[Chapter]) -> None:
    text = EVIDENCE.read_text(encoding="utf-8")
    assert committed
    assert renew(text, committed) == text, RENEW


def test_every_block_and_picture_of_the_evidence_has_results_and_every_file_an_experiment(
    committed: list[Chapter],
) -> None:
    text = EVIDENCE.read_text(encoding="utf-8")
    names = [each.topic.name for each in committed]
    assert sorted(re.findall(r"^<!-- end of ([\w-]+) -->$", text, re.MULTILINE)) == sorted(names), RENEW
    assert sorted(path.stem for path in (DOCS / "results").iterdir()) == sorted(names)
    shown = sorted(re.findall(rf"\]\({FIGURES}/([\w.-]+)\)", text))
    assert shown == sorted(path.name for path in (DOCS / FIGURES).iterdir()), RENEW


def find_numbers(text: str) -> list[str]:
    """Percentages, fractions and large numbers in prose: measurements, as a rule."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?:\S+|arXiv \S+", "", text, flags=re.DOTALL)
    return re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+|\d[\d,]{3,}", prose)


def test_no_number_of_the_evidence_is_written_by_hand() -> None:
    assert find_numbers(remove_blocks(EVIDENCE.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("text", ["an error of 3%", "takes 0.5 s", "1,024 tokens", "12345 steps"])
def test_a_number_written_by_hand_is_found(text: str) -> None:
    assert len(find_numbers(text)) == 1


def test_numbers_that_are_no_measurements_pass() -> None:
    assert find_numbers("degree 4 of `x=0.5`, [a](b/1.5) and\n```sh\nmake x=12345\n```\n") == []


# ---- renewing


def test_a_block_stands_where_it_stood_and_the_rest_is_left(folder: Path) -> None:
    told, _ = read_chapters(folder)
    sizes, wild = map(write_block, told)
    first = renew(f"# Title\n\nBefore.\n\n{wild}\nBetween: \\1 | *.\n\n{sizes}\nAfter.\n", told)
    assert first == f"# Title\n\nBefore.\n\n{wild}\nBetween: \\1 | *.\n\n{sizes}\nAfter.\n"
    write_wild(folder)
    path = folder / "wild.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    second = renew(first, read_chapters(folder)[0])
    assert second == first.replace("seed 7", "seed 8")
    assert second != first


def test_new_blocks_come_after_the_last_in_the_order_of_the_experiments(folder: Path) -> None:
    told, _ = read_chapters(folder)
    sizes, wild = map(write_block, told)
    assert renew("# Title\n", told) == f"# Title\n\n{sizes}\n{wild}"
    assert renew(f"# Title\n\n{sizes}\nAfter.\n", told) == f"# Title\n\n{sizes}\n{wild}\nAfter.\n"


def test_what_people_wrote_is_what_remains(folder: Path) -> None:
    told, _ = read_chapters(folder)
    assert remove_blocks(renew("# Title\n\nText.\n", told)).split() == ["#", "Title", "Text."]


def test_texts_cannot_become_markup(folder: Path) -> None:
    wild = read_chapters(folder)[0][1]
    block = write_block(wild)
    shown = "\\</script>\\<script>alert(1)\\</script> \\| \\*a\\* & \"b\" 'c' \\\\1 \\<!-- end of wild -->"
    assert f"\n- {shown}\n" in block
    rows = [line for line in block.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
    assert cells == [13] * 32 + [2] * 3 + [1] * 2
    prose = re.sub(r"`.*`", "", block)
    assert re.findall(r"(?<!\\)<[^!]\w*", prose) == ["<details", "<summary", "</summary", "</details"]


def test_a_text_of_several_lines_becomes_one(folder: Path) -> None:
    told, _ = read_chapters(folder)
    assert "\n- a b\n" in write_block(replace(told[0], conclusions=["a\n\nb"]))


def test_the_command_renews_document_and_pictures(folder: Path) -> None:
    document = folder / "docs" / "evidence.md"
    document.parent.mkdir()
    document.write_text("# Title\n")
    arguments = ["report", "--results", str(folder), "--markdown", str(document)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert document.read_text(encoding="utf-8") == renew("# Title\n", read_chapters(folder)[0])
    [figure] = (document.parent / FIGURES).iterdir()
    assert figure.name == "wild.png"
    assert figure.read_bytes().startswith(b"\x89PNG")

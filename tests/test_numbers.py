"""Numbers of the pages are those of the committed results; what is no part of the evidence says where it is from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence.md"
BY_HAND = "decisions.md"
"""Measurements by hand, as the page says itself."""

PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path != EVIDENCE)]
PAGES = [path for path in PAGES if path.name != BY_HAND]

# What is no measurement, or has its own test or script, by page.
ELSEWHERE = {
    "README.md": {
        "the paper's year": "2026",
        "`taylor-attention eval`, held by tests/lm/test_shipped.py": "1.324 1.256 5%",
    },
    "how-it-works.md": {"zeros of truncated series, and e^2": "1.596 2.181 7.4"},
    "needles.md": {"ln(W/n) + n/W for n = 64 and W = 192": "1.43"},
    "pretrained.md": {
        "cached tokens of as many bytes, held by tests/hf/test_settings.py": "2,243",
        "what `taylor-attention distill` itself tells of the command on the page": "204,800 3.3197 3.3358 3.2229 "
        "0.1404 0.1624",
    },
    "reliability.md": {
        "names and tolerances of tests": "2000 2,000 15%",
        "the largest float16, and bounds on keys: 2^(96/3) and 2^(96/2)": "65,504 4.3e9 2.8e14",
        "the table whose script stands below it": "1.5e-7 7.9e-8 1.6e-7 2.4e-7 3.6e-6 1.0e-6 3.8e-5 5.9e-6 3.0e-4 "
        "9.7e-5 0.051 0.030 9.6e-3 2,500",
    },
    "transformers.md": {
        "versions": "5.20 4.5",
        "cached tokens of as many bytes, held by tests/hf/test_settings.py": "2,243",
    },
}


def find_numbers(text: str) -> set[str]:
    """Percentages, fractions and large numbers in prose and tables: measurements, as a rule."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?:\S+|arXiv \S+|\$[^$]*\$", "", text, flags=re.DOTALL)
    found = re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+(?:e[-+]?\d+)?|\d{1,3}(?:,\d{3})+|\d{4,}", prose)
    return {each.replace(" ", "") for each in found}


def value_of(number: str) -> tuple[float, bool]:
    """What a number says, and whether it is a percentage."""
    return float(number.rstrip("%").replace(",", "")), number.endswith("%")


@pytest.fixture(scope="module")
def measured() -> set[tuple[float, bool]]:
    text = EVIDENCE.read_text(encoding="utf-8")
    return {value_of(number) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_number_is_part_of_the_evidence_or_says_where_it_is_from(page: Path, measured: set[tuple[float, bool]]):
    told = {number for numbers in ELSEWHERE.get(page.name, {}).values() for number in numbers.split()}
    found = find_numbers(page.read_text(encoding="utf-8"))
    assert {number for number in found if value_of(number) not in measured} - told == set()
    assert told - found == set(), "these are not on the page any more"


def test_the_page_of_measurements_by_hand_says_so():
    assert "measurements by\nhand" in (ROOT / "docs" / BY_HAND).read_text(encoding="utf-8")


NUMBERS = {
    "an error of 3% or 0.5": {"3%", "0.5"},
    "| 1,024 | 2.5e-7 |": {"1,024", "2.5e-7"},
    "12345 steps, 4 heads": {"12345"},
    "`x=0.5`, [a](b/1.5) and\n```sh\nmake x=12345\n```\n": set(),
}


@pytest.mark.parametrize(("text", "numbers"), NUMBERS.items())
def test_numbers_are_found(text: str, numbers: set[str]):
    assert find_numbers(text) == numbers

"""What an experiment is: cases, what is measured in each, and the tables, pictures and sentences made of the findings.

Tables, pictures and sentences are functions of the findings alone, which are plain numbers in a file: whoever has the
file can make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Case = dict[str, Any]
"""What sets one measurement apart from the others of its experiment; values that JSON has."""


@dataclass(frozen=True)
class Finding:
    """A finished case: what was found, as values that JSON has, and how long it took."""

    case: Case
    values: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Finding:
        """The finding that gave this dict; KeyError or TypeError if none did."""
        return cls(dict(fields["case"]), dict(fields["values"]), fields["seconds"])


Findings = Sequence[Finding]


@dataclass(frozen=True)
class Table:
    """Cells as they are read; the first column is text, the others are numbers. `note` says what the numbers are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure, the name of its file (without .png), and what it shows in one or two sentences."""

    name: str
    caption: str
    figure: Any


@dataclass(frozen=True)
class Topic:
    """One question, and how what was found is told.

    Attributes:
        name: in commands and files. title: for people. question: what it answers, a sentence.
        plan: the cases, fewer and smaller ones for a quick look.
        tables, pictures: made of the findings; pictures need matplotlib.
        conclusions: sentences, with numbers from the findings.
        command: that measures it; None: `taylor-attention reproduce` does.
    """

    name: str
    title: str
    question: str
    plan: Callable[[bool], list[Case]]
    tables: Callable[[Findings], list[Table]]
    pictures: Callable[[Findings], list[Picture]]
    conclusions: Callable[[Findings], list[str]]
    command: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Experiment(Topic):
    """A question, and how it is answered case by case.

    Attributes:
        measure: what is found in a case; all randomness comes from the case and the seed.
        timed: whether it measures time or memory, so that it must run alone; cases of others run side by side, in
            processes of one thread each.
        missing: what it needs and is not there, as a sentence; None: nothing.
    """

    measure: Callable[[Case, int], dict[str, Any]]
    timed: bool = False
    missing: Callable[[], str | None] = lambda: None


def number(value: float, digits: int = 3) -> str:
    """A number as a table shows it: three significant digits, thousands with commas, extremes as powers of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def select(findings: Findings, **wanted: Any) -> list[Finding]:
    """Findings whose cases have these values."""
    return [each for each in findings if all(each.case.get(name) == value for name, value in wanted.items())]

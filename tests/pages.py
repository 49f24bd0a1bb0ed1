"""Results for a report, some of which try to break it, and the reading of pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from taylor_attention.bench.evidence import sizes
from taylor_attention.bench.evidence.experiment import Experiment, Finding, Picture, Table
from taylor_attention.bench.evidence.results import write_results

HOSTILE = "</script><script>alert(1)</script> | *a* & \"b\" 'c' \\1 <!-- end of wild -->"
LONG = "Donaudampfschifffahrtsgesellschaftskapitänswitwe" * 3


def draw(findings: Sequence[Finding]) -> list[Picture]:
    figure = Figure(figsize=(12, 3))
    axes = figure.subplots()
    axes.plot([each.values["y"] for each in findings])
    axes.set_title("$x < y$ & z")
    return [Picture("wild", HOSTILE, figure)]


def tabulate(findings: Sequence[Finding]) -> list[Table]:
    rows = tuple((LONG, *(f"{each.values['y'] * 10**9:,}" for _ in range(12))) for each in findings)
    wide = Table(HOSTILE, ("name", *(f"column {n}" for n in range(12))), rows, HOSTILE + LONG)
    return [wide, Table("short", ("a", "b"), (("1 | 2", "<3"),)), Table("nothing", ("a",), ())]


WILD = Experiment(
    "wild",
    f"Wild {HOSTILE}",
    HOSTILE,
    plan=lambda quick: [{"n": n, "pair": [1, 2.5]} for n in range(40)],
    measure=lambda case, seed: {},
    tables=tabulate,
    pictures=draw,
    conclusions=lambda findings: [HOSTILE, LONG, f"{len(findings)} cases"],
)
ABSENT = Experiment(
    "absent",
    f"Absent {HOSTILE}",
    f"{LONG}?",
    plan=lambda quick: [],
    measure=lambda case, seed: {},
    tables=lambda findings: [],
    pictures=lambda findings: [],
    conclusions=lambda findings: [],
)


def write_wild(folder: Path, values: str = "y") -> None:
    """Thirty of the forty cases."""
    findings = [Finding({"n": n, "pair": (1, 2.5)}, {values: n}, 0.25) for n in range(30)]
    write_results(folder / "wild.json", "wild", f"a command {HOSTILE}", 7, findings)


def write_sizes(folder: Path) -> None:
    """All cases."""
    findings = [Finding(case, sizes.measure(case, 0), 0.0) for case in sizes.plan(False)]
    write_results(folder / "sizes.json", "sizes", "taylor-attention reproduce --only sizes --seed 0", 0, findings)


def read_script(page: str, name: str) -> str:
    """What the script of this id holds."""
    scripts = re.findall(r'<script(?: type="application/json")? id="([a-z]+)">(.*?)</script>', page, re.DOTALL)
    return dict(scripts)[name]


class Outline(HTMLParser):
    """The elements of a page; closing one that is not the innermost open one is an error.

    Attributes:
        elements: names with attributes, in order. texts: outside scripts and styles. open: not closed yet.
    """

    EMPTY = frozenset({"meta", "input", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            raise ValueError(f"</{tag}> on line {self.getpos()[0]} closes something else")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of this name."""
        return [attributes for name, attributes in self.elements if name == tag]

"""Tables, pictures and sentences of planted needles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10

from .. import needles_figure
from ..needles import Result
from ..needles_plan import AGE, MARGIN, TIES, Settings, Sweep, state_bytes
from ..needles_plan import Case as Planting
from .experiment import Finding, Findings, Picture, Table, select
from .needles_cases import ASKED, MOVED, SWEEPS, WITHOUT, settle

Results = Mapping[Planting, Result]

_COLUMN = {MARGIN: "margin {0.margin:g}", TIES: "ties {0.ties:,}", AGE: "age {0.age:,}"}
_BEST, _HEAVY = "window + fitted 2", "window + heavy + fitted 2"


def tables(findings: Findings) -> list[Table]:
    """A table for each sweep, one of other backgrounds, one of chances to be asked for."""
    made = [table for each in select(findings, what=SWEEPS) for table in _tabulate_case(each)]
    chances = _tabulate_chances(findings)
    return [*made, *_tabulate_moved(select(findings, what=MOVED)), *([chances] if chances.rows else [])]


def _tabulate_case(finding: Finding) -> list[Table]:
    settings, sweeps = settle(finding.case, 0)
    return tabulate_sweeps(settings, sweeps, _read(finding))


def _read(finding: Finding) -> dict[Planting, Result]:
    found = (Result.from_dict(each) for each in finding.values["results"])
    return {result.case: result for result in found}


def tabulate_sweeps(settings: Settings, sweeps: Sequence[Sweep], results: Results) -> list[Table]:
    """A table for each sweep: a row per method, a column per case; first what softmax gives to the needles."""
    nbytes = {name: f"{state_bytes(each, settings.head_dim) / 1e3:,.0f}" for name, each in settings.methods.items()}
    made = [_tabulate(sweep, [results[case] for case in sweep.cases], nbytes) for sweep in sweeps]
    streams = settings.heads * settings.seeds
    told = (
        f"||y - softmax|| / ||softmax|| of the last of {settings.length:,} tokens, medians over {streams} streams; "
        f"background scores {settings.mean:g} +- {settings.spread:g}; chance of each earlier query to ask as the last "
        f"one does {settings.asked:g}. kB: of the state, per sequence and head. wide window D: as many bytes as "
        "window + taylor D takes, all of them in a window."
    )
    return [*made[:-1], Table(made[-1].title, made[-1].columns, made[-1].rows, told)]


def _tabulate(sweep: Sweep, results: Sequence[Result], nbytes: Mapping[str, str]) -> Table:
    columns = tuple(_COLUMN[sweep.name].format(case) for case in sweep.cases)
    weights = ("softmax's weight of the needles", "", *(number(result.weight) for result in results))
    rows = [
        (name, nbytes[name], *(number(result.quartiles(name)[1]) for result in results)) for name in results[0].errors
    ]
    return Table(_title(sweep, sweep.cases[0]), ("method", "kB", *columns), (weights, *rows))


def _title(sweep: Sweep, case: Planting) -> str:
    fixed = {
        MARGIN: f"needles: {case.ties:,}, age {case.age:,}",
        TIES: f"margin {case.margin:g}, age {case.age:,}",
        AGE: f"needles: {case.ties:,}, margin {case.margin:g}",
    }
    return f"Error by {sweep.name} ({fixed[sweep.name]}{', in the window' if sweep.inside else ''})"


def _tabulate_moved(findings: Findings) -> list[Table]:
    """Needles in the window, with background scores that are shifted or wider: a column for each and margin."""
    columns: list[str] = []
    cells: dict[str, list[str]] = {}
    for each in findings:
        settings, sweeps = settle(each.case, 0)
        inside = next(sweep for sweep in sweeps if sweep.name == MARGIN and sweep.inside)
        for case in inside.cases:
            result = _read(each)[case]
            columns.append(f"{settings.mean:g} +- {settings.spread:g}, margin {case.margin:g}")
            for name in result.errors:
                cells.setdefault(name, []).append(number(result.quartiles(name)[1]))
    if not columns:
        return []
    title = "Needles in the window of other backgrounds"
    return [Table(title, ("method", *columns), tuple((name, *row) for name, row in cells.items()))]


def _tabulate_chances(findings: Findings) -> Table:
    """Heavy tokens beyond the window, by the chance that an earlier query asked for a needle."""
    found = sorted(
        (settings.asked, result.quartiles(_HEAVY))
        for each in findings
        if each.case["what"] in (SWEEPS, WITHOUT, ASKED)
        for settings, sweeps in [settle(each.case, 0)]
        for result in _read(each).values()
        if result.case == _beyond(sweeps)
    )
    names = ("lower quartile", "median", "upper quartile")
    rows = tuple((name, *(number(own[i]) for _, own in found)) for i, name in enumerate(names)) if found else ()
    columns = (_HEAVY, *(f"chance {asked:g}" for asked, _ in found))
    return Table("By the chance to be asked for (margin 10, 4 needles, age 1,000)", columns, rows)


def _beyond(sweeps: Sequence[Sweep]) -> Planting | None:
    """The planting at margin 10 beyond the window that all kinds of streams have."""
    cases = (case for sweep in sweeps if sweep.name == MARGIN and not sweep.inside for case in sweep.cases)
    return next((case for case in cases if case.margin == 10), None)


def pictures(findings: Findings) -> list[Picture]:
    """Errors by margin, ties and age."""
    made = []
    for each in select(findings, what=SWEEPS):
        settings, sweeps = settle(each.case, 0)
        made.append(needles_figure.draw(sweeps, _read(each), settings))
    return made


def conclusions(findings: Findings) -> list[str]:
    """What a window, its far field and heavy tokens are worth, in and beyond the window."""
    lines = []
    for each in select(findings, what=SWEEPS):
        _, sweeps = settle(each.case, 0)
        results = _read(each)
        for sweep in sweeps:
            if sweep.name == MARGIN:
                lines += [_tell(sweep, results[case]) for case in sweep.cases if case.margin in (8, 10)]
    return lines


def _tell(sweep: Sweep, result: Result) -> str:
    """One planting, by the methods that differ most."""
    place = "in the window" if sweep.inside else "beyond the window"
    names = ("window", "window + mean", _BEST, "window + heavy", _HEAVY)
    errors = ", ".join(f"{number(result.quartiles(name)[1])} by {name}" for name in names)
    return (
        f"Needles {place} (age {result.case.age:,}) at margin {result.case.margin:g}, where softmax gives them "
        f"{number(result.weight)} of the weight: the error is {errors}."
    )


def number(value: float) -> str:
    """Two digits, never as a power of ten."""
    return f"{value:.2g}" if not 0 < value < 1e-4 else f"{value:.{1 - floor(log10(value))}f}"

"""What the experiment `needles` measures: which streams, plantings and methods a case stands for."""

from __future__ import annotations

from ..needles_plan import (
    AT,
    DEGREES,
    FULL,
    QUICK,
    SINKS,
    WINDOW,
    Settings,
    Sweep,
    default_heavy,
    make_methods,
    plan_sweeps,
)
from ..needles_plan import Case as Planting
from .experiment import Case

SWEEPS, WITHOUT, ASKED, MOVED = "sweeps", "nobody asks", "asked", "moved scores"
"""All methods; heavy tokens if no earlier query asks for a needle; by the chance that one does; other backgrounds."""

_CHANCES = (0.001, 0.005, 0.01, 0.05, 0.1)
_MOVED = ({"mean": 2.0}, {"spread": 1.5})
_FEW = [0.0, 6.0, 10.0]
"""Margins where backgrounds are compared."""


def plan(quick: bool) -> list[Case]:
    """One case for each kind of stream."""
    sizes = QUICK if quick else FULL
    stream = {name: sizes[name] for name in ("length", "heads", "seeds")}
    whole = {name: list(sizes[name]) for name in ("margin", "ties", "age")}
    at = {"ties": [AT[1]], "age": [AT[2]]}
    chances = _CHANCES[::4] if quick else _CHANCES
    return [
        {"what": SWEEPS, **stream, **whole},
        {"what": WITHOUT, "asked": 0.0, **stream, **at, "margin": whole["margin"]},
        *({"what": MOVED, **moved, **stream, **at, "margin": _FEW} for moved in _MOVED),
        *({"what": ASKED, "asked": chance, **stream, **at, "margin": [AT[0]]} for chance in chances),
    ]


def settle(case: Case, seed: int) -> tuple[Settings, list[Sweep]]:
    """What holds for a case, and the plantings in it."""
    heavy = default_heavy(WINDOW)
    methods = make_methods(WINDOW, SINKS, heavy, DEGREES, Settings.head_dim)
    chosen = {name: options for name, options in methods.items() if _takes_part(case["what"], name)}
    given = {name: case[name] for name in ("length", "heads", "seeds", "asked", "mean", "spread") if name in case}
    sweeps = plan_sweeps(Planting(*AT), case["margin"], case["ties"], case["age"], WINDOW - heavy)
    return Settings(chosen, seed=seed, **given), sweeps


def _takes_part(what: str, method: str) -> bool:
    """All methods in sweeps; beside them those that show what a case is for."""
    if what == SWEEPS:
        return True
    if what == MOVED:
        return method.startswith(("window + taylor", "window + fitted"))
    return "heavy" in method and "fitted" in method

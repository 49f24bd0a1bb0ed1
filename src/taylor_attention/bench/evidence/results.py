"""The file of an experiment's results: what was found, by which command, seed, version and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.storage import write_text
from ...errors import StorageError
from ..machine import describe
from .experiment import Finding

_DIGITS = 6
"""Significant digits that are kept: more than any of these measurements has."""


@dataclass(frozen=True)
class Results:
    """Findings of an experiment, with where they are from."""

    experiment: str
    command: str
    seed: int
    version: str
    machine: dict[str, Any]
    findings: list[Finding]

    @property
    def seconds(self) -> float:
        """Of all cases, which may have run side by side."""
        return sum(finding.seconds for finding in self.findings)


def write_results(
    path: Path,
    experiment: str,
    command: str,
    seed: int,
    findings: Sequence[Finding],
    machine: Mapping[str, Any] | None = None,
) -> Results:
    """Write a file of results, replaced atomically; what it then holds. `machine`: None, as it is now."""
    rounded = [Finding.from_dict(_round(finding.to_dict())) for finding in findings]
    results = Results(experiment, command, seed, __version__, dict(machine or describe()), rounded)
    head = {name: getattr(results, name) for name in ("experiment", "command", "seed", "version", "machine")}
    lines = ",\n".join(json.dumps(finding.to_dict()) for finding in rounded)
    write_text(path, json.dumps(head)[:-1] + ', "findings": [\n' + lines + "\n]}\n")
    return results


def read_results(path: Path) -> Results:
    """Read a file of results.

    Raises:
        StorageError: there is none, or it holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        findings = [Finding.from_dict(each) for each in fields.pop("findings")]
        return Results(**fields, findings=findings)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: not a file of results ({error})") from error


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

"""What the commands share: consoles, progress bars, numbers as people read them, and models by name."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..bench.evidence.experiment import Table as Findings
from ..core.basis import MAX_DEGREE
from ..core.threads import MAX_THREADS
from ..errors import LARGEST_INT, expect
from ..lm.checkpoint import SHIPPED, load_checkpoint, shipped
from ..nn import LanguageModel

MAX_COUNT = 2**40
"""How many, or how large, anything may be; no machine comes to the end of more."""


class Number(click.FloatRange):
    """A range of numbers, in which NaN and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click converts, but finite."""
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a finite number.", param, ctx)


COUNT, COUNT_OR_NONE = click.IntRange(1, MAX_COUNT), click.IntRange(0, MAX_COUNT)
DEGREE = click.IntRange(0, MAX_DEGREE)
THREADS = click.IntRange(1, MAX_THREADS)
SEED = click.IntRange(0, LARGEST_INT)
SECONDS = Number(min=0, min_open=True)


class _Degree(click.ParamType):  # type: ignore[type-arg]  # generic in some versions only
    name = "integer or none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value is None or value == "none" else click.INT.convert(value, param, ctx)


_WIDE = 140
"""Columns where stdout is no terminal."""


def _or_none(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    return None if value == "none" else value


degree_option = partial(click.option, "--degree", "degree", type=_Degree(), callback=_or_none)
"""An int, or "none" (no far part), which arrives as None."""

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for machines.")


def err() -> Console:
    """The console of progress and remarks: stderr, so that stdout holds results only."""
    return Console(stderr=True, highlight=False)


def out() -> Console:
    """The console of results."""
    return Console(highlight=False)


def out_wide() -> Console:
    """The same for tables: a file is as wide as they are."""
    console = out()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    return console


def show(console: Console, made: Findings) -> None:
    """Print a table of findings and its note."""
    shown = table(made.title, *made.columns)
    for row in made.rows:
        shown.add_row(*row)
    console.print(shown)
    if made.note:
        console.print(made.note, markup=False, soft_wrap=True)


def emit_json(value: Any) -> None:
    """One JSON object on one line of stdout; a number that is not finite becomes null."""
    click.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_bar(*extra: str) -> Progress:
    """A bar with counts and times on stderr, gone when done; `extra` are further fields, in rich's markup.

    Where stderr is no terminal it shows nothing: a log wants lines, which the command writes.
    """
    console = err()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *map(TextColumn, extra)]
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text, folded where it is long, and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for position, name in enumerate(columns):
        made.add_column(name, justify="right" if position else "left", no_wrap=position > 0, overflow="fold")
    return made


def size(nbytes: float) -> str:
    """Bytes as a person reads them: 1.5 MB (powers of 1000)."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(nbytes) >= 999.5 and len(units) > 1:
        nbytes, units = nbytes / 1000, units[1:]
    return f"{nbytes:.3g} {units[0]}"


def make_folder(name: str) -> Path:
    """The folder of --out, made if it is not there."""
    if not name:
        raise click.UsageError("--out: expected the name of a folder, got an empty one")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--out: expected a folder that can be made, got {folder} ({error.strerror})") from error
    return folder


def check_target(path: Path, option: str) -> None:
    """Refuse, before the work is done, what cannot become a file of an option."""
    expect(path.name != "", option, "the name of a file", path)
    try:
        path.lstat()
    except FileNotFoundError:
        expect(path.parent.is_dir(), option, "a file in a folder that is there", path)
    except OSError as error:
        raise click.UsageError(
            f"{option}: expected a file that can be written, got {path} ({error.strerror})"
        ) from error


def load(model: str, option: str = "--model") -> LanguageModel:
    """The model of a checkpoint by path, or of a shipped one by name; in float32, ready to run.

    Raises:
        ArgumentError: there is no such file, or a shipped name whose weights are not there.
        StorageError: the file is no checkpoint.
    """
    known = model in SHIPPED or os.path.isfile(model)  # Path.is_file raises OSError for names too long to be one
    expect(known, option, f"a checkpoint or one of {', '.join(SHIPPED)}", model)
    return load_checkpoint(shipped(model) if model in SHIPPED else model)[0]

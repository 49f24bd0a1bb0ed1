"""`taylor-attention demo`: watch what a token costs as the context grows, with Taylor attention and with softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ..bench import demo as bench
from ..core.storage import write_text
from ..core.threads import thread_count
from ..errors import MissingDependencyError, expect
from ..lm.data import CORPORA, load_split, load_text
from ..lm.session import Session
from ..nn import LanguageModel
from .console import (
    COUNT,
    MAX_COUNT,
    THREADS,
    emit_json,
    err,
    json_option,
    load,
    make_folder,
    out,
    progress_bar,
    size,
    table,
)

QUICK_TOKENS = 6_000
LABELS = {"taylor": "Taylor, fixed state", "softmax": "softmax, key/value cache"}


@click.command(short_help="Watch the cost of a token as the context grows.")
@click.option(
    "--tokens", type=click.IntRange(256, MAX_COUNT), default=50_000, show_default=True, help="Bytes of text to read."
)
@click.option(
    "--text", default="stdlib", show_default=True, help="A file, a folder, or a named corpus (its held-out part)."
)
@click.option("--taylor", default="taylor", help="Another Taylor checkpoint.")
@click.option("--softmax", default="softmax", help="Another softmax checkpoint.")
@click.option("--out", "folder", type=click.Path(file_okay=False), default="runs/demo", show_default=True)
@click.option("--steps", type=COUNT, default=64, show_default=True, help="Decode steps per context.")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="Of the decode steps.")
@click.option("--continuation", type=COUNT, default=400, show_default=True, help="Bytes to write.")
@click.option("--quick", is_flag=True, help=f"Only {QUICK_TOKENS:,} bytes of text.")
@json_option
def demo(
    tokens: int,
    text: str,
    taylor: str,
    softmax: str,
    folder: str,
    steps: int,
    threads: int,
    continuation: int,
    quick: bool,
    as_json: bool,
) -> None:
    """Read a long text with the shipped model and its softmax twin, and measure the cost of a token on the way.

    Ends with a table, a continuation of the text, and OUT/{measurements.csv, cost_per_token.png, continuation.txt}.
    """
    tokens = min(tokens, QUICK_TOKENS) if quick else tokens
    pauses = bench.contexts(tokens, steps)
    models = {"taylor": _twin("taylor", taylor), "softmax": _twin("softmax", softmax)}
    content = load_split([text])[1] if text in CORPORA else load_text([text])
    expect(len(content) >= tokens, "--tokens", f"at most the {len(content):,} bytes of {text}", f"{tokens:,}")
    target = make_folder(folder)
    rows = _watch(models, content[:tokens], pauses, steps, threads)
    written = _continue(models["taylor"], content[:tokens], continuation, threads)
    figure = _files(target, rows, written)
    if as_json:
        return emit_json(_summary(rows, written, text, tokens, target))
    console = out()
    console.print(_table(rows, f"Cost of one token (medians of {steps} decode steps, threads: {threads})"))
    console.print(_verdict(rows))
    console.rule("the Taylor model goes on from there")
    console.print(written, markup=False)
    console.rule()
    console.print(f"{figure}\nmeasurements, figure and text: {target}", markup=False, soft_wrap=True)


def _twin(attention: str, checkpoint: str) -> LanguageModel:
    model = load(checkpoint, f"--{attention}")
    got = model.config.attention
    expect(got == attention, f"--{attention}", f"a model with {attention} attention", f"one with {got}")
    return model


def _watch(
    models: dict[str, LanguageModel], text: bytes, pauses: Sequence[int], steps: int, threads: int
) -> list[bench.Measurement]:
    """Measure, with a bar per model and a table that grows; a line per context where stderr is no terminal."""
    console, bar = err(), progress_bar()
    rows: list[bench.Measurement] = []
    tasks = {name: bar.add_task(f"reading: {LABELS[name]}", total=len(text)) for name in models}
    with contextlib.ExitStack() as stack:
        live = Live(_screen(rows, bar), console=console, refresh_per_second=4, transient=True)
        if console.is_terminal:
            stack.enter_context(live)
        for found in bench.measure(
            models,
            text,
            pauses=pauses,
            steps=steps,
            thread_count=threads,
            notify=lambda name, at: bar.update(tasks[name], completed=at),
        ):
            rows += found
            live.update(_screen(rows, bar)) if console.is_terminal else _say(console, found)
    return rows


def _screen(rows: list[bench.Measurement], bar: Progress) -> Group:
    return Group(_table(rows, "Cost of one token, measured as the text is read"), bar)


def _say(console: Console, found: list[bench.Measurement]) -> None:
    parts = [f"{row.model} {row.ms_per_token:.2f} ms, {size(row.state_bytes)}" for row in found]
    console.print(f"context {found[0].context:>7,}: " + "; ".join(parts), markup=False, soft_wrap=True)


def _table(rows: Sequence[bench.Measurement], title: str) -> Table:
    """One row per context, the two models side by side."""
    shown = table(title, "context", "Taylor ms", "softmax ms", "state", "cache", "process", "bits")
    for taylor, softmax in zip(rows[::2], rows[1::2], strict=True):
        process = size(softmax.resident_bytes) if softmax.resident_bytes is not None else "?"
        shown.add_row(
            f"{taylor.context:,}",
            f"{taylor.ms_per_token:.2f}",
            f"{softmax.ms_per_token:.2f}",
            size(taylor.state_bytes),
            size(softmax.state_bytes),
            process,
            f"{taylor.bits_per_byte:.2f} / {softmax.bits_per_byte:.2f}",
        )
    return shown


def _verdict(rows: Sequence[bench.Measurement]) -> Text:
    """What the table says, in one sentence computed from it."""
    times = {name: bench.growth(rows, name) for name in LABELS}
    return Text(
        f"At {rows[-1].context:,} bytes of context a token takes {times['taylor']:.2f} times as long as at the "
        f"shortest contexts with Taylor attention, {times['softmax']:.2f} times with softmax.\n"
        "state, cache: memory allocated for the context. process: of the whole process, both models in it. bits: loss "
        "per byte of the text since the row above, Taylor / softmax."
    )


def _continue(model: LanguageModel, text: bytes, tokens: int, threads: int) -> str:
    """What the Taylor model writes after the text."""
    session = Session(model)
    with err().status("writing a continuation"):
        session.read(text)
        with thread_count(threads):
            return bytes(session.stream(tokens, temperature=0.7)).decode("utf-8", "replace")


def _files(folder: Path, rows: Sequence[bench.Measurement], written: str) -> str:
    """Write everything; a sentence about the figure, which alone may be missing."""
    bench.write_rows(folder / "measurements.csv", rows)
    write_text(folder / "continuation.txt", written)
    figure = folder / "cost_per_token.png"
    try:
        bench.draw(figure, rows)
    except MissingDependencyError as error:
        return f"no figure: {error}"
    return f"figure: {figure}"


def _summary(rows: Sequence[bench.Measurement], written: str, text: str, tokens: int, folder: Path) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "measurements": [asdict(row) for row in rows],
        "growth": {name: bench.growth(rows, name) for name in LABELS},
        "continuation": written,
        "out": str(folder),
    }

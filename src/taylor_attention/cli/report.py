"""`taylor-attention report`: one page of what experiments found."""

from __future__ import annotations

from pathlib import Path

import click

from ..bench.evidence.drawing import save_pictures
from ..bench.evidence.report.chapters import Chapter, how_to_measure, read_chapters
from ..bench.evidence.report.document import FIGURES, renew
from ..bench.evidence.report.page import make_page
from ..core.storage import write_text
from ..errors import StorageError, expect
from .console import emit_json, err, json_option, make_folder, out, size

_FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
_DOCUMENT = click.Path(dir_okay=False, exists=True, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="One page of what `reproduce` found.")
@click.option("--results", "folder", type=_FOLDER, default="runs/reproduce", show_default=True, help="Has NAME.json.")
@click.option("--out", "page", type=_FILE, help="The page [RESULTS/report.html].")
@click.option("--markdown", "document", type=_DOCUMENT, help="Renew this document's blocks of results too.")
@json_option
def report(folder: Path, page: Path | None, document: Path | None, as_json: bool) -> None:
    """Write one HTML file with figures, tables, conclusions and their origin, and a calculator; it loads nothing.

    The pictures of the document that --markdown names go into figures/ beside it.
    """
    target = page or folder / "report.html"
    expect(target.name != "", "--out", "the name of a file", target)
    chapters, missing = read_chapters(folder)
    expect(bool(chapters), "--results", "a folder with results of `taylor-attention reproduce`", folder)
    text = _read(document) if document else ""  # judged before anything is written
    make_folder(str(target.parent))
    write_text(target, make_page(chapters, missing))
    if document:
        _renew(document, text, chapters)
    if as_json:
        told = {each.topic.name: {"cases": each.found, "planned": each.planned} for each in chapters}
        names = [each.name for each in missing]
        return emit_json({"page": str(target), "bytes": target.stat().st_size, "experiments": told, "missing": names})
    for each in missing:
        err().print(f"not measured: {how_to_measure(each)} --out {folder}", markup=False, soft_wrap=True)
    line = f"{target}: {len(chapters)} of {len(chapters) + len(missing)} experiments, {size(target.stat().st_size)}"
    out().print(line, markup=False, soft_wrap=True)


def _read(document: Path) -> str:
    try:
        return document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{document}: cannot be read ({error})") from error


def _renew(document: Path, text: str, chapters: list[Chapter]) -> None:
    """Renew a document that has this text, and its pictures."""
    figures = make_folder(str(document.parent / FIGURES))
    save_pictures([picture for each in chapters for picture in each.pictures], figures)
    write_text(document, renew(text, chapters))

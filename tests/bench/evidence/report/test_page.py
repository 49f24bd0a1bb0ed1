"""The page: well formed, with everything in it, loading nothing, and never taken over by what it shows."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

import taylor_attention as ta
from pages import HOSTILE, Outline, read_script
from taylor_attention.bench.evidence import sizes
from taylor_attention.bench.evidence.report import images
from taylor_attention.bench.evidence.report.chapters import read_chapters
from taylor_attention.bench.evidence.report.page import make_page
from taylor_attention.cli.app import app
from taylor_attention.cli.console import size


def test_every_element_is_closed(page: str) -> None:
    assert Outline(page).open == []


def test_it_shows_all_that_there_is(folder: Path, page: str) -> None:
    shown, told = Outline(page).texts, read_chapters(folder)[0]
    for chapter in told:
        words = [chapter.topic.title, chapter.topic.question, *chapter.conclusions, chapter.results.command]
        words += [cell for table in chapter.tables for row in (table.columns, *table.rows) for cell in row]
        words += [table.note for table in chapter.tables if table.note]
        assert [word for word in words if word not in shown] == []
    assert len(Outline(page).all("img")) == sum(len(chapter.pictures) for chapter in told) == 1
    assert {"Seed", "Version", "Machine", "Measured", "Time"} <= set(shown)


def test_what_was_not_measured_is_named_with_its_command(page: str) -> None:
    texts = Outline(page).texts
    assert texts.count("Not measured") == 2  # contents and section
    assert "taylor-attention reproduce --only absent" in texts


def test_what_was_measured_in_part_says_so(page: str) -> None:
    assert Outline(page).texts.count("30 of the full plan's 40 cases") == 3  # contents, title and origin
    assert len(Outline(page).all("span")) == 3  # these two, and how many were not measured


def test_where_nothing_is_missing_nothing_is_named(folder: Path) -> None:
    told, _ = read_chapters(folder)
    assert "Not measured" not in make_page(told[:1], [])


def test_texts_cannot_become_markup(page: str) -> None:
    assert "<script>alert" not in page
    assert "<!-- end" not in page
    assert len(Outline(page).all("script")) == 3


def test_it_loads_nothing(page: str) -> None:
    outline = Outline(page)
    addresses = [attributes["src"] for _, attributes in outline.elements if "src" in attributes]
    assert [address for address in addresses if not (address or "").startswith("data:image/")] == []
    links = {attributes.get("href") for attributes in outline.all("a")}
    ids = {f"#{attributes['id']}" for _, attributes in outline.elements if "id" in attributes}
    assert links == {"#sizes", "#wild", "#missing", "#calculator"}
    assert links <= ids
    assert outline.all("link") == []
    rules = [each["content"] for each in outline.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert rules == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_it_is_made_for_phones(page: str) -> None:
    viewport = [each["content"] for each in Outline(page).all("meta") if each.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]


def test_long_tables_are_folded(page: str) -> None:
    outline = Outline(page)
    assert len(outline.all("details")) == 1  # the wild one, of 30 rows
    assert f"{HOSTILE} (30 rows)" in outline.texts


def test_the_page_is_the_same_for_the_same_results(folder: Path) -> None:
    first, second = (make_page(*read_chapters(folder)) for _ in range(2))
    assert first == second


def test_pictures_are_drawings_or_where_these_are_large_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(6, 2))
    figure.subplots().plot([1, 2])
    drawing = images.embed(figure)
    monkeypatch.setattr(images, "LARGEST_SVG", 100)
    pixels = images.embed(figure)
    assert (drawing.width, drawing.height) == (pixels.width, pixels.height) == (576, 192)
    kinds = [each.address.partition(",")[0] for each in (drawing, pixels)]
    assert kinds == ["data:image/svg+xml;base64", "data:image/png;base64"]
    root = ElementTree.fromstring(b64decode(drawing.address.partition(",")[2]))
    assert root.get("viewBox") == "0 0 432 144"  # points
    assert b64decode(pixels.address.partition(",")[2]).startswith(b"\x89PNG")


def test_a_page_without_pictures_says_why(folder: Path) -> None:
    told, missing = read_chapters(folder)
    bare = replace(told[0], pictures=[], no_pictures="needs <it>")
    assert "needs <it>" in Outline(make_page([bare], missing)).texts


# ---- the calculator's numbers, as far as Python can tell


def test_the_page_carries_what_the_library_computes(page: str) -> None:
    golden = json.loads(read_script(page, "golden"))
    assert len(golden["plans"]) > 5
    for each in golden["plans"]:
        asked, found = each["asked"], {name: int(text) for name, text in each["found"].items()}
        layers, context = asked["layers"], asked["context"]
        near = {name: asked[name] for name in ("window", "sinks", "heavy")}
        sizes = {"value_dim": asked["value_dim"], **near}
        d, degree, heads = asked["head_dim"], asked["degree"], asked["heads"]
        kv_heads = asked["kv_heads"] or heads
        assert found["state_elements"] == layers * ta.state_size(d, degree, kv_heads=kv_heads, **sizes)
        flops = ta.flops_per_token(d, degree, heads=heads, kv_heads=kv_heads, **sizes)
        assert found["flops_per_token"] == layers * flops
        types = {"dtype": asked["dtype"], "cache_dtype": asked["cache_dtype"]}
        even = ta.break_even_context(d, degree, kv_heads=kv_heads, heads=heads, **types, **sizes)
        assert found["break_even_memory"] == even
        assert (found["cache_bytes"] >= found["state_bytes"]) == (context >= even)
    assert {"float16", "float32", "float64"} <= {value for each in golden["plans"] for value in each["asked"].values()}


def test_the_page_carries_the_errors_that_the_library_expects(page: str) -> None:
    errors = json.loads(read_script(page, "golden"))["errors"]
    found = [(each["taylor"], each["fitted"]) for each in errors]
    scores = [(each["std"], each["degree"], each["mean"]) for each in errors]
    assert len(scores) > 20
    assert found == [
        (
            ta.expected_error(std, degree, mean=mean),
            ta.expected_error(std, degree, mean=mean, fitted=True),
        )
        for std, degree, mean in scores
    ]


def test_the_page_checks_itself_and_can_show_a_warning(page: str) -> None:
    assert "findDifferences(golden)" in page
    assert 'classList.toggle("warning", differences.length > 0)' in page
    assert ".warning {" in page


# ---- the command


NOISE = "\ud800\n".encode("utf-8", "surrogatepass")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_the_page_and_names_what_is_missing(folder: Path) -> None:
    result = run("--results", folder)
    assert result.exit_code == 0, result.stderr
    page = folder / "report.html"
    assert page.read_text(encoding="utf-8") == make_page(*read_chapters(folder))
    assert result.stdout == f"{page}: 2 of 3 experiments, {size(page.stat().st_size)}\n"
    assert result.stderr == f"not measured: taylor-attention reproduce --only absent --out {folder}\n"


def test_the_command_tells_machines(folder: Path) -> None:
    target, count = folder / "new" / "page.html", len(sizes.plan(False))
    result = run("--results", folder, "--out", target, "--json")
    assert json.loads(result.stdout) == {
        "page": str(target),
        "bytes": target.stat().st_size,
        "experiments": {"sizes": {"cases": count, "planned": count}, "wild": {"cases": 30, "planned": 40}},
        "missing": ["absent"],
    }
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("prepare", "text", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], b"", "--results: expected a folder with results"),
        (lambda folder: (folder / "wild.json").write_text("{}"), b"", "wild.json: not a file of results"),
        (lambda folder: (folder / "report.html").mkdir(), b"", "report.html: cannot be written"),
        (lambda folder: None, NOISE, "document.md: cannot be read"),
    ],
    ids=["an empty folder", "something else in a file", "a page that cannot be written", "a document that is no text"],
)
def test_bad_input_is_one_line(folder: Path, prepare: Callable[[Path], object], text: bytes, message: str) -> None:
    prepare(folder)
    document = folder / "document.md"
    document.write_bytes(text)
    result = run("--results", folder, "--markdown", document)
    assert result.exit_code == 2
    assert document.read_bytes() == text
    assert message in result.stderr
    assert result.stderr.count("\n") == 1

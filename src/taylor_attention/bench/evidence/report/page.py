"""One page of HTML with everything in it: pictures, tables, sentences, where they are from, and a calculator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from .... import __version__
from ..experiment import Picture, Table, Topic
from .chapters import LONG_TABLE, Chapter, describe_cases, describe_origin, how_to_measure
from .golden import compute_golden
from .images import embed

_DEGREES = range(13)
_READABLE = 0.75
"""Of a picture's natural size: on a narrow screen it is made no smaller, and scrolls."""

# The page may load nothing: what it shows is in it.
_RULES = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def make_page(chapters: Sequence[Chapter], missing: Sequence[Topic]) -> str:
    """The whole page, of what was measured and of what was not."""
    sections = [*map(_write_chapter, chapters), *([_write_missing(missing)] if missing else [])]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_RULES}">
<title>taylor-attention: the evidence</title>
<style>
{_read("page.css")}</style>
</head>
<body>
<header>
<h1>taylor-attention: the evidence</h1>
<p>Softmax attention at constant cost and memory per token, by a polynomial of the scores: what was measured, on which
machine and by which command. All tables, pictures and sentences are made of the files of results; the sentences
say what the numbers are, also where they speak against the method. Page made by version {escape(__version__)}.</p>
</header>
{_write_contents(chapters, missing)}
<main>
{"".join(sections)}{_write_calculator()}</main>
<script type="application/json" id="golden">{json.dumps(compute_golden(), allow_nan=False)}</script>
<script id="arithmetic">
{_read("calculator.js")}</script>
<script>
{_read("form.js")}</script>
</body>
</html>
"""


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _write_contents(chapters: Sequence[Chapter], missing: Sequence[Topic]) -> str:
    links = [(each.topic.name, each.topic.title, _write_badge(each)) for each in chapters]
    links += [("missing", "Not measured", f" <span class='badge'>{len(missing)}</span>")] if missing else []
    links += [("calculator", "Calculator", "")]
    items = "".join(f'<li><a href="#{escape(to)}">{escape(text)}</a>{badge}</li>\n' for to, text, badge in links)
    return f'<nav aria-label="Contents"><ol>\n{items}</ol></nav>'


def _write_badge(chapter: Chapter) -> str:
    return f' <span class="badge">{escape(describe_cases(chapter))}</span>' if chapter.is_partial else ""


def _write_chapter(chapter: Chapter) -> str:
    topic = chapter.topic
    conclusions = "".join(f"<li>{escape(line)}</li>\n" for line in chapter.conclusions)
    shown = [f'<p class="warning">{escape(chapter.no_pictures)}</p>\n'] if chapter.no_pictures else []
    shown += [*map(_write_picture, chapter.pictures), *map(_write_table, chapter.tables)]
    return f"""<section id="{escape(topic.name)}">
<h2>{escape(topic.title)}{_write_badge(chapter)}</h2>
<p class="question">{escape(topic.question)}</p>
<ul class="conclusions">
{conclusions}</ul>
{"".join(shown)}<h3>Where this is from</h3>
{_write_origin(chapter)}</section>
"""


def _write_picture(picture: Picture) -> str:
    image, caption = embed(picture.figure), escape(picture.caption)
    limits = f"width: 100%; min-width: {_READABLE * image.width:.0f}px; max-width: {image.width}px"
    tag = f'<img src="{image.address}" alt="{caption}" width="{image.width}" height="{image.height}" style="{limits}">'
    return f"<figure>{_scroll(tag, picture.caption)}<figcaption>{caption}</figcaption></figure>\n"


def _write_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    body = _scroll(f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>", table.title)
    body += f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    if len(table.rows) < LONG_TABLE:
        return f"<h3>{escape(table.title)}</h3>\n{body}\n"
    return f"<details><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>\n{body}</details>\n"


def _scroll(content: str, label: str) -> str:
    """A box that scrolls sideways, by keys too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>\n'


def _write_origin(chapter: Chapter) -> str:
    (_, command), *facts = describe_origin(chapter)
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts)
    return f"<pre>{escape(command)}</pre>\n<dl>\n{lines}</dl>\n"


def _write_missing(missing: Sequence[Topic]) -> str:
    items = "".join(
        f"<h3>{escape(each.title)}</h3>\n<p class='question'>{escape(each.question)}</p>\n"
        f"<pre>{escape(how_to_measure(each))}</pre>\n"
        for each in missing
    )
    return f'<section id="missing">\n<h2>Not measured</h2>\n<p>These have no results here.</p>\n{items}</section>\n'


def _write_calculator() -> str:
    options = "".join(f"<option{' selected' * (degree == 2)}>{degree}</option>" for degree in _DEGREES)
    return _read("calculator.html").replace("@degrees@", options)

"""Results in a Markdown document: a block for each topic, renewed where it stands; the rest is left alone.

A block is made by the same functions as the page's section, so that no number is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..experiment import Picture, Table
from .chapters import LONG_TABLE, Chapter, describe_origin

FIGURES = "figures"
"""The folder beside the document that has the pictures."""

_BLOCKS = re.compile(r"^<!-- results of ([\w-]+), .*?^<!-- end of \1 -->\n", re.DOTALL | re.MULTILINE)


def renew(text: str, chapters: Sequence[Chapter]) -> str:
    """The document with the blocks of these topics as their results are now; new ones come after the last."""
    for chapter in chapters:
        block = write_block(chapter)
        there = {found[1]: found for found in _BLOCKS.finditer(text)}
        if old := there.get(chapter.topic.name):
            text = text[: old.start()] + block + text[old.end() :]
        else:
            place = max((found.end() for found in there.values()), default=len(text))
            text = text[:place] + "\n" + block + text[place:]
    return text


def remove_blocks(text: str) -> str:
    """What people wrote."""
    return _BLOCKS.sub("", text)


def write_block(chapter: Chapter) -> str:
    """All that is known of a topic, between the lines that mark it."""
    topic = chapter.topic
    parts = [
        f"<!-- results of {topic.name}, made by `taylor-attention report`: edit what is around them -->",
        f"## {_escape(topic.title)}",
        f"*{_escape(topic.question)}*",
        "\n".join(f"- {_escape(line)}" for line in chapter.conclusions),
        *map(_write_picture, chapter.pictures),
        *map(_write_table, chapter.tables),
        _write_origin(chapter),
        f"<!-- end of {topic.name} -->",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_picture(picture: Picture) -> str:
    return f"![{_escape(picture.caption)}]({FIGURES}/{picture.name}.png)\n\n{_escape(picture.caption)}"


def _write_table(table: Table) -> str:
    lines = [_row(table.columns), "|---|" + "---:|" * (len(table.columns) - 1), *map(_row, table.rows)]
    body = "\n".join(lines) + (f"\n\n{_escape(table.note)}" if table.note else "")
    if len(table.rows) < LONG_TABLE:
        return f"**{_escape(table.title)}**\n\n{body}"
    summary = f"<summary>{_escape(table.title)} ({len(table.rows)} rows)</summary>"
    return f"<details>{summary}\n\n{body}\n\n</details>"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _write_origin(chapter: Chapter) -> str:
    (_, command), *facts = describe_origin(chapter)
    return f"`{command}`: " + "; ".join(f"{name.lower()} {_escape(text)}" for name, text in facts) + "."


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<|$~])", r"\\\1", " ".join(text.split()))

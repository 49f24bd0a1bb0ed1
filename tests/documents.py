"""Reads the project's Markdown as its readers do: fenced blocks, and the commands that blocks and prose show."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^ *(```+|~~~+) *(\S*)")
_INLINE = re.compile(r"(?<!`)`((?:make|taylor-attention) [^`\n]+)`(?!`)")


class Block(NamedTuple):
    """One fenced block: its language, its text without common indentation, and the file's line on which it starts."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """One command shown to the reader, split into words as a shell does; prose may name one without its arguments."""

    words: list[str]
    line: int
    in_prose: bool = False


def read_blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a file; one that is never closed raises ValueError."""
    blocks, fence, language, start, body = [], "", "", 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, start, body = match[1], match[2], number + 1, []
        elif fence and line.strip() == fence:
            blocks.append(Block(language, textwrap.dedent("\n".join(body)), start))
            fence = ""
        elif fence:
            body.append(line)
    if fence:
        raise ValueError(f"{path.name}: expected the block opened on line {start - 1} to be closed, got the file's end")
    return blocks


def read_commands(path: Path) -> list[Command]:
    """Return the commands of a file's `sh` and `console` blocks, and those of ours that its prose names."""
    found = []
    for block in read_blocks(path):
        if block.language in {"sh", "console"}:
            found += _commands_of(block)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found += [Command(shlex.split(text), number, in_prose=True) for text in _INLINE.findall(line)]
    return found


def _commands_of(block: Block) -> Iterator[Command]:
    for number, line in _joined_lines(block):
        if block.language == "console":  # the lines without a prompt are output
            if not line.startswith("$ "):
                continue
            line = line[2:]
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|()"):
                yield from [Command(words, number)] if words else []
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):  # settings before the command
                words.append(word)


def _joined_lines(block: Block) -> Iterator[tuple[int, str]]:
    pending, start = "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        start = start if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        yield start, pending
        pending = ""

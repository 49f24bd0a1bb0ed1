"""Commands given what they do not take: exit code 2, one line that names the option, nothing written.

What is bad for an option follows from its type, as click knows it, so that a new option is tried without a line here.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from taylor_attention.cli.app import app
from taylor_attention.lm.checkpoint import save_checkpoint
from taylor_attention.nn import LanguageModel, ModelConfig

HUGE, LONG = str(10**30), "x" * 5000
NO_NUMBER = ("", "two", "0x10", "1e", "\udc80", "½")
NO_FOLDER = ("", "{folder}/text.txt", "/dev/null/none", LONG, "/proc/none")
NO_NAME = ("", "nothing", LONG, "\udc80", "a\nb", "{folder}/none", "/dev/null/none")

# A call of each command that would be short: what is bad is added to it. {folder} is the fixture's, {out} is not there.
CALLS = {
    "plan": "--heads 8 --head-dim 8 --degree 2 --window 4 --context 100",
    "bench": "--quick --only decode --width 16 --head-dim 8 --context 64 --repeats 1 --budget 0.001 --out {out}",
    "needles": "--margin 1 --ties 1 --age 20 --at 1 1 20 --length 200 --heads 1 --seeds 1 --window 16 --out {out}",
    "soak": "--tokens 64 --block 32 --out {out}",
    "report": "--results {folder}/results --out {out}.html",
    "reproduce": "--only sizes --quick --out {out}",
    "train": "{folder}/text.txt --layers 1 --width 8 --heads 2 --steps 1 --batch 1 --length 8 --window 2 --out {out}",
    "generate": "hi --model {folder}/taylor -n 1",
    "eval": "{folder}/text.txt --model {folder}/taylor --windows 1 --length 8",
    "convert": "{folder}/taylor {out}",
    "demo": "--text {folder}/text.txt --taylor {folder}/taylor --softmax {folder}/softmax --tokens 256 --steps 1 "
    "--continuation 1 --out {out}",
    "profile": "{folder} --text {folder}/text.txt --tokens 64",  # no model: what is bad is refused before one is loaded
    "distill": "{folder} --text {folder}/text.txt --out {folder}/far",  # as here
}
SHOWN_AS = {"text": "data"}  # an option or argument that the library names otherwise


def bad_numbers(least: float | None, most: float | None, step: float) -> list[str]:
    """Out of a range, if there is one."""
    found = [HUGE] if most is not None or step == 1 else []
    found += [] if least is None else [str(least - step), f"-{HUGE}"]
    return found + ([] if most is None else [str(most + step)])


def bad_values(kind: click.ParamType) -> list[str]:
    """What an option of a type does not take."""
    if isinstance(kind, click.Tuple):
        return [
            " ".join(["1"] * (len(kind.types) - 1) + [bad])
            for bad in bad_values(kind.types[-1])
            if bad and " " not in bad
        ]
    if isinstance(kind, click.IntRange):
        return [*NO_NUMBER, "1.5", "nan", *bad_numbers(kind.min, kind.max, 1)]
    if isinstance(kind, click.FloatRange):
        least = kind.min if kind.min_open else None if kind.min is None else kind.min - 1
        return [*NO_NUMBER, "nan", "inf", "-inf", *([] if least is None else [str(least)])]
    if isinstance(kind, type(click.INT)):
        return [*NO_NUMBER, "1.5", "nan", HUGE, f"-{HUGE}", "-1"]
    if isinstance(kind, type(click.FLOAT)):
        return [*NO_NUMBER, "nan", "inf", "-1"]
    if isinstance(kind, click.Choice):
        return ["", "nothing", LONG, "\udc80"]
    if isinstance(kind, click.Path) and not kind.file_okay:
        return [*NO_FOLDER]
    if isinstance(kind, click.Path):
        return ["", "{folder}", "/dev/null/none", LONG]
    return [*NO_NUMBER, "1.5", "nan", "-1", HUGE] if kind.name in ("count", "integer or none") else [*NO_NAME]


OPTIONS = {
    (name, option.opts[0]): option
    for name, command in app.commands.items()
    for option in command.params
    if isinstance(option, click.Option) and not option.is_flag
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny twins with random weights, a text, and bytes that are none."""
    folder = tmp_path_factory.mktemp("misuse")
    for attention in ("taylor", "softmax"):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=2, attention=attention))
        save_checkpoint(folder / attention, model)
    (folder / "text.txt").write_text("A sentence of a text, naïve as it is.\n" * 100, encoding="utf-8")
    (folder / "noise").write_bytes(bytes(range(256)))
    made = run(folder, "reproduce", "--only", "sizes", "--quick", "--processes", "1", "--out", str(folder / "results"))
    assert made.exit_code == 0, made.stderr
    return folder


def run(folder: Path, *arguments: str, stdin: bytes = b"") -> Result:
    places = {"{folder}": str(folder), "{out}": str(folder / "out")}
    filled = [re.sub(r"\{\w+\}", lambda found: places[found[0]], argument) for argument in arguments]
    return CliRunner().invoke(app, filled, input=stdin)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"a folder" for path in folder.iterdir()}


def fault(result: Result, names: set[str]) -> str:
    """What is wrong with how a command refused, if anything is."""
    said = result.stderr
    if not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    form = rf"error: [^\n]*({'|'.join(map(re.escape, names))})[^\n]*\n"
    good = result.exit_code == 2 and result.stdout == "" and re.fullmatch(form, said)
    return "" if good else f"{result.exit_code}: {said}"


@pytest.mark.parametrize(("command", "flag"), OPTIONS, ids=[f"{command} {flag}" for command, flag in OPTIONS])
def test_bad_options_are_named_in_one_line_and_nothing_is_written(command: str, flag: str, folder: Path):
    option, before = OPTIONS[command, flag], content(folder)
    names = {flag, f"{option.name}:", f"{SHOWN_AS.get(option.name or '', option.name)}:"}
    found = {}
    for bad in bad_values(option.type):
        given = bad.split(" ") if isinstance(option.type, click.Tuple) else [bad]
        places = {bad.replace("{folder}", str(folder))} - {""}  # a file that cannot be made is named itself
        found[bad[:50]] = fault(run(folder, command, *CALLS[command].split(), flag, *given), names | places)
    assert {bad: said for bad, said in found.items() if said} == {}
    assert content(folder) == before


def test_every_command_has_a_call():
    assert app.commands.keys() == CALLS.keys()


@pytest.mark.parametrize("command", ["plan", "generate", "eval", "train"])
def test_the_calls_are_good(command: str, folder: Path, tmp_path: Path):
    result = run(folder, command, *CALLS[command].replace("{out}", str(tmp_path / "out")).split())
    assert result.exit_code == 0, result.stderr


def test_what_is_bad_for_a_type_is_known():
    """A type that falls through would be tried as a name."""
    names = {option.type.name for option in OPTIONS.values()}
    known = {"integer", "integer range", "float", "float range", "choice", "text", "path", "file", "directory"}
    assert names <= known | {"tuple", "count", "integer or none"} or any(name.startswith("<") for name in names)


# ---- texts and files that are none -----------------------------------------------------------------------------------

TEXTS = ["", "{folder}/none", "/dev/null", "/dev/null/none", "/proc/self/mem", LONG, "\udc80", "{folder}/empty folder"]


@pytest.mark.parametrize("text", TEXTS, ids=[text[:20] for text in TEXTS])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_texts_that_cannot_be_read(command: str, text: str, folder: Path):
    (folder / "empty folder").mkdir(exist_ok=True)
    before = content(folder)
    call = [text if part == "{folder}/text.txt" else part for part in CALLS[command].split()]
    assert fault(run(folder, command, *call), {"data:", "/proc/self/mem:"}) == ""
    assert content(folder) == before


PLACES = ["/proc/self/mem", "/dev/null", "{folder}", "{folder}/noise"]
FILES = [(option, place) for option in ("--model", "--session") for place in PLACES]
FILES += [("--file", place) for place in PLACES[:3]]  # noise is a prompt


@pytest.mark.parametrize(("option", "place"), FILES)
def test_files_of_another_kind(option: str, place: str, folder: Path):
    before = content(folder)
    call = [part for part in CALLS["generate"].split() if part != "hi"]
    prompt = [] if option == "--file" else ["hi"]
    assert fault(run(folder, "generate", *prompt, *call, option, place), {option, str(folder), place}) == ""
    assert content(folder) == before


@pytest.mark.parametrize("content", [b"\0", b"\xff\xfe\0", bytes(range(256)), "naïve".encode("latin-1")])
@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_prompt_is_any_bytes(way: str, content: bytes, folder: Path, tmp_path: Path):
    (tmp_path / "prompt").write_bytes(content)
    prompt = ["--file", str(tmp_path / "prompt")] if way == "file" else ["--file", "-"]
    call = [part for part in CALLS["generate"].split() if part != "hi"]
    result = run(folder, "generate", *call, *prompt, "--json", stdin=content)
    assert result.exit_code == 0, result.stderr
    assert f'"prompt_bytes": {len(content)},' in result.stdout


class BrokenOff(io.BytesIO):
    """A file on a disk that fails."""

    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_prompt_that_breaks_off_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("taylor_attention.cli.generate._opened", lambda file: BrokenOff(b"text"))
    call = ["--model", str(folder / "taylor"), "--session", str(tmp_path / "session")]
    result = run(folder, "generate", *call, "--file", str(folder / "text.txt"))
    assert fault(result, {"PROMPT: cannot be read (Input/output error)"}) == ""
    assert content(tmp_path) == {}


def test_an_argument_of_any_bytes_is_a_prompt(folder: Path):
    result = run(folder, "generate", os.fsdecode(b"\xff\xfe"), *CALLS["generate"].split()[1:], "--json")
    assert result.exit_code == 0, result.stderr
    assert '"prompt_bytes": 2,' in result.stdout


# ---- too much --------------------------------------------------------------------------------------------------------

TOO_MUCH = {
    "a layer wider than memory": ["train", "--width", str(2**20), "--heads", "2", "--head-dim", "524288"],
    "a state of petabytes": ["soak", "--heads", str(2**40), "--head-dim", "8"],
    "a stream of petabytes": ["needles", "--length", str(2**40)],
    "windows of petabytes": ["train", "--batch", str(2**40), "--length", str(2**20)],
    "a degree that heads cannot have": ["bench", "--degree", "62"],
}


@pytest.mark.parametrize("arguments", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_what_is_larger_than_any_memory_is_refused_in_one_line(arguments: list[str], folder: Path, tmp_path: Path):
    command, *more = arguments
    result = run(folder, command, *CALLS[command].replace("{out}", str(tmp_path / "out")).split(), *more)
    assert fault(result, {"expected", "memory"}) == ""


def test_numbers_are_exact_where_they_are_large(folder: Path):
    """The largest numbers that are taken: no float on the way, no traceback."""
    largest = str(2**63 - 1)
    call = ["--heads", "1", "--head-dim", "1", "--degree", "1", "--context", largest]
    assert run(folder, "plan", *call, "--json").exit_code == 0
    assert math.isfinite(float(largest))

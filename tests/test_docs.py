"""What the documents say is so: their code runs, their commands exist, and they name no one's machine."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import taylor_attention
from documents import Command, read_blocks, read_commands
from taylor_attention.cli.app import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "console", "text", "toml", "json", "bibtex", "math", "mermaid"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_readme_shows_code_and_commands():
    assert [block for block in read_blocks(README) if block.language == "python"]
    programs = {command.words[0] for command in read_commands(README)}
    assert {"make", "taylor-attention"} <= programs


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_block_names_its_language(path):
    # A block in a language that no test knows would never be checked.
    assert [(block.line, block.language) for block in read_blocks(path) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path.name in ("transformers.md", "pretrained.md"):
        pytest.importorskip("transformers")  # not there for the oldest Python
    namespace = {"__name__": "document"}
    if any("transformers import" in block.text for block in read_blocks(path)):
        pytest.importorskip("transformers")
    for block in read_blocks(path):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # a traceback then shows the document's own line
            exec(compile(source, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist(path):
    complaints = [(command.line, complain(command)) for command in read_commands(path)]
    assert [(line, complaint) for line, complaint in complaints if complaint] == []


def complain(command: Command) -> str | None:
    """Say what is wrong with a command of ours, without running it; None if nothing is, or if it is not ours."""
    program, *arguments = command.words
    if program == "make":
        targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in arguments if not re.match(r"-|\w+=", word) and word not in targets]
        return f"make: no target {unknown}" if unknown else None
    if Path(program).name == "taylor-attention":
        complaint, incomplete = complain_of_cli(arguments)
        return complaint or (None if command.in_prose else incomplete)
    return None


def complain_of_cli(arguments: list[str]) -> tuple[str | None, str | None]:
    """Parse the arguments with the real commands; return what does not exist, and what is missing for it to run."""
    command: click.Command = app
    context = click.Context(command, info_name="taylor-attention")
    try:
        while isinstance(command, click.Group):
            _, rest, _ = command.make_parser(context).parse_args(list(arguments))
            if not rest:
                return None, None
            name, command, arguments = command.resolve_command(context, rest)
            context = click.Context(command, info_name=name, parent=context)
        given, extra, _ = command.make_parser(context).parse_args(list(arguments))
    except click.UsageError as error:
        return error.format_message(), None
    if set(arguments) & set(command.get_help_option_names(context)):
        return None, None
    missing = [parameter.name for parameter in command.params if parameter.required and not given.get(parameter.name)]
    return f"{name} takes no {extra}" if extra else None, f"{name} needs {missing}" if missing else None


FALSE_CLAIMS = {
    "an unknown target": "```sh\nmake tset\n```",
    "an unknown target in prose": "Then `make tset`.",
    "an unknown command": "```console\n$ taylor-attention paln\n```",
    "an unknown option": "```sh\ntaylor-attention plan --no-such-option 3\n```",
    "a required option left out": "```sh\ntaylor-attention train some.txt\n```",
    "an argument too many": "```sh\ntaylor-attention plan something\n```",
    "an unknown option on the second line": "```sh\ntaylor-attention plan \\\n  --no-such-option 3\n```",
    "an unknown command after another": "```sh\nmake setup && A=1 .venv/bin/taylor-attention paln | tee x\n```",
}


@pytest.mark.parametrize("text", FALSE_CLAIMS.values(), ids=FALSE_CLAIMS.keys())
def test_a_false_claim_is_found(tmp_path, text):
    document = tmp_path / "document.md"
    document.write_text(text)
    assert [complaint for complaint in map(complain, read_commands(document)) if complaint]


TRUE_CLAIMS = """
```sh
# make tea
make setup PYTHON=python3
taylor-attention --help
git status
```
or `taylor-attention plan`
"""


def test_what_is_true_or_not_ours_passes(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(TRUE_CLAIMS)
    programs = [command.words[0] for command in read_commands(document)]
    assert programs == ["make", "taylor-attention", "git", "taylor-attention"]
    assert [complaint for complaint in map(complain, read_commands(document)) if complaint] == []


# A path that exists on one machine only, and the hosts that packages come from: both belong in a user's settings.
MACHINE = re.compile(r"(?<![\w.~/-])/(?:work|root|home|tmp|Users)/\w")
REGISTRY = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|anaconda\.org)\b")


def find_places(text: str) -> list[str]:
    return [found[0] for pattern in (MACHINE, REGISTRY) for found in pattern.finditer(text)]


def test_no_file_names_a_machine_or_a_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so which files are the project's own is not known")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    assert README in paths
    texts = {name_of(path): path.read_bytes() for path in paths if path.is_file()}
    found = {name: find_places(text.decode()) for name, text in texts.items() if b"\0" not in text}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "place", ["/".join(["", "home", "me"]), "x = '" + "/".join(["", "tmp", "x'"]), "pypi" + ".org"]
)
def test_a_planted_place_is_found(place):
    assert find_places(f"see {place} there")


def test_web_addresses_are_not_machine_paths():
    assert find_places("https://example.com/home/index.html, ~/work/x, a/tmp/b") == []


def test_the_version_is_stated_once():
    assert version("taylor-attention") == taylor_attention.__version__
    assert f"## [{taylor_attention.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tests_that_keep_promises_exist() -> None:
    """Every test that docs/reliability.md names."""
    named = set(re.findall(r"::(test_\w+)", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert len(named) > 50
    assert named - there == set()

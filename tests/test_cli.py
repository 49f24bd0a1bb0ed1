"""The command line: results on stdout, one clear line and exit code 2 on bad input, Ctrl-C that loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from taylor_attention.cli.app import app
from taylor_attention.cli.console import size
from taylor_attention.core.cost import plan
from taylor_attention.core.state import State
from taylor_attention.core.storage import read_tensors
from taylor_attention.lm.checkpoint import load_checkpoint, save_checkpoint
from taylor_attention.lm.session import Session
from taylor_attention.nn import LanguageModel, ModelConfig

COMMANDS = ["plan", "bench", "needles", "soak", "train", "generate", "eval", "convert", "demo", "reproduce", "report"]
PLAN = ["plan", "--heads", "32", "--kv-heads", "8", "--head-dim", "64", "--degree", "2", "--layers", "24"]
PLAN += ["--context", "1000000"]
SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--steps", "6", "--batch", "2", "--length", "16"]
SMALL += ["--eval-every", "3", "--save-every", "2", "--threads", "1"]


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def ok(*arguments: object, stdin: bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny twins with random weights, a text, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("cli")
    for attention in ("taylor", "softmax"):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(d_model=16, num_layers=1, num_heads=2, attention=attention))
        save_checkpoint(folder / attention, model)
    sentences = [f"Sentence {number} of a text, naïve as it is.\n" for number in range(400)]
    (folder / "text.txt").write_text("".join(sentences), encoding="utf-8")
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(params=["taylor", "softmax"])
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / request.param


# ---- help and errors


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_everywhere(command: list[str]):
    shown = ok(*command, "--help").stdout
    assert shown.startswith("Usage:")
    assert "--help" in shown


def test_without_a_command_the_commands_are_listed():
    shown = ok().stdout
    assert all(f"\n  {name} " in shown for name in COMMANDS)


# {folder} is the fixture's folder; each case: what the one line must contain, and the arguments.
MISUSE = {
    "no such command": ("'bake'", "bake"),
    "no such option": ("--hedas", *PLAN, "--hedas", "3"),
    "missing option": ("--heads", "plan", "--head-dim", "64", "--degree", "2", "--context", "10"),
    "not a number": ("--degree", *PLAN, "--degree", "two"),
    "plan: degree": ("degree: expected an int >= 0, got -1", *PLAN, "--degree", "-1"),
    "plan: kv heads": ("kv_heads: expected a divisor", *PLAN, "--kv-heads", "5"),
    "plan: dtype": ("dtype: expected", *PLAN, "--dtype", "float99"),
    "plan: radius": ("radius: expected", *PLAN, "--score-radius", "-1"),
    "bench: head size": ("--head-dim: expected a divisor of the width 512, got 7", "bench", "--head-dim", "7"),
    "bench: degree": ("--degree", "bench", "--degree", "-1"),
    "bench: window": ("--window", "bench", "--window", "-1"),
    "bench: kind": ("--only", "bench", "--only", "bake"),
    "bench: backend": ("backend: expected one of", "bench", "--backend", "none"),
    "bench: rival without a function": ("--against: expected module:function", "bench", "--against", "{folder}/none"),
    "bench: no such rival": ("--against: expected a file that", "bench", "--against", "{folder}/none.py:rival"),
    "bench: a rival twice": ("different names", "bench", "--against", "json:dumps", "--against", "json:dumps"),
    "bench: out": ("--out", "bench", "--out", "{folder}/noise"),
    "needles: age": ("--age: expected a needle within the 102,400 tokens", "needles", "--age", "102400"),
    "needles: method": ("--method: expected one of taylor 2,", "needles", "--method", "magic"),
    "needles: backend": ("backend: expected one of", "needles", "--backend", "none"),
    "needles: out": ("--out", "needles", "--out", "{folder}/noise"),
    "soak: tokens": (
        "expected a whole number from 1 to 2^40, such as 1e8, got 0.5",
        "soak",
        "--tokens",
        "0.5",
    ),
    "soak: out": ("--out", "soak", "--out", "{folder}/noise"),
    "train: no text": ("TEXT: expected", "train", "--out", "{folder}/run"),
    "train: no such text": ("{folder}/none", "train", "{folder}/none", "--out", "{folder}/run"),
    "train: degree": ("degree: expected", "train", "{folder}/text.txt", "--out", "{folder}/run", "--degree", "-2"),
    "train: steps": ("steps: expected", "train", "{folder}/text.txt", "--out", "{folder}/run", "--steps", "0"),
    "train: attention": ("--attention", "train", "{folder}/text.txt", "--out", "{folder}/run", "--attention", "none"),
    "train: reading": ("--reading", "train", "{folder}/text.txt", "--out", "{folder}/run", "--reading", "exact"),
    "train: gain": ("far_gain: expected", "train", "{folder}/text.txt", "--out", "{folder}/run", "--far-gain"),
    "train: rope": ("rope: expected", "train", "{folder}/text.txt", "--out", "{folder}/run", "--rope", "near"),
    "train: far keys": ("far_dim: expected", "train", "{folder}/text.txt", "--out", "{folder}/run", "--far-dim", "2"),
    "train: far layers": (
        "far_layers: exp",
        "train",
        "{folder}/text.txt",
        "--out",
        "{folder}/run",
        "--far-layers",
        "1",
    ),
    "train: nothing to resume": ("{folder}/run", "train", "--resume", "--out", "{folder}/run"),
    "generate: no prompt": ("PROMPT: expected", "generate", "--model", "{folder}/taylor"),
    "generate: empty prompt": ("PROMPT: expected at least one byte", "generate", "", "--model", "{folder}/taylor"),
    "generate: empty stdin": ("PROMPT: expected at least one byte", "generate", "-", "--model", "{folder}/taylor"),
    "generate: empty file": ("--file: expected", "generate", "--file", "{folder}/empty", "--model", "{folder}/taylor"),
    "generate: no such file": ("--file", "generate", "--file", "{folder}/none", "--model", "{folder}/taylor"),
    "generate: two prompts": ("--file", "generate", "hi", "--file", "{folder}/text.txt", "--model", "{folder}/taylor"),
    "generate: no such model": ("--model: expected a checkpoint", "generate", "hi", "--model", "{folder}/none"),
    "generate: a name of two lines": ("--model: expected", "generate", "hi", "--model", "{folder}/two\nlines"),
    "generate: no checkpoint": ("{folder}/noise: ", "generate", "hi", "--model", "{folder}/noise"),
    "generate: tokens": ("--tokens", "generate", "hi", "--model", "{folder}/taylor", "-n", "-1"),
    "generate: temperature": (
        "temperature: exp",
        "generate",
        "hi",
        "--model",
        "{folder}/taylor",
        "--temperature",
        "-1",
    ),
    "generate: top-k": ("top_k: expected", "generate", "hi", "--model", "{folder}/taylor", "--top-k", "0"),
    "generate: top-p": ("top_p: expected", "generate", "hi", "--model", "{folder}/taylor", "--top-p", "1.5"),
    "generate: endless JSON": ("--json: expected", "generate", "hi", "--model", "{folder}/taylor", "-n", "0", "--json"),
    "generate: no session": ("{folder}/noise", "generate", "--model", "{folder}/taylor", "--session", "{folder}/noise"),
    "generate: session's folder": (
        "{folder}/none/s: cannot be locked",
        *("generate", "hi", "--model", "{folder}/taylor", "--session", "{folder}/none/s"),
    ),
    "eval: no such model": ("--model: expected", "eval", "{folder}/text.txt", "--model", "nothing"),
    "eval: no such text": ("{folder}/none", "eval", "{folder}/none", "--model", "{folder}/taylor"),
    "demo: short text": (
        "--tokens: expected at most",
        *("demo", "--text", "{folder}/noise", "--taylor", "{folder}/taylor", "--softmax", "{folder}/softmax"),
    ),
    "demo: few tokens": ("--tokens", "demo", "--tokens", "3"),
    "demo: twins swapped": ("--taylor: expected", "demo", "--taylor", "{folder}/softmax"),
    "demo: out": (
        "--out",
        *("demo", "--text", "{folder}/text.txt", "--tokens", "1000", "--out", "{folder}/noise"),
        *("--taylor", "{folder}/taylor", "--softmax", "{folder}/softmax"),
    ),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_is_one_clear_line_and_exit_code_2(folder: Path, case: tuple[str, ...]):
    expected, *arguments = (part.replace("{folder}", str(folder)) for part in case)
    result = run(*arguments, stdin=b"")
    assert result.exit_code == 2
    assert result.stdout == ""
    line, rest = result.stderr.split("\n", 1)
    assert line.startswith("error: ")
    assert expected in line
    assert rest == ""


def test_a_session_of_another_model_is_refused_in_one_line(folder: Path, tmp_path: Path):
    ok("generate", "hi", "-n", 3, "--model", folder / "taylor", "--session", tmp_path / "s")
    result = run("generate", "-n", 3, "--model", folder / "softmax", "--session", tmp_path / "s")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "another model" in result.stderr


def test_a_session_keeps_its_seed(folder: Path, tmp_path: Path):
    arguments = "generate", "-n", 3, "--model", folder / "taylor", "--session", tmp_path / "s"
    ok(*arguments, "hi", "--seed", 5)
    ok(*arguments, "--seed", 5)
    result = run(*arguments, "--seed", 6)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--seed: expected 5" in result.stderr


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_one_sentence(missing: str):
    code = f"import sys; sys.modules[{missing!r}] = None; from taylor_attention.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: the command line needs {missing}: pip install 'taylor-attention[cli]'\n"


# ---- plan


def test_plan_prints_what_the_library_computes():
    shown = ok(*PLAN, "--score-radius", "1").stdout
    made = plan(heads=32, kv_heads=8, head_dim=64, degree=2, layers=24, context=10**6, radius=1.0)
    assert size(made.state_bytes) in shown
    assert size(made.cache_bytes) in shown
    assert f"{made.break_even_memory:,}" in shown
    assert f"{made.error_bound:.2g}" in shown


def test_plan_as_json_is_the_librarys_plan():
    made = plan(heads=32, kv_heads=8, head_dim=64, degree=2, layers=24, context=10**6)
    states = [State.zeros(1, 8, 64, 64, 2) for _ in range(24)]
    expected = {"allocated_bytes": sum(state.nbytes for state in states), "negative_intervals": []}
    assert json.loads(ok(*PLAN, "--json").stdout) == {**made.to_dict(), **expected}


def test_plan_counts_near_tokens_and_knows_states_without_a_far_part():
    near = ["--window", "64", "--sinks", "4", "--heavy", "8"]
    shown = json.loads(ok(*PLAN, *near, "--degree", "none", "--json").stdout)
    made = plan(heads=32, kv_heads=8, head_dim=64, degree=None, layers=24, context=10**6, window=64, sinks=4, heavy=8)
    assert {name: shown[name] for name in made.to_dict()} == made.to_dict()
    assert shown["negative_intervals"] == []
    assert "degree 2, window 64, sinks 4, heavy 8; one sequence" in ok(*PLAN, *near).stdout


def test_plan_of_a_dtype_that_states_do_not_have_still_counts():
    found = json.loads(ok(*PLAN, "--dtype", "bfloat16", "--json").stdout)
    assert found["allocated_bytes"] is None
    assert found["state_bytes"] == 2 * found["state_elements"]


def test_plan_says_where_an_odd_degree_fails():
    shown = ok(*PLAN, "--degree", "3").stdout
    assert "-1.596" in shown
    assert "not positive" not in ok(*PLAN, "--degree", "4").stdout


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (1_536_000, "1.54 MB"), (2e21, "2e+06 PB")],
)
def test_sizes_are_short(nbytes: float, shown: str):
    assert size(nbytes) == shown


# ---- generate


def expected_text(checkpoint: Path, prompt: bytes, count: int, **sampling: object) -> str:
    session = Session(load_checkpoint(checkpoint)[0], seed=3)
    session.read(prompt)
    return bytes(session.stream(count, **sampling)).decode("utf-8", "replace")


def test_generate_streams_what_a_session_writes(checkpoint: Path):
    result = ok("generate", "Où", "-n", 50, "--seed", 3, "--model", checkpoint, "--top-k", 100, "--top-p", 0.9)
    assert result.stdout == expected_text(checkpoint, "Où".encode(), 50, temperature=0.8, top_k=100, top_p=0.9)
    assert "wrote 50 bytes" in result.stderr


@pytest.mark.parametrize("source", [["--file", "-"], ["-"], ["--file"]])
def test_prompts_from_stdin_and_file_are_the_same(folder: Path, tmp_path: Path, source: list[str]):
    prompt = (folder / "text.txt").read_bytes()
    arguments = source if source != ["--file"] else ["--file", str(folder / "text.txt")]
    options = "--seed", 3, "--model", folder / "taylor", "--session", tmp_path / "s"
    ok("generate", *arguments, "-n", 9, *options, stdin=prompt)
    model = load_checkpoint(folder / "taylor")[0]
    expected, found = Session(model, seed=3), Session.load(tmp_path / "s", model)
    expected.read(prompt)
    list(expected.stream(9, temperature=0.8))
    assert found.tokens == expected.tokens
    assert found.logits is not None and expected.logits is not None
    assert torch.equal(found.logits, expected.logits)


def test_generate_as_json(folder: Path):
    result = ok("generate", "hello", "-n", 20, "--seed", 3, "--temperature", 0, "--model", folder / "taylor", "--json")
    found = json.loads(result.stdout)
    assert found["text"] == expected_text(folder / "taylor", b"hello", 20, temperature=0)
    assert (found["bytes"], found["prompt_bytes"], found["context"], found["seed"]) == (20, 5, 25, 3)
    assert result.stderr == ""


@pytest.mark.parametrize("parts", [[60], [1, 59], [20, 20, 20]])
def test_a_session_in_parts_prints_what_one_go_prints(checkpoint: Path, tmp_path: Path, parts: list[int]):
    """Characters of several bytes that a stop cuts in two come whole with the next part."""
    arguments = "generate", "--model", checkpoint, "--session", tmp_path / "s"
    whole = ok("generate", "abc", "-n", 60, "--seed", 1, "--model", checkpoint, "--session", tmp_path / "w").stdout
    got = ok(*arguments, "abc", "--seed", 1, "-n", parts[0]).stdout
    got += "".join(ok(*arguments, "-n", part).stdout for part in parts[1:])
    assert got == whole
    (tensors, metadata), (expected, described) = (read_tensors(tmp_path / name, kind="session") for name in "sw")
    assert metadata == described
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_prompt_for_a_session_is_appended(folder: Path, tmp_path: Path):
    arguments = "generate", "-n", 4, "--model", folder / "taylor", "--session", tmp_path / "s", "--json"
    ok(*arguments, "one")
    assert json.loads(ok(*arguments, "three").stdout)["context"] == 3 + 4 + 5 + 4


def test_a_character_cut_by_a_stop_is_shown_whole_by_the_next_run(folder: Path, tmp_path: Path, monkeypatch):
    arguments = "generate", "-n", 1, "--model", folder / "taylor", "--session", tmp_path / "s"
    ok(*arguments, "hi")
    shown = []
    for byte in "€a".encode():
        monkeypatch.setattr(Session, "step", lambda session, byte=byte, **_: byte)
        shown.append(ok(*arguments).stdout)
    assert shown == ["", "", "€", "a"]


def test_a_character_cut_at_the_end_is_shown_as_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Session, "step", lambda session, **_: 0xC3)
    assert ok("generate", "hi", "-n", 1, "--model", folder / "taylor").stdout == "\N{REPLACEMENT CHARACTER}"


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """A real process; a shell's background job would ignore Ctrl-C, so the default is put back."""
    command = [sys.executable, "-m", "taylor_attention", *map(str, arguments)]
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore)


def test_ctrl_c_saves_the_session_and_ends_cleanly(folder: Path, tmp_path: Path):
    path = tmp_path / "s"
    process = start("generate", "hi", "-n", 0, "--seed", 2, "--model", folder / "taylor", "--session", path)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)  # it is writing
    second = run("generate", "hi", "-n", 1, "--model", folder / "taylor", "--session", path)
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert complaints.startswith(b"stopped after ")
    assert complaints.count(b"\n") == 1
    assert (second.exit_code, "in use by another process" in second.stderr) == (2, True)

    # Everything printed is in the session and the other way round, and it goes on as if never stopped.
    shown = (first + rest).decode()
    model = load_checkpoint(folder / "taylor")[0]
    saved, whole = Session.load(path, model), Session(model, seed=2)
    whole.read(b"hi")
    written = bytes(whole.stream(saved.tokens - 2, temperature=0.8))
    assert shown == written.removesuffix(saved.unshown).decode("utf-8", "replace")
    assert list(saved.stream(20)) == list(whole.stream(20))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_reader_who_leaves_ends_it_cleanly(folder: Path, tmp_path: Path):
    process = start("generate", "hi", "-n", 0, "--model", folder / "taylor", "--session", tmp_path / "s")
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    complaints = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0, complaints
    assert complaints.count(b"\n") == 1
    assert Session.load(tmp_path / "s", load_checkpoint(folder / "taylor")[0]).tokens > 2


# ---- train and eval


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path / "model.safetensors")[0].state_dict()


def test_train_then_eval(folder: Path, tmp_path: Path):
    result = ok("train", folder / "text.txt", "--out", tmp_path / "run", *SMALL, "--json")
    summary = json.loads(result.stdout)
    assert summary["steps"] == 6
    assert "step 3 of 6: loss" in result.stderr
    made = tmp_path / "run" / "model.safetensors"
    found = json.loads(ok("eval", folder / "text.txt", "--model", made, "--length", 16, "--json").stdout)
    [row] = found["models"]
    assert row["nats_per_byte"] == pytest.approx(summary["validation"]["nats_per_byte"], rel=1e-5)
    shown = ok("eval", folder / "text.txt", "--model", made, "--model", folder / "softmax", "--length", 16).stdout
    assert f"{row['bits_per_byte']:.4f}" in shown
    assert "taylor, degree 2" in shown


def test_train_prints_a_summary(folder: Path, tmp_path: Path):
    shown = ok("train", folder / "text.txt", "--out", tmp_path / "run", *SMALL, "--attention", "softmax").stdout
    assert "bits/byte" in shown
    assert load_checkpoint(tmp_path / "run" / "model.safetensors")[0].config.attention == "softmax"


def test_train_reads_scores_as_it_is_told(folder: Path, tmp_path: Path):
    options = "--reading", "fitted", "--window", 4, "--far-gain", "--conv", 3
    ok("train", folder / "text.txt", "--out", tmp_path / "run", *SMALL, *options)
    made = tmp_path / "run" / "model.safetensors"
    model, _ = load_checkpoint(made)
    assert model.config.reading == "fitted"
    assert bool(model.blocks[0].attention.far_log_gain.all())  # it was 0
    assert model.blocks[0].attention.conv.weight.shape[-1] == model.config.conv == 3
    ok("generate", "hi", "-n", 3, "--model", made)
    assert load_checkpoint(folder / "taylor")[0].config.reading == "taylor"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("", {"rope": True, "far_dim": None, "far_layers": None}),
        ("--rope none", {"rope": False}),
        ("--rope near --window 4 --far-dim 2 --far-layers 1", {"rope": "near", "far_dim": 2, "far_layers": 1}),
    ],
)
def test_train_scores_far_tokens_as_it_is_told(folder: Path, tmp_path: Path, asked: str, told: dict[str, object]):
    ok("train", folder / "text.txt", "--out", tmp_path / "run", *SMALL, *asked.split())
    made = tmp_path / "run" / "model.safetensors"
    config = load_checkpoint(made)[0].config
    assert {name: getattr(config, name) for name in told} == told
    ok("generate", "hi", "-n", 3, "--model", made)


def test_ctrl_c_while_training_saves_and_resume_goes_on_as_if_never_stopped(folder: Path, tmp_path: Path):
    long = [*SMALL, "--steps", "150", "--save-every", "150", "--eval-every", "1"]
    process = start("train", folder / "text.txt", "--out", tmp_path / "parted", *long)
    assert process.stderr is not None
    process.stderr.readline()  # it has taken a step
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    last = complaints.splitlines()[-1]
    assert last.startswith(b"stopped; ") and b"--resume" in last
    assert b"Traceback" not in complaints
    _, metadata = read_tensors(tmp_path / "parted" / "training.safetensors", kind="training")
    assert 1 <= int(metadata["step"]) < 150
    ok("train", "--resume", "--out", tmp_path / "parted")
    ok("train", folder / "text.txt", "--out", tmp_path / "whole", *long)
    parted, whole = weights(tmp_path / "parted"), weights(tmp_path / "whole")
    assert all(torch.equal(parted[name], whole[name]) for name in whole)


def test_resume_refuses_other_settings(folder: Path, tmp_path: Path):
    ok("train", folder / "text.txt", "--out", tmp_path, *SMALL)
    result = run("train", "--resume", "--out", tmp_path, "--seed", 1)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "seed: expected 0" in result.stderr
    again = run("train", folder / "text.txt", "--out", tmp_path, *SMALL)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "out: expected a folder without a run" in again.stderr

"""The soak finds the errors that are there, goes on exactly where it stopped, and says whether bounds hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Finished

import taylor_attention as ta
from problems import differences
from taylor_attention.bench import soak
from taylor_attention.bench.soak import Settings, Soak, Stretch, judge, moment_error, output_error, with_squares
from taylor_attention.bench.streams import OUTLIER, OUTLIER_EVERY, RATES, STREAMS, draw
from taylor_attention.cli.app import app
from taylor_attention.core.basis import expand
from taylor_attention.core.storage import write_tensors
from taylor_attention.errors import ArgumentError, StorageError

TINY = Settings(block=32, heads=2, head_dim=4)
SIZES = (32, 2, 4)  # of a block: tokens, heads, head size


def fed(settings: Settings, blocks: int) -> Soak:
    run = Soak(settings)
    for _ in range(blocks):
        run.advance()
    return run


# ---- streams


@pytest.mark.parametrize("stream", STREAMS)
def test_a_block_is_drawn_from_seed_and_place_alone(stream):
    first, again = draw(stream, 0, 3, *SIZES), draw(stream, 0, 3, *SIZES)
    torch.testing.assert_close(first.arguments(), again.arguments(), rtol=0, atol=0)
    assert not torch.equal(first.query, draw(stream, 0, 4, *SIZES).query)
    assert not torch.equal(first.query, draw(stream, 1, 3, *SIZES).query)
    assert not torch.equal(first.key, draw(stream, 1, 3, *SIZES).key)


@pytest.mark.parametrize("stream", STREAMS)
def test_tokens_are_float32_of_the_sizes_asked_for(stream):
    tokens = draw(stream, 0, 0, *SIZES)
    for x in (tokens.query, tokens.key, tokens.value):
        assert (x.shape, x.dtype) == ((1, 2, 32, 4), torch.float32)
    assert (tokens.log_decay is not None) == (stream == "decay")


def test_scores_of_random_tokens_lie_within_one():
    tokens = draw("random", 0, 0, *SIZES)
    assert (tokens.query @ tokens.key.mT / 2).abs().max() <= 1 + 1e-6


def test_streams_are_what_their_names_say():
    places = OUTLIER_EVERY // 16 // 32
    constant, random = draw("constant", 0, 5, *SIZES), draw("random", 0, 5, *SIZES)
    assert torch.equal(constant.key, draw("constant", 0, 0, *SIZES).key[:, :, :1].expand(1, 2, 32, 4))
    assert torch.equal(constant.value, draw("constant", 0, 0, *SIZES).value[:, :, :1].expand(1, 2, 32, 4))
    sign = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
    assert torch.equal(draw("alternating", 0, 5, *SIZES).key, sign * random.key.abs())
    assert torch.equal(draw("alternating", 0, 5, *SIZES).value, sign * random.value.abs())
    assert draw("growing", 0, 2**20, *SIZES).key.norm(dim=-1).min() > 10 * random.key.norm(dim=-1).max()
    outlier = draw("outlier", 0, places, *SIZES).value / draw("random", 0, places, *SIZES).value
    assert outlier[:, :, 0].tolist() == [[[OUTLIER] * 4] * 2]
    assert outlier[:, :, 1:].unique().tolist() == [1]
    decay = draw("decay", 0, 0, 3, 4, 2).log_decay
    assert decay is not None
    assert decay[0, :, 1].tolist() == pytest.approx([-RATES[0], -RATES[1], -RATES[2], -RATES[0]])


# ---- the measure


def test_the_twin_of_squares_holds_the_sums_of_squared_terms():
    tokens = draw("decay", 0, 0, *SIZES)
    twin = with_squares(tokens)
    _, state = ta.attention(**twin.arguments(), degree=3, return_state=True)
    assert twin.log_decay is not None and tokens.log_decay is not None
    faded = (tokens.log_decay.double().flip(-1).cumsum(-1).flip(-1) - tokens.log_decay.double()).exp()
    columns = torch.cat([tokens.value.double(), torch.ones(1, 2, 32, 1)], -1) * faded[..., None]
    terms = columns[..., :, None] * expand(tokens.key.double(), 3)[..., None, :]  # [1, H, T, E, M]
    torch.testing.assert_close(state.moments[:1], terms.sum(2))
    torch.testing.assert_close(state.moments[1:], terms.square().sum(2))


def test_errors_are_relative_to_a_sum_or_where_it_cancels_to_its_terms():
    run = fed(replace(TINY, stream="alternating"), 1)
    state, twin = run.position.state, run.position.twin
    sums = twin.moments.clone()
    sums[0, 0, 0, :2] = torch.tensor([100.0, 0.5])
    sums[1, 0, 0, :2] = torch.tensor([25.0, 25.0])
    twin = replace(twin, sums=sums, compensation=torch.zeros_like(sums))
    found = sums[:1].float()
    for place, error in ((0, 100 * 3e-3), (1, 5 * 4e-3)):
        found[0, 0, 0, place] += error
        changed = replace(state, sums=found, compensation=torch.zeros_like(found))
        assert moment_error(changed, twin) == pytest.approx((3e-3, 4e-3)[place], rel=1e-3)


def test_the_worst_row_of_outputs_counts():
    exact = torch.tensor([[3.0, 4.0], [300.0, 400.0]]).double()
    assert output_error(torch.tensor([[3.0, 4.5], [301.0, 400.0]]), exact) == pytest.approx(0.1)


def test_what_is_not_a_number_is_no_small_error():
    run = fed(TINY, 1)
    sums = torch.full_like(run.position.state.sums, torch.nan)
    assert math.isnan(moment_error(replace(run.position.state, sums=sums), run.position.twin))
    assert math.isnan(output_error(torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 2).double()))
    stretch = run.finish_stretch()
    assert judge([stretch], 1, 1.0)[0].holds
    assert not judge([replace(stretch, moments=math.nan)], 1, 1.0)[0].holds


# ---- a run


@pytest.mark.parametrize("stream", STREAMS)
def test_a_run_counts_tokens_and_finds_the_errors_of_float32(stream):
    run = fed(replace(TINY, stream=stream), 3)
    stretch = run.finish_stretch()
    assert (run.tokens, stretch.tokens, stretch.since) == (96, 96, 0)
    assert run.position.state.tokens.tolist() == [96]
    assert run.position.twin.tokens.tolist() == [96, 96]
    assert 1e-9 < stretch.moments < soak.MOMENTS
    assert 1e-9 < stretch.outputs < soak.OUTPUTS
    assert stretch.seconds > 0
    assert stretch.state_bytes == run.position.state.nbytes
    assert run.position.stretch == Stretch(96, 96)


def test_a_run_goes_on_exactly_where_it_was_saved(tmp_path):
    whole, parted, resumed = fed(TINY, 5), fed(TINY, 2), Soak(TINY)
    parted.save(tmp_path / "position")
    resumed.restore(tmp_path / "position")
    for _ in range(3):
        resumed.advance()
    assert differences(resumed.position.state, whole.position.state) == []
    assert differences(resumed.position.twin, whole.position.twin) == []
    assert replace(resumed.position.stretch, seconds=0) == replace(whole.position.stretch, seconds=0)


def test_a_run_of_other_settings_is_refused(tmp_path):
    fed(TINY, 1).save(tmp_path / "position")
    with pytest.raises(StorageError, match="a soak of other settings"):
        Soak(replace(TINY, seed=1)).restore(tmp_path / "position")


def test_a_file_that_holds_no_run_is_refused(tmp_path):
    write_tensors(tmp_path / "position", {"x": torch.ones(1)}, kind=soak.KIND, metadata={})
    with pytest.raises(StorageError, match="no whole soak"):
        Soak(TINY).restore(tmp_path / "position")


@pytest.mark.parametrize(("changed", "name"), [({"stream": "x"}, "stream"), ({"backend": "x"}, "backend")])
def test_settings_that_cannot_be_run_are_refused_at_once(changed, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected one of"):
        Soak(replace(TINY, **changed))


GOOD = [Stretch(2**i, 2**i // 2, 1e-7, 2e-7, 1.0, 100, 10**9) for i in range(1, 8)]
BAD = {
    "moments": {"moments": 2e-6},
    "outputs": {"outputs": 2e-5},
    "state_bytes_growth": {"state_bytes": 101},
    "resident_bytes_growth": {"resident_bytes": 10**9 + soak.GROWTH + 1},
}


def test_a_good_run_holds_what_was_promised():
    verdicts = judge(GOOD, len(GOOD), soak.MOMENTS)
    assert [verdict.name for verdict in verdicts] == list(BAD)
    assert all(verdict.holds for verdict in verdicts)
    assert [verdict.found for verdict in verdicts] == [1e-7, 2e-7, 0, 0]


@pytest.mark.parametrize("name", BAD)
def test_one_bad_stretch_breaks_the_promise(name):
    verdicts = judge([*GOOD[:5], replace(GOOD[5], **BAD[name]), GOOD[6]], len(GOOD), soak.MOMENTS)
    assert [verdict.name for verdict in verdicts if not verdict.holds] == [name]


def test_memory_is_that_of_this_process_once_it_has_settled():
    odd = [replace(each, resident_bytes=1) for each in GOOD[: soak.WARM]]
    assert all(verdict.holds for verdict in judge([*odd, *GOOD[soak.WARM :]], len(GOOD), 1))
    other = [replace(each, resident_bytes=5) for each in GOOD[:3]]
    assert judge([*other, *GOOD[3:]], 4, 1)[-1].found is None
    unknown = [replace(each, resident_bytes=None) for each in GOOD]
    assert judge(unknown, len(GOOD), 1)[-1].holds


# ---- the command

SMALL = ["--block", 32, "--head-dim", 4, "--threads", 1]


def run(*arguments: object) -> Finished:
    return CliRunner().invoke(app, ["soak", *map(str, [*SMALL, *arguments])])


def ok(*arguments: object) -> dict[str, Any]:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_ends_with_tables_files_and_a_line_of_json(tmp_path: Path):
    result = run("--tokens", "1e3", "--out", tmp_path / "new" / "out")
    *shown, last = result.stdout.splitlines()
    found = json.loads(last)
    assert result.exit_code == 0
    assert found["holds"]
    assert [each["tokens"] for each in found["stretches"]] == [32, 64, 128, 256, 512, 1024]
    assert [each["since"] for each in found["stretches"]] == [0, 32, 64, 128, 256, 512]
    assert found["tokens"] == 1024
    assert list(found["verdicts"]) == list(BAD)
    assert "Drift and cost by tokens" in shown[0]
    assert sum(" ok " in line for line in shown) == 4
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["32", "64", "128", "256", "512", "1,024"]
    names = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert names == ["position.safetensors", "results.jsonl"]
    lines = (tmp_path / "new" / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [each["tokens"] for each in found["stretches"]]


def test_with_json_there_is_nothing_else_on_stdout(tmp_path: Path):
    result = run("--tokens", 64, "--json", "--out", tmp_path)
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout)["out"] == str(tmp_path)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two runs found the same errors at the same places."""
    pick = [[(each[name]) for name in ("tokens", "since", "moments", "outputs")] for each in first["stretches"]]
    return pick == [[each[name] for name in ("tokens", "since", "moments", "outputs")] for each in second["stretches"]]


def test_resume_goes_on_to_more_tokens(tmp_path: Path):
    ok("--tokens", 256, "--out", tmp_path / "parted")
    assert same(
        ok("--tokens", "1_024", "--resume", "--out", tmp_path / "parted"),
        ok("--out", tmp_path / "whole", "--tokens", 1024),
    )


def test_a_finished_run_is_resumed_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = ok("--tokens", 256, "--out", tmp_path)
    monkeypatch.setattr(Soak, "advance", None)
    assert ok("--tokens", 256, "--resume", "--out", tmp_path)["stretches"] == first["stretches"]


@pytest.mark.parametrize("call", range(10, 15))
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped at a call of attention, that for the stream or that for its twin."""
    whole = ok("--tokens", 512, "--out", tmp_path / "whole")
    calls, attention = count(), soak.attention

    def interrupt(*arguments, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return attention(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(soak, "attention", interrupt)
        stopped = run("--tokens", 512, "--out", tmp_path / "parted")
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert stopped.stderr.splitlines()[-1].startswith(f"stopped after {(call - 1) // 2 * 32:,} tokens; ")
    assert "go on with --resume" in stopped.stderr
    assert same(ok("--tokens", 512, "--resume", "--out", tmp_path / "parted"), whole)


def test_a_run_killed_between_two_writes_notes_no_line_twice(tmp_path: Path):
    """The line is there, the place to go on from is the one before it."""
    ok("--tokens", 64, "--out", tmp_path)
    place = (tmp_path / "position.safetensors").read_bytes()
    whole = ok("--tokens", 128, "--resume", "--out", tmp_path)
    (tmp_path / "position.safetensors").write_bytes(place)
    assert same(ok("--tokens", 128, "--resume", "--out", tmp_path), whole)


def test_resume_refuses_a_place_of_other_settings(tmp_path: Path):
    ok("--tokens", 64, "--out", tmp_path)
    result = run("--tokens", 64, "--resume", "--seed", 1, "--out", tmp_path)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "a soak of other settings" in result.stderr


def test_drift_beyond_the_bound_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soak, "OUTPUTS", 1e-9)
    result = run("--tokens", 64, "--out", tmp_path)
    assert result.exit_code == 1
    assert sum("FAILED" in line for line in result.stdout.splitlines()) == 1
    assert not json.loads(result.stdout.splitlines()[-1])["holds"]


def test_memory_that_grows_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = count(10**9, 10**8)
    monkeypatch.setattr(soak, "settled_bytes", lambda: next(sizes))
    found = json.loads(run("--tokens", 512, "--json", "--out", tmp_path).stdout)
    assert [name for name, verdict in found["verdicts"].items() if not verdict["holds"]] == ["resident_bytes_growth"]


MISUSE = {
    "no tokens": ("expected a whole number from 1 to 2^40, such as 1e8, got 0", "--tokens", 0),
    "half a token": ("expected a whole number from 1 to 2^40", "--tokens", "1.5"),
    "no number": ("such as 1e8, got many", "--tokens", "many"),
    "no end": ("expected a whole number from 1 to 2^40", "--tokens", "inf"),
    "no such stream": ("--stream", "--stream", "river"),
    "no such backend": ("backend: expected one of", "--backend", "none"),
    "a state too large": ("degree: expected an int <= 15 at a head size of 16", "--degree", 60, "--head-dim", 16),
    "no block": ("--block", "--block", 0),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_is_one_clear_line_and_exit_code_2(case: tuple[Any, ...], tmp_path: Path):
    expected, *arguments = case
    result = run(*arguments, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()

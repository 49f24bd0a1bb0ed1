"""Whatever is done to states, in whatever order, they stand for their tokens: a random walk beside a plain record.

Each state is kept beside the tokens that it stands for. Every output is compared with what the specification gives for
the whole record in float64; what the specification does not know, heavy tokens, with one call over the record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import taylor_attention as ta
from kernels import MODULE
from problems import Problem, decode, differences, make
from taylor_attention.errors import ArgumentError
from tolerances import TOLERANCE, relative_error

BACKENDS = ["torch", "cpu"] if MODULE else ["torch"]
LONGEST = 120  # tokens of a record; states of more are not continued
MOST = 6  # states at a time

SIZES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "head_dim": st.integers(1, 4),
        "value_dim": st.integers(1, 3),
        "batch": st.integers(1, 3),
    }
)
REACHES = st.fixed_dictionaries(
    {
        "degree": st.sampled_from([None, 0, 1, 2, 2, 3, 4]),
        "window": st.sampled_from([0, 0, 1, 2, 5, 17]),
        "sinks": st.sampled_from([0, 0, 1, 3]),
        "heavy": st.sampled_from([0, 0, 1, 3]),
        "scale": st.sampled_from([None, 0.25, 1]),
    }
).filter(lambda reach: reach["window"] > 0 or (reach["heavy"] == 0 and (reach["degree"] is not None or reach["sinks"])))
MASKS = st.sampled_from([None, None, "left", "right", "holes", "row 0 hidden"])
DECAYS = st.sampled_from([None, None, "soft", "hard", "resets"])
PIECES = st.fixed_dictionaries(
    {"length": st.integers(0, 7), "mask": MASKS, "decay": DECAYS, "seed": st.integers(0, 999)}
)
READINGS, WHERE, WHICH = st.sampled_from(["taylor", "fitted"]), st.sampled_from(BACKENDS), st.integers(0, MOST - 1)


@dataclass
class Kept:
    """A state, the tokens that it stands for, and whether it has ever been in single precision."""

    state: ta.State
    record: Problem
    rounded: bool

    @property
    def tolerance(self) -> float:
        return TOLERANCE[torch.float32 if self.rounded else torch.float64]

    def fork(self, state: ta.State) -> Kept:
        """Another state of the same tokens."""
        return Kept(state, self.record, self.rounded or state.dtype == torch.float32)


def with_all(problem: Problem) -> Problem:
    """The same with a mask and gates, whether it had them or not."""
    batch, heads, length, _ = problem.key.shape
    none = {
        "key_padding_mask": torch.ones(batch, length, dtype=torch.bool),
        "log_decay": torch.zeros(batch, heads, length, dtype=torch.float64),
    }
    return replace(problem, along=none | problem.along).to(torch.float64)


def joined(first: Problem, second: Problem) -> Problem:
    """The tokens of one problem, then those of the other."""
    first, second = with_all(first), with_all(second)
    query, key, value = (torch.cat(pair, 2) for pair in zip(first.arguments, second.arguments, strict=True))
    along = {name: torch.cat([first.along[name], second.along[name]], -1) for name in first.along}
    return replace(first, query=query, key=key, value=value, along=along)


def addresses(state: ta.State) -> set[int]:
    """Where the tensors of a state lie."""
    return {tensor.data_ptr() for tensor in state.tensors().values() if tensor.numel()}


def expected(record: Problem, last: int) -> torch.Tensor:
    """What the last tokens of a record should give."""
    options = dict(record.options)
    heavy = options.pop("heavy")
    found = record.solve(backend="torch") if heavy else replace(record, options=options).oracle()
    return found[:, :, record.length - last :]


class States(RuleBasedStateMachine):
    """States of one kind, made of each other and of new tokens."""

    @initialize(sizes=SIZES, reach=REACHES, double=st.booleans(), gain=st.booleans(), reading=READINGS)
    def begin(self, sizes: dict[str, int], reach: dict[str, Any], double: bool, gain: bool, reading: str) -> None:
        heads = sizes["kv_heads"] * sizes["group"]
        self.sizes = {"heads": heads, "kv_heads": sizes["kv_heads"]}
        self.sizes |= {name: sizes[name] for name in ("head_dim", "value_dim")}
        self.options = {name: reach[name] for name in ("window", "sinks", "heavy")}
        self.options |= {} if reach["scale"] is None else {"scale": reach["scale"]}
        self.degree = reach["degree"]
        if gain and self.degree is not None and reach["window"] + reach["sinks"] > 0:
            self.options["far_gain"] = torch.linspace(-0.5, 0.5, heads, dtype=torch.float64)
        self.only_reading = reading if reach["heavy"] else None  # what a token receives, and stays for, depends on it
        # Choices of heavy tokens may differ where two priorities are as near as float32 rounds.
        self.dtype = torch.float64 if double or reach["heavy"] else torch.float32
        nothing = self.draw(sizes["batch"], {"length": 0, "mask": None, "decay": None, "seed": 0})
        state = nothing.to(self.dtype).new_state()
        self.kept = [Kept(state, with_all(nothing), self.dtype == torch.float32)]

    def draw(self, batch: int, piece: dict[str, Any]) -> Problem:
        """New tokens that float32 holds exactly, with scores for which odd degrees are positive."""
        radius = 0.8 if self.degree is not None and self.degree % 2 else 2.0
        options = {**self.sizes, **self.options, **piece, "radius": radius}
        return make(batch=batch, degree=self.degree, dtype=torch.float32, **options)

    def read_by(self, problem: Problem, reading: str) -> Problem:
        """The problem with a way to read scores."""
        return replace(problem, options=problem.options | {"reading": self.only_reading or reading})

    def pick(self, which: int) -> Kept:
        return self.kept[which % len(self.kept)]

    def keep(self, kept: Kept, which: int) -> None:
        """One more, or one instead of another; it shares no memory with any, so that it can be changed in place."""
        assert [other for other in self.kept if addresses(other.state) & addresses(kept.state)] == []
        if kept.record.length > LONGEST:
            return
        if len(self.kept) < MOST:
            self.kept.append(kept)
        else:
            self.kept[which % MOST] = kept

    def told(self, kept: Kept, piece: dict[str, Any]) -> tuple[Problem, Problem]:
        """New tokens for a state, in its dtype, and the record with them."""
        problem = self.draw(kept.state.batch_size, piece)
        return problem.to(kept.state.dtype), joined(kept.record, problem)

    def compare(self, y: torch.Tensor, record: Problem, reading: str, tolerance: float) -> None:
        assert relative_error(y, expected(self.read_by(record, reading), y.shape[2])) < tolerance

    def check(self, kept: Kept) -> None:
        """What a state says of its tokens in numbers."""
        shown, gates = kept.record.along["key_padding_mask"], kept.record.along["log_decay"]
        assert torch.equal(kept.state.tokens, shown.sum(-1))
        faded = gates.masked_fill(~shown[:, None], 0).clamp(min=-1000).sum(-1)
        assert torch.allclose(kept.state.log_decay, faded, rtol=1e-6, atol=1e-6)
        assert kept.state.nbytes == kept.record.to(kept.state.dtype).new_state().nbytes

    @rule(which=WHICH, piece=PIECES, reading=READINGS, backend=WHERE, tokens=st.integers(1, 20))
    def append_one_by_one(self, which: int, piece: dict[str, Any], reading: str, backend: str, tokens: int) -> None:
        kept = self.pick(which)
        problem, record = self.told(kept, piece | {"length": tokens})
        y, _ = decode(self.read_by(problem, reading), state=kept.state, backend=backend)
        kept.record = record
        self.compare(y, record, reading, kept.tolerance)
        self.check(kept)

    @rule(which=WHICH, piece=PIECES, reading=READINGS, backend=WHERE)
    def append_together(self, which: int, piece: dict[str, Any], reading: str, backend: str) -> None:
        kept = self.pick(which)
        problem, record = self.told(kept, piece)
        y = self.read_by(problem, reading).decode_(kept.state, backend=backend)
        kept.record = record
        self.compare(y, record, reading, kept.tolerance)
        self.check(kept)

    @rule(which=WHICH, piece=PIECES, reading=READINGS, backend=WHERE, chunk=st.sampled_from([None, 1, 3]))
    def go_on(self, which: int, piece: dict[str, Any], reading: str, backend: str, chunk: int | None) -> None:
        """By `attention`, which leaves the state before as it is."""
        kept = self.pick(which)
        problem, record = self.told(kept, piece)
        before = kept.state.clone()
        more = {"backend": backend, "chunk_size": chunk}
        y, after = self.read_by(problem, reading).solve(state=kept.state, return_state=True, **more)
        assert differences(kept.state, before) == []
        self.compare(y, record, reading, kept.tolerance)
        longer = Kept(after, record, kept.rounded)
        self.check(longer)
        self.keep(longer, which)

    @rule(which=WHICH, piece=PIECES, reading=READINGS, backend=WHERE)
    def read(self, which: int, piece: dict[str, Any], reading: str, backend: str) -> None:
        kept = self.pick(which)
        problem, record = self.told(kept, piece)
        before = kept.state.clone()
        y = self.read_by(problem, reading).solve(state=kept.state, backend=backend)
        assert differences(kept.state, before) == []
        self.compare(y, record, reading, kept.tolerance)

    @rule(which=WHICH, cuts=st.lists(st.integers(0, LONGEST), max_size=3), backend=WHERE)
    def begin_again(self, which: int, cuts: list[int], backend: str) -> None:
        """The record, cut elsewhere."""
        kept = self.pick(which)
        record = self.read_by(kept.record.to(kept.state.dtype), "taylor")
        borders = sorted({min(cut, record.length) for cut in cuts} | {0, record.length})
        state = record.new_state()
        for start, stop in pairwise(borders):
            _, state = record.part(start, stop).solve(state=state, return_state=True, backend=backend)
        again = kept.fork(state)
        again.rounded = state.dtype == torch.float32
        self.check(again)
        self.keep(again, which + 1)

    @rule(which=WHICH)
    def clone(self, which: int) -> None:
        kept = self.pick(which)
        copy = kept.state.clone()
        assert differences(copy, kept.state) == []
        self.keep(kept.fork(copy), which + 1)

    @rule(which=WHICH, rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def select(self, which: int, rows: list[int]) -> None:
        kept = self.pick(which)
        indices = torch.tensor([row % kept.state.batch_size for row in rows])
        found = kept.fork(kept.state.select(indices))
        query, key, value = (x[indices] for x in kept.record.arguments)
        along = {name: x[indices] for name, x in kept.record.along.items()}
        found.record = replace(kept.record, query=query, key=key, value=value, along=along)
        self.check(found)
        self.keep(found, which + 1)

    @precondition(lambda self: self.options["sinks"] == self.options["heavy"] == 0)
    @rule(first=WHICH, second=WHICH)
    def merge(self, first: int, second: int) -> None:
        one, other = self.pick(first), self.pick(second)
        if (one.state.batch_size, one.state.dtype) != (other.state.batch_size, other.state.dtype):
            with pytest.raises(ArgumentError, match="^later: expected a state of "):
                one.state.merge(other.state)
            return
        both = Kept(one.state.merge(other.state), joined(one.record, other.record), one.rounded or other.rounded)
        self.check(both)
        self.keep(both, first + 1)

    @rule(which=WHICH)
    def save_and_load(self, which: int) -> None:
        kept = self.pick(which)
        with tempfile.TemporaryDirectory() as folder:
            kept.state.save(Path(folder) / "state")
            loaded = ta.State.load(Path(folder) / "state")
        assert differences(loaded, kept.state) == []
        kept.state = loaded

    @precondition(lambda self: self.options["heavy"] == 0)
    @rule(which=WHICH, dtype=st.sampled_from([torch.float32, torch.float64]))
    def convert(self, which: int, dtype: torch.dtype) -> None:
        kept = self.pick(which)
        converted = kept.fork(kept.state.to(dtype=dtype))
        self.check(converted)
        self.keep(converted, which + 1)

    @rule(which=WHICH, misuse=st.integers(0, 99))
    def misuse(self, which: int, misuse: int) -> None:
        """What is refused changes nothing."""
        kept = self.pick(which)
        problem, _ = self.told(kept, {"length": 1, "mask": None, "decay": "soft", "seed": misuse})
        before = kept.state.clone()
        calls = misuses(kept.state, problem)
        with pytest.raises(ArgumentError, match="^[a-z_]+: expected .*, got "):
            calls[misuse % len(calls)]()
        assert differences(kept.state, before) == []


def misuses(state: ta.State, problem: Problem) -> list[Callable[[], Any]]:
    """Calls that none may survive; the problem is one good token."""

    def changed(**names: Any) -> Callable[[], Any]:
        return lambda: replace(problem, **names).decode_(state)

    def asked(**options: Any) -> Callable[[], Any]:
        return lambda: problem.decode_(state, **options)

    query, key, value = problem.arguments
    other = torch.float32 if key.dtype == torch.float64 else torch.float64
    wider = state.head_dim + 1
    return [
        changed(query=query[..., :0]),
        changed(query=query.repeat(2, 1, 1, 1)),
        changed(key=key.repeat(1, 2, 1, 1)),
        changed(key=key.to(other)),
        changed(key=key.long()),
        changed(key=key.to_sparse()),
        changed(value=value[..., :0]),
        changed(value=value.repeat(1, 1, 1, 2)),
        changed(value=value.to("meta")),
        changed(query=query.new_zeros(*query.shape[:3], wider), key=key.new_zeros(*key.shape[:3], wider)),
        changed(key=key.clone().requires_grad_()),
        changed(along={"log_decay": problem.along["log_decay"] + 100}),
        changed(along={"log_decay": problem.along["log_decay"][:, :, None]}),
        changed(along={"key_padding_mask": torch.ones(len(key), 1)}),
        changed(options={"scale": state.scale + 1}),
        changed(options={"scale": float("nan")}),
        changed(options={"reading": "exact"}),
        changed(options={"series": "exp"}),
        asked(backend="none"),
        lambda: problem.solve(state=state, return_state=True, max_state_bytes=0),
        lambda: replace(problem, degree=(problem.degree or 0) + 1).solve(state=state),
        lambda: ta.decode_(key.numpy(), key, value, state),
        lambda: state.select(torch.tensor([state.batch_size])),
        lambda: state.merge(state.select(torch.arange(state.batch_size).repeat(2))),
        lambda: state.to(dtype=torch.float16),
    ]


def walk(examples: int, steps: int, derandomize: bool) -> None:
    found = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(States, settings=found)


def test_states_stand_for_their_tokens():
    walk(examples=30, steps=15, derandomize=True)


@pytest.mark.slow
def test_states_stand_for_their_tokens_whatever_is_done_for_long():
    walk(examples=400, steps=60, derandomize=False)

"""Contestants in recall: one model for all, states of the bytes that are told, a report that copes with any finding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.evidence import recall_training
from taylor_attention.bench.evidence.experiment import Finding
from taylor_attention.bench.evidence.recall import EXPERIMENT, MIXERS, SOME, plan
from taylor_attention.bench.evidence.recall_models import LAYERS, WIDTH, Mixer, RecallModel
from taylor_attention.bench.evidence.recall_report import FAMILIES, bytes_of, family_of
from taylor_attention.bench.evidence.recall_tasks import TASKS
from taylor_attention.bench.evidence.recall_training import ask, measure, train

NAMES = [mixer.name for mixer in MIXERS]
EACH = pytest.mark.parametrize("mixer", MIXERS, ids=NAMES)
SMALL = replace(TASKS["mqar"], train=(4,), test=(4, 8), hard=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are trained on and asked in no time."""
    for name, size in {"TOKENS": 512, "_ASKED": 64, "_PIECE": 1024}.items():
        monkeypatch.setattr(recall_training, name, size)


def make(mixer: Mixer) -> RecallModel:
    torch.manual_seed(0)
    return RecallModel(mixer, SMALL.symbols)


@EACH
def test_no_contestant_sees_what_comes_later(mixer: Mixer) -> None:
    tokens, everywhere = torch.randint(SMALL.symbols, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    changed = tokens.clone()
    changed[:, 30] = (tokens[:, 30] + 1) % SMALL.symbols
    model = make(mixer).eval()
    before, after = (model(x, everywhere).view(2, 40, -1) for x in (tokens, changed))
    torch.testing.assert_close(after[:, :30], before[:, :30])
    assert not torch.allclose(after[:, 30], before[:, 30], atol=1e-3)


@EACH
def test_every_weight_learns(mixer: Mixer) -> None:
    model = make(mixer)
    tokens, targets = SMALL.draw(torch.Generator().manual_seed(0), 4, 16, False)
    asked = targets >= 0
    torch.nn.functional.cross_entropy(model(tokens, asked), targets[asked]).backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


def test_contestants_differ_in_their_mixing_alone() -> None:
    softmax, *others = (
        make(mixer).state_dict() for mixer in (Mixer("softmax"), Mixer("taylor", degree=2), Mixer("elu"))
    )
    for other in others:
        assert softmax.keys() == other.keys()
        assert all(torch.equal(weight, other[name]) for name, weight in softmax.items())


def test_bytes_are_those_of_the_states() -> None:
    taylor, hybrid = Mixer("taylor", 8, degree=2), Mixer("taylor", 8, degree=2, window=16)
    state = ta.State.zeros(1, WIDTH // 8, 8, 8, 2)
    assert taylor.state_bytes(100) == LAYERS * state.sums.nbytes
    assert hybrid.state_bytes(100) - taylor.state_bytes(100) == LAYERS * 16 * 2 * WIDTH * 4
    assert (
        Mixer("softmax").state_bytes(256) == Mixer("window", window=256).state_bytes(10) == LAYERS * 256 * 2 * WIDTH * 4
    )
    assert Mixer("delta", 64).state_bytes(9) == LAYERS * 64 * 64 * 4
    assert Mixer("elu", 16).state_bytes(9) == LAYERS * 4 * 16 * 17 * 4


@pytest.mark.parametrize("nbytes", [10_000, 26_000])
def test_a_window_of_bytes_takes_no_more(nbytes: int) -> None:
    window = Mixer("taylor", 8, degree=2).with_window_of(nbytes)
    assert window.state_bytes(0) <= nbytes < replace(window, window=window.window + 1).state_bytes(0)


def test_training_is_a_function_of_the_seed() -> None:
    (first, losses), (again, same), (_, other) = (train(Mixer("elu"), SMALL, 3, seed) for seed in (5, 5, 6))
    assert losses == same != other
    assert len(losses) == 3
    assert ask(first, SMALL, 8, 0) == ask(again, SMALL, 8, 0)


def test_softmax_learns_to_recall() -> None:
    task = replace(TASKS["induction"], train=(16,), test=(32,))
    model, losses = train(Mixer("softmax"), task, 60, 0)
    assert losses[-1] < 0.1 * losses[0]
    assert ask(model, task, 32, 0) > 0.95


def test_answers_count_if_every_symbol_is_right() -> None:
    book = TASKS["phone book"]

    class Half(torch.nn.Module):
        """Right at first digits alone."""

        def forward(self, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
            follows = torch.nn.functional.pad(tokens[:, 1:], (0, 1))[asked]
            follows[1::2] = (follows[1::2] + self.shift) % book.symbols
            return torch.nn.functional.one_hot(follows, book.symbols).float()

    half = Half()
    half.shift = 0
    assert ask(half, book, 4, 0) == 1
    half.shift = 1
    assert ask(half, book, 4, 0) == 0


def test_a_case_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_training, "TASKS", {"mqar": SMALL})
    found = measure({"task": "mqar", "steps": 2, **Mixer("taylor", 8, degree=2).to_dict()}, 0)
    assert list(found["accuracy"]) == list(found["state_bytes"]) == ["4", "8"]
    assert found["parameters"] == sum(each.numel() for each in make(Mixer("softmax", 8)).parameters())


def test_the_plan_compares_families_on_every_task() -> None:
    assert {each["task"] for each in plan(False)} == set(TASKS)
    assert {family_of(mixer) for mixer in SOME} == {family_of(mixer) for mixer in MIXERS} == set(FAMILIES)
    assert len(plan(True)) == len(FAMILIES)
    assert len(set(NAMES)) == len(NAMES)


def find(task: str, mixer: Mixer, accuracies: list[float]) -> Finding:
    sizes = TASKS[task].test
    values: dict[str, Any] = {
        "accuracy": {str(size): accuracy for size, accuracy in zip(sizes, accuracies, strict=True)},
        "state_bytes": {str(size): mixer.state_bytes(TASKS[task].tokens(size)) for size in sizes},
    }
    return Finding({"task": task, "steps": 7, **mixer.to_dict()}, values, 1.0)


FOUND = [
    find("copy", Mixer("softmax"), [1.0, 1.0, 1.0, 1.0, 1.0]),
    find("copy", Mixer("taylor", 8, degree=2), [1.0, 1.0, 0.97, 0.4, 0.1]),
    find("copy", Mixer("window", window=20), [1.0, 0.3, 0.2, 0.1, 0.1]),
    find("needles", Mixer("delta", 64), [1.0, 0.6, 0.5, 0.2]),
]


def test_what_is_told_of_findings() -> None:
    told = EXPERIMENT.conclusions(FOUND)
    assert told == [
        "Copying a random string, 64 symbols: softmax 100.0% in 133,120 bytes; the smallest other state with 95%: "
        "Taylor 2, d = 8, 25,920 bytes.",
        "Copying a random string: accuracy is below 50% from so many symbols on: window 20, d = 16 at 32, "
        "Taylor 2, d = 8 at 128.",
        "Copying a random string, 64 symbols: Taylor 2, d = 8 (25,920 bytes) 97.0%; the best rival within 1.3 times "
        "its bytes: window 20, d = 16 (20,480) 20.0%.",
        "Needles in real text, 256 bytes of context: no other state reaches 95%, nearest delta rule, d = 64, 60.0%.",
        "Needles in real text: accuracy is below 50% from so many bytes of context on: delta rule, d = 64 at 1,024.",
    ]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_partial_findings_are_told_and_drawn(count: int) -> None:
    found = FOUND[:count]
    tasks = len({each.case["task"] for each in found})
    assert len(EXPERIMENT.tables(found)) == tasks
    assert [each.name for each in EXPERIMENT.pictures(found)] == ["recall", "recall-tasks"][:tasks]
    assert sum(len(table.rows) for table in EXPERIMENT.tables(found)) == count


def test_contestants_are_told_by_their_bytes() -> None:
    copying = EXPERIMENT.tables(FOUND)[0]
    assert [row[0] for row in copying.rows] == ["window 20, d = 16", "Taylor 2, d = 8", "softmax, d = 16"]
    assert copying.rows[1] == ("Taylor 2, d = 8", "25,920", "100.0%", "100.0%", "97.0%", "40.0%", "10.0%")
    assert [bytes_of(each) for each in FOUND[:3]] == [133_120, 25_920, 20_480]

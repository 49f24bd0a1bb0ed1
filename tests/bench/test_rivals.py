"""The rivals compute what they claim to, and anyone's callable can be named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import taylor_attention as ta
from taylor_attention.bench.rivals import KeyValueCache, Memory, Recurrent, Ring, load_factory, slide
from taylor_attention.errors import ArgumentError
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tolerances import TOLERANCE, relative_error

HEADS, TOKENS, SIZE, DEGREE = 2, 23, 4, 3
SHAPE = {"heads": HEADS, "head_dim": SIZE, "value_dim": SIZE, "degree": DEGREE, "causal": True}


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, HEADS, TOKENS, SIZE).mul(0.5).unbind(0)


def recurrent(block: int) -> Recurrent:
    made = Recurrent(**SHAPE)
    made.block = block
    return made


@pytest.mark.parametrize("block", [1, 5, 100])
@pytest.mark.parametrize("cuts", [[TOKENS], [1, 1, 4, 17], [1] * TOKENS])
def test_the_recurrence_is_the_papers(inputs, block: int, cuts: list[int]):
    attend, found = recurrent(block), []
    with torch.no_grad():
        attend(*(x[:, :, :3] for x in inputs), False)  # another sequence, to be forgotten
        for index, part in enumerate(zip(*(x.split(cuts, 2) for x in inputs), strict=True)):
            found.append(attend(*part, index > 0))
    expected = attention_reference(*inputs, degree=DEGREE)
    assert relative_error(torch.cat(found, 2), expected) < TOLERANCE[torch.float32]


def test_the_recurrence_has_gradients(inputs):
    leaves, exact = ([x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    got = torch.autograd.grad(recurrent(5)(*leaves, False).square().sum(), leaves)
    expected = torch.autograd.grad(attention_reference(*exact, degree=DEGREE).square().sum(), exact)
    assert all(relative_error(*pair) < TOLERANCE[torch.float32] for pair in zip(got, expected, strict=True))


def test_the_recurrence_goes_on_from_a_state(inputs):
    _, state = ta.attention(*(x[:, :, :-1] for x in inputs), degree=DEGREE, return_state=True)
    attend = Recurrent(**SHAPE)
    attend.begin_after(state)
    with torch.no_grad():
        got = attend(*(x[:, :, -1:] for x in inputs), True)
    assert relative_error(got, attention_reference(*inputs, degree=DEGREE)[:, :, -1:]) < TOLERANCE[torch.float32]


def test_the_cache_holds_every_copy_and_reuses_its_room(inputs):
    _, key, value = inputs
    fresh = torch.randn(3, 4, 1, HEADS, 1, SIZE)  # query, key, value of four tokens; the room is for three
    cache = KeyValueCache(key, value, copies=5, room=3, memory=Memory())
    got = [cache.decode(*token) for token in fresh.unbind(1)]
    for step, after in enumerate(([0], [0, 1], [0, 1, 2], [3])):
        keys, values = (
            torch.cat([x.repeat(1, 1, 5, 1), *tokens[after]], 2) for x, tokens in ((key, fresh[1]), (value, fresh[2]))
        )
        expected = softmax_reference(fresh[0, step], keys, values, causal=False)
        assert relative_error(got[step], expected) < TOLERANCE[torch.float32]
    assert KeyValueCache.size(5 * TOKENS + 3, HEADS, SIZE) == cache.key.nbytes + cache.value.nbytes


@pytest.mark.parametrize("window", [1, 5, 8, TOKENS, 40])
def test_softmax_slides_in_blocks_of_the_window(inputs, window: int):
    leaves, exact = ([x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    got, expected = slide(*leaves, window), attention_reference(*exact, degree=None, window=window)
    assert relative_error(got, expected) < TOLERANCE[torch.float32]
    gradients = torch.autograd.grad(got.square().sum(), leaves[2])
    assert relative_error(gradients[0], torch.autograd.grad(expected.square().sum(), exact[2])[0]) < 1e-5


@pytest.mark.parametrize("before", [0, 2, 5, 20])
def test_the_ring_holds_the_latest_tokens(inputs, before: int):
    _, key, value = inputs
    ring = Ring(key[:, :, :before], value[:, :, :before], 5)
    got = [ring.decode(*token) for token in zip(*(x[:, :, before:].split(1, 2) for x in inputs), strict=True)]
    expected = attention_reference(*inputs, degree=None, window=5)[:, :, before:]
    assert relative_error(torch.cat(got, 2), expected) < TOLERANCE[torch.float32]
    assert ring.key.shape == ring.value.shape == (1, HEADS, 5, SIZE)


def test_memory_is_taken_again():
    memory = Memory()
    first = memory.take(100)
    assert memory.take(60).data_ptr() == first.data_ptr()
    assert memory.nbytes == 400
    assert memory.take(200).numel() == 200


SOURCE = "from helper import times\ndef rival(**shape):\n    return lambda q, k, v, again: times(v)\nNUMBER = 3\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rivals.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("def times(x):\n    return 2 * x\n")
    (tmp_path / "needy.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["my_rivals:rival", "my_rivals.py:rival", "{folder}/my_rivals.py:rival"])
def test_a_rival_is_found_in_a_module_and_in_a_file(folder: Path, place: str):
    name, factory = load_factory(place.format(folder=folder))
    assert name == place.rpartition("/")[2]
    assert factory(**SHAPE)(1, 2, 3, False) == 6


BAD = {
    "my_rivals.py": "expected module:function or path/to/file.py:function",
    ":rival": "expected module:function",
    "none.py:rival": "expected a file that exists, got none.py",
    "no_such_rivals:rival": "expected a module that can be imported, got no_such_rivals",
    "needy.py:rival": "expected a module that can be imported, got needy.py (No module named 'no_such_module')",
    "my_rivals.py:other": "expected a function in my_rivals.py, got other",
    "my_rivals:NUMBER": "expected a function in my_rivals, got NUMBER",
}


@pytest.mark.parametrize(("place", "message"), BAD.items(), ids=BAD.keys())
def test_a_rival_that_is_not_there_is_one_clear_line(folder: Path, place: str, message: str):
    with pytest.raises(ArgumentError) as caught:
        load_factory(place)
    assert str(caught.value).startswith(f"--against: {message}")

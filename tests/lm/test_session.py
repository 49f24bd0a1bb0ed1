"""The law of sessions: N bytes in one go are the same, bit for bit, as stopping, saving, loading and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from taylor_attention.core.locks import locked
from taylor_attention.core.storage import write_tensors
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.lm.session import Session, uninterrupted
from taylor_attention.nn import LanguageModel, ModelConfig

PROMPT = "Où est la mémoire constante ? ".encode() * 5  # 160 bytes


def build(attention: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> LanguageModel:
    torch.manual_seed(seed)
    config = ModelConfig(d_model=16, num_layers=2, num_heads=2, attention=attention, **options)  # type: ignore[arg-type]
    return LanguageModel(config).to(dtype).eval()


@pytest.fixture(params=["taylor", "softmax", "window", "convolution"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "window":
        return build("taylor", window=24, sinks=2, heavy=4)
    if request.param == "convolution":
        return build("taylor", conv=4, decay="token")
    return build(request.param)


def write(session: Session, count: int) -> bytes:
    return bytes(session.stream(count, temperature=0.9, top_k=200, top_p=0.98))


def assert_same(one: Session, other: Session) -> None:
    """Everything that the next byte depends on is equal, bit for bit."""
    assert one.tokens == other.tokens
    assert one.logits is not None and other.logits is not None
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    for mine, theirs in zip(one.states, other.states, strict=True):
        mine, theirs = mine.tensors(), theirs.tensors()
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stops", [[0], [1, 2, 3], [37], [63, 64, 65, 99]])
def test_stopping_and_going_on_is_one_go(model: LanguageModel, tmp_path: Path, stops: list[int]):
    whole = Session(model, seed=4)
    whole.read(PROMPT)
    expected = write(whole, 100)

    path = tmp_path / "text.session"
    parted = Session(model, seed=4)
    parted.read(PROMPT)
    got = b""
    for stop in [*stops, 100]:
        parted.save(path)
        parted = Session.load(path, model)
        got += write(parted, stop - len(got))
    assert got == expected
    assert_same(parted, whole)


def test_going_on_is_exact_in_float64(tmp_path: Path):
    model = build("taylor", dtype=torch.float64)
    session = Session(model)
    session.read(PROMPT)
    session.save(tmp_path / "s")
    other = Session.load(tmp_path / "s", model)
    assert write(session, 40) == write(other, 40)
    assert_same(session, other)


def test_a_prompt_after_loading_is_appended(model: LanguageModel, tmp_path: Path):
    session = Session(model, seed=2)
    session.read(PROMPT)
    first = write(session, 10)
    session.save(tmp_path / "s")
    session.read(b"more")
    other = Session.load(tmp_path / "s", model)
    other.read(b"more")
    assert other.tokens == len(PROMPT) + len(first) + 4
    assert_same(session, other)


def test_reading_in_parts_is_reading_at_once(model: LanguageModel):
    one, other = Session(model), Session(model)
    one.read(PROMPT)
    other.read(PROMPT[:31], block=8)
    other.read(PROMPT[31:])
    assert one.logits is not None and other.logits is not None
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_saving_changes_nothing(model: LanguageModel, tmp_path: Path):
    session, other = Session(model), Session(model)
    for each in (session, other):
        each.read(PROMPT)
    session.save(tmp_path / "s")
    assert write(session, 20) == write(other, 20)


def test_a_saved_session_has_a_fixed_size_under_taylor(tmp_path: Path):
    session = Session(build("taylor"))
    session.read(PROMPT)
    session.save(tmp_path / "short")
    write(session, 200)
    session.save(tmp_path / "long")
    # The header is padded text: digits of a count may move it by a few bytes.
    assert abs((tmp_path / "long").stat().st_size - (tmp_path / "short").stat().st_size) <= 64


def test_seed_unshown_bytes_and_an_unread_session_are_kept(model: LanguageModel, tmp_path: Path):
    session = Session(model, seed=-7)
    session.unshown = b"\xc3"
    session.save(tmp_path / "s")
    other = Session.load(tmp_path / "s", model)
    assert (other.seed, other.unshown, other.tokens, other.logits) == (-7, b"\xc3", 0, None)


def test_other_seeds_write_other_texts(model: LanguageModel):
    texts = set()
    for seed in (1, 2):
        session = Session(model, seed=seed)
        session.read(PROMPT)
        texts.add(write(session, 30))
    assert len(texts) == 2


@pytest.mark.parametrize("other", [{"seed": 1}, {"degree": 4}, {"attention": "softmax"}])
def test_a_session_of_another_model_is_refused(tmp_path: Path, other: dict[str, object]):
    session = Session(build("taylor"))
    session.read(PROMPT)
    session.save(tmp_path / "s")
    with pytest.raises(StorageError, match="another model"):
        Session.load(tmp_path / "s", build(**{"attention": "taylor", **other}))  # type: ignore[arg-type]


def test_a_damaged_session_is_refused(model: LanguageModel, tmp_path: Path):
    session = Session(model)
    session.read(PROMPT)
    session.save(tmp_path / "s")
    content = bytearray((tmp_path / "s").read_bytes())
    content[-5] ^= 1
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(StorageError, match="digest"):
        Session.load(tmp_path / "s", model)


def test_a_file_of_another_kind_is_refused(model: LanguageModel, tmp_path: Path):
    write_tensors(tmp_path / "s", {"x": torch.zeros(1)}, kind="model", metadata={})
    with pytest.raises(StorageError, match="kind"):
        Session.load(tmp_path / "s", model)


def test_a_file_that_lacks_parts_is_refused(model: LanguageModel, tmp_path: Path):
    write_tensors(tmp_path / "s", {"x": torch.zeros(1)}, kind="session", metadata={})
    with pytest.raises(StorageError, match="lacks"):
        Session.load(tmp_path / "s", model)


def test_an_empty_text_and_an_empty_session_are_refused(model: LanguageModel):
    session = Session(model)
    with pytest.raises(ArgumentError, match=r"^text: expected at least one byte"):
        session.read(b"")
    with pytest.raises(ArgumentError, match=r"^session: expected a text"):
        session.step()


def test_a_model_over_other_symbols_is_refused():
    with pytest.raises(ArgumentError, match=r"^model: expected"):
        Session(build("softmax", vocab_size=100))


def test_an_interrupt_waits_for_the_end_of_the_step(model: LanguageModel):
    session, other = Session(model), Session(model)
    for each in (session, other):
        each.read(PROMPT)
    inner, calls = model.decode_, []

    def interrupting(*args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGINT))  # arrives in the middle of the step
        return inner(*args, **kwargs)

    model.decode_ = interrupting  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.step()
    del model.decode_
    other.step()
    assert len(calls) == 1
    assert_same(session, other)


def test_uninterrupted_blocks_nest_and_restore_the_handler():
    handler, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_uninterrupted_works_outside_the_main_thread():
    reached: list[bool] = []

    def run() -> None:
        with uninterrupted():
            reached.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reached == [True]


HOLD = """
import sys
from taylor_attention.core.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_and_a_crash_frees_the_lock(tmp_path: Path):
    path = tmp_path / "s"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match="in use by another process"), locked(path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(path):
        assert (tmp_path / "s.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_in_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot be locked"), locked(tmp_path / "none" / "s"):
        pass

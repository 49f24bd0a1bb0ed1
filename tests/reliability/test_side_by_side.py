"""The same call gives the same bits: again, on another number of threads, beside others, in another process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import KERNELS, built, selected
from problems import decode, make

TESTS = Path(__file__).parents[1]
SINGLE = torch.float32

KINDS: dict[str, dict[str, Any]] = {  # large enough to be shared out among threads, and to be cut into chunks
    "plain": {"batch": 2, "heads": 3, "length": 600, "head_dim": 16, "value_dim": 11},
    "one row": {"heads": 1, "length": 900, "head_dim": 16, "value_dim": 7, "degree": 3},
    "groups": {"heads": 6, "kv_heads": 2, "length": 400, "head_dim": 24, "value_dim": 5},
    "double": {"heads": 3, "length": 400, "head_dim": 16, "value_dim": 16, "dtype": torch.float64},
    "decay and holes": {"heads": 3, "length": 400, "head_dim": 16, "value_dim": 8, "decay": "soft", "mask": "holes"},
    "all": {"heads": 4, "kv_heads": 1, "length": 400, "queries": 300, "head_dim": 16, "value_dim": 8, "causal": False},
    "near": {"heads": 3, "length": 400, "head_dim": 16, "value_dim": 8, "window": 20, "sinks": 3, "decay": "soft"},
    "heavy": {"heads": 2, "length": 120, "head_dim": 16, "value_dim": 8, "window": 15, "heavy": 5},
    "fitted": {"heads": 2, "length": 400, "head_dim": 16, "value_dim": 8, "window": 20, "reading": "fitted"},
}
LARGE_STATE = {"heads": 8, "head_dim": 32, "value_dim": 32, "degree": 3, "length": 3}  # a step is shared out too


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem_of(**sizes: Any) -> Any:
    return make(**{"dtype": SINGLE, **sizes})


def attend(sizes: dict[str, Any], backend: str, threads: int) -> list[Tensor]:
    """Output, state and gradients of a call."""
    torch.set_num_threads(threads)
    problem = problem_of(**sizes).recorded()
    y, state = problem.solve(backend=backend, return_state=True)
    (y.square().sum() + state.moments.square().sum()).backward()
    return [y.detach(), *state.detach().tensors().values(), *(x.grad for x in problem.inputs)]


def continue_(sizes: dict[str, Any], backend: str, threads: int) -> list[Tensor]:
    """Outputs and state of decoding one token after the other, over a few folds of the tail."""
    torch.set_num_threads(threads)
    problem = problem_of(**sizes)
    y, state = decode(problem.part(0, min(problem.length, 48)), backend=backend)
    return [y, *state.tensors().values()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


WAYS = [attend, continue_]
CASES = [(way, kind) for way in WAYS for kind in KINDS if not (way is continue_ and kind == "all")]
each_case = pytest.mark.parametrize(("way", "kind"), CASES, ids=[f"{way.__name__}, {kind}" for way, kind in CASES])


# ---- again, and on other numbers of threads --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decay and holes", "heavy"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_call_twice_gives_the_same_bits(way: Callable[..., list[Tensor]], kind: str):
    """PyTorch's own products, on as many threads; on another number, their sums are cut differently."""
    assert same(way(KINDS[kind], "torch", 2), way(KINDS[kind], "torch", 2))


@each_case
@built
def test_the_kernels_give_the_same_bits_again_and_on_any_number_of_threads(way: Callable[..., list[Tensor]], kind: str):
    expected = way(KINDS[kind], "cpu", 1)
    assert [same(way(KINDS[kind], "cpu", threads), expected) for threads in (1, 2, 3)] == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("row", KERNELS[1:])
@each_case
def test_so_do_those_of_other_instruction_sets(way: Callable[..., list[Tensor]], kind: str, row: str):
    with selected(row) as backend:
        expected = way(KINDS[kind], backend, 1)
        assert [same(way(KINDS[kind], backend, threads), expected) for threads in (2, 3)] == [True, True]


@built
def test_a_step_that_threads_share_gives_the_same_bits():
    expected = continue_(LARGE_STATE, "cpu", 1)
    assert [same(continue_(LARGE_STATE, "cpu", threads), expected) for threads in (2, 3)] == [True, True]


# ---- several Python threads, each with a state of its own ------------------------------------------------------------


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let Python change threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=built)])
@pytest.mark.parametrize("way", WAYS)
def test_beside_others_is_as_alone(
    way: Callable[..., list[Tensor]], backend: str, threads: int, monkeypatch: pytest.MonkeyPatch
):
    """Sizes that no other test has: what is made once for each is made by several threads at the same time."""
    monkeypatch.setattr("taylor_attention.ops.decode._KNOWN_LIMIT", 2)  # what is remembered is forgotten on the way
    common = {"heads": 3, "length": 50, "head_dim": 11 + threads, "value_dim": 6, "degree": 2, "decay": "soft"}
    jobs = [{**common, "seed": seed, "window": seed % 2 * 9} for seed in range(6)]
    start = threading.Barrier(3)

    def work(part: int) -> list[list[Tensor]]:
        start.wait(60)
        return [way(job, backend, threads) for job in jobs[part::3]]

    with ThreadPoolExecutor(3) as pool:
        beside = list(pool.map(work, range(3)))
    alone = [[way(job, backend, threads) for job in jobs[part::3]] for part in range(3)]
    pairs = [pair for found, expected in zip(beside, alone, strict=True) for pair in zip(found, expected, strict=True)]
    assert len(pairs) == len(jobs)
    assert all(same(found, expected) for found, expected in pairs)


# ---- other processes -------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, sys, warnings
    sys.path[:0] = [{tests!r}, {tests!r} + "/reliability"]
    import torch
    from problems import decode
    from test_side_by_side import KINDS, LARGE_STATE, Work, attend, problem_of, same
    from torch.utils.data import DataLoader

    def in_child(work):  # whether a forked child comes to its end, and finds what its parent finds
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = work()
            finally:
                os._exit(0 if good else 1)
        return os.waitpid(child, 0)[1] == 0

    if __name__ == "__main__":
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of fork beside threads
        torch.set_num_threads(2)
        torch.ones(2000, 1000).exp()  # now there are threads, which a child does not have
"""


class Work(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Attention, its gradients and decoding, as a data set would use them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        way = attend if index % 2 else continue_
        return [x.double() for x in way({**KINDS["plain"], "seed": index}, self.backend, torch.get_num_threads())]


def run(script: str) -> str:
    """What a script prints; a hang is a failure."""
    code = textwrap.dedent(SCRIPT.format(tests=str(TESTS))) + textwrap.indent(textwrap.dedent(script), "    ")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=TESTS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


unix = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")


@unix
@built
def test_a_forked_child_decodes_and_with_one_thread_does_everything():
    """Its parent has used threads. PyTorch's own operations would wait for them for ever: see docs/reliability.md."""
    shown = run("""
        problem = problem_of(**LARGE_STATE)
        expected, own = decode(problem, backend="cpu")[0], problem.new_state()
        whole = {backend: attend(KINDS["plain"], backend, 1) for backend in ("cpu", "torch")}
        torch.set_num_threads(2)
        print(in_child(lambda: torch.equal(decode(problem, state=own, backend="cpu")[0], expected)))
        print(in_child(lambda: same(attend(KINDS["plain"], "cpu", 1), whole["cpu"])))
        print(in_child(lambda: same(attend(KINDS["plain"], "torch", 1), whole["torch"])))
    """)
    assert shown == "True\nTrue\nTrue\n"


def in_workers(backend: str, context: str) -> str:
    return run(f"""
        alone = [Work({backend!r})[index] for index in range(4)]
        workers = DataLoader(Work({backend!r}), batch_size=None, num_workers=2, multiprocessing_context={context!r})
        torch.set_num_threads(1)
        one = [Work({backend!r})[index] for index in range(4)]
        torch.set_num_threads(2)
        found = list(workers)
        print([same(*pair) for pair in zip(found, one)])
    """)


@unix
@built
def test_workers_of_a_data_loader_find_what_their_parent_finds():
    assert in_workers("cpu", "fork") == "[True, True, True, True]\n"


@unix
@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=built)])
def test_workers_of_a_data_loader_however_they_begin(backend: str, context: str):
    assert in_workers(backend, context) == "[True, True, True, True]\n"

"""Who computes: the choice by itself, the choice by name, and what is said where the kernels are not there."""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import taylor_attention as ta
import taylor_attention.ops as ops
from kernels import EITHER, INSTRUCTIONS, MODULE, built
from problems import decode, differences, make
from taylor_attention.errors import ArgumentError, BackendWarning
from taylor_attention.ops import backends, chunked, compiled
from tolerances import TOLERANCE, relative_error


@pytest.fixture
def asked(monkeypatch):
    """The backends that compute while a test runs, in order: (module, pass)."""
    calls = []

    def watch(module, name):
        function = getattr(module, name)

        def watched(*arguments):
            calls.append((module.__name__.rpartition(".")[2], name))
            return function(*arguments)

        monkeypatch.setattr(module, name, watched)

    for module in (chunked, compiled):
        watch(module, "forward")
        watch(module, "backward")
    watch(compiled, "decode_")
    return calls


# ---- the choice ------------------------------------------------------------------------------------------------------

NAMED = pytest.mark.parametrize(
    ("name", "module"),
    [("torch", "chunked"), pytest.param("cpu", "compiled", marks=built), pytest.param("auto", "compiled", marks=built)],
)


@NAMED
@pytest.mark.parametrize("packed", [False, True])
def test_the_backend_asked_for_computes_both_passes(asked, name, module, packed):
    """Also for the normaliser's check (an odd degree with gates), a second call of its own."""
    problem = make(length=12, degree=3, decay="soft").recorded()
    borders = torch.tensor([0, 12], dtype=torch.int32) if packed else None
    problem.solve(backend=name, cu_seqlens=borders).sum().backward()
    assert asked == [(module, "forward"), (module, "forward"), (module, "backward")]


@NAMED
def test_the_backend_asked_for_decodes(asked, name, module):
    problem = make(length=3)
    decode(problem, backend=name)
    assert asked == ([("compiled", "decode_")] * 3 if module == "compiled" else [])
    decode(problem, 3, backend=name)
    assert asked[-1] == (module, "forward")


@EITHER
def test_what_auto_stands_for_in_the_tests(asked, auto):
    """The suites that do not name a backend run with each."""
    module = {"torch": "chunked", "cpu": "compiled"}[auto]
    problem = make(length=12)
    problem.recorded().solve().sum().backward()
    decode(problem)
    assert asked[:2] == [(module, "forward"), (module, "backward")]
    assert len(asked) == 2 + (problem.length if auto == "cpu" else 0)


@built
def test_other_devices_are_left_to_pytorch_by_themselves(asked):
    problem = make(length=12).each(lambda x: x.to("meta"))
    assert problem.solve().device.type == "meta"
    assert asked == []


CALLS = {
    "attention": lambda p, s: p.solve(backend="cpu"),
    "with a state": lambda p, s: p.solve(backend="cpu", state=s, return_state=True),
    "one token": lambda p, s: p.part(0, 1).decode_(s, backend="cpu"),
    "more tokens": lambda p, s: p.decode_(s, backend="cpu"),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_kernels_asked_for_by_name_on_another_device_are_refused_with_the_reason(call):
    problem = make(length=12).each(lambda x: x.to("meta"))
    state = ta.State.zeros(1, 2, 4, 3, 2, dtype=torch.float64, device="meta")
    with pytest.raises(
        ArgumentError,
        match="^backend: expected one that can compute here, got 'cpu': the compiled kernels run on CPUs, not on meta$",
    ):
        CALLS[call](problem, state)
    assert state.tail_length == 0


DEFAULT_DEVICE = """
import torch, taylor_attention as ta
torch.manual_seed(0)
x = torch.randn(1, 2, 20, 4, dtype=torch.float64, requires_grad=True)
state = ta.State.zeros(1, 2, 4, 4, 2, dtype=torch.float64)
rows = x.detach().split(1, 2)
with torch.device("meta"):  # what tensors without a device of their own are made on
    y = ta.attention(x, x, x, degree=2, chunk_size=8, backend="{name}")
    y.sum().backward()
    steps = torch.cat([ta.decode_(row, row, row, state, backend="{name}") for row in rows], 2)
    ta.decode_(x.detach()[:, :, :3], x.detach()[:, :, :3], x.detach()[:, :, :3], state, backend="{name}")
torch.testing.assert_close(steps, y)
print(x.grad.isfinite().all().item(), state.tokens.tolist())
"""


@pytest.mark.parametrize("name", ["torch", pytest.param("cpu", marks=built)])
def test_another_default_device_changes_nothing(name):
    """In a process of its own: the first call, and whatever happens."""
    code = DEFAULT_DEVICE.format(name=name)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout == "True [23]\n", run.stderr


# ---- where the kernels are not built ---------------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch):
    """As if the compiled part had not been built."""
    monkeypatch.setitem(sys.modules, "taylor_attention.ops._kernels", None)
    monkeypatch.delattr(ops, "_kernels", raising=False)
    compiled._load.cache_clear()
    backends._tell_once.cache_clear()
    yield
    compiled._load.cache_clear()
    backends._tell_once.cache_clear()


def test_without_the_kernels_pytorch_computes_and_one_warning_says_so(missing):
    problem = make(length=20, dtype=torch.float32)
    with pytest.warns(
        BackendWarning, match="the compiled kernels are not installed .*PyTorch's own products"
    ) as caught:
        y, state = problem.solve(return_state=True)
        again, other = decode(problem)
        problem.recorded().solve().sum().backward()
    assert len(caught) == 1
    assert torch.equal(y, problem.solve(backend="torch"))
    assert torch.equal(again, decode(problem, backend="torch")[0])
    assert state.tokens.tolist() == other.tokens.tolist()


def test_named_backends_never_warn_where_the_kernels_are_missing(missing):
    """And the warning is not used up: whoever takes the default later still hears it."""
    problem = make(length=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = problem.solve(backend="torch")
    assert caught == []
    assert relative_error(y, problem.oracle()) < TOLERANCE[torch.float64]
    with pytest.warns(BackendWarning):
        problem.solve()


@pytest.mark.parametrize("call", CALLS)
def test_without_the_kernels_asking_for_them_is_one_clear_error(missing, call):
    problem = make(length=20)
    _, state = decode(problem.part(0, 3), backend="torch")
    before = state.clone()
    with pytest.raises(ArgumentError, match="^backend: expected one that can compute here, got 'cpu': the compiled "):
        CALLS[call](problem, state)
    assert differences(state, before) == []


PROCESS = """
import sys, warnings
sys.modules["taylor_attention.ops._kernels"] = None
import torch, taylor_attention as ta
x = torch.randn(1, 2, 9, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y, state = ta.attention(x, x, x, degree=2, return_state=True)
        y.sum().backward()
        with torch.no_grad():
            ta.decode_(x[:, :, :1], x[:, :, :1], x[:, :, :1], state.detach())
print([w.category.__name__ for w in caught])
"""


def test_a_process_is_told_once():
    run = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout == "['BackendWarning']\n", run.stderr


# ---- the module ------------------------------------------------------------------------------------------------------


@built
def test_every_machine_has_the_baseline():
    assert INSTRUCTIONS[-1] == "baseline"
    assert set(INSTRUCTIONS) <= {"avx512", "avx2", "baseline"}


@built
def test_an_instruction_set_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="no such target on this machine: riscv"):
        MODULE.use("riscv")


@built
@pytest.mark.parametrize("function", ["forward", "backward", "decode", "fold"])
@pytest.mark.parametrize("count", [0, 6, 100])
def test_another_number_of_arguments_computes_nothing(function, count):
    """They are addresses: a call that does not fit must not begin."""
    with pytest.raises(TypeError, match=f"expected [0-9]+ numbers, got {count}"):
        getattr(MODULE, function)(*[1] * count)


@built
@pytest.mark.parametrize("count", [0, 2, 100])
def test_a_step_is_planned_for_tensors_alone(count):
    with pytest.raises(TypeError, match="expected (2 tuples and numbers, got 0|tensors of plain memory)"):
        MODULE.plan(*[1] * count)
    plan = MODULE.plan((), (), *[1] * 32)
    assert MODULE.decode(plan, (torch.zeros(1),), (), 0, 0) is None
    assert MODULE.decode(plan, (1,), (), 0, 0) is None  # addresses look alike, but there are as many
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        MODULE.decode(*[1] * 5)


@built
def test_threads_of_python_may_compute_at_the_same_time():
    """The kernels run without the interpreter's lock."""
    problems = [make(length=200, head_dim=8, degree=3, seed=seed) for seed in range(4)]
    expected = [decode(p, 100)[0] for p in problems] + [decode(p.part(0, 40))[0] for p in problems]
    together = threading.Barrier(8)

    def work(job):
        together.wait()
        return job()

    jobs = [lambda p=p: decode(p, 100)[0] for p in problems] + [lambda p=p: decode(p.part(0, 40))[0] for p in problems]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, jobs))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 8


FEWER_THREADS = """
import torch, taylor_attention as ta
query, key, value = torch.randn(3, 4, 8, 200, 8).unbind(0)
torch.set_num_threads(1)
expected = ta.attention(query, key, value, degree=2, backend="cpu")
torch.set_num_threads(2)
print(torch.equal(ta.attention(query, key, value, degree=2, backend="cpu"), expected))
"""


@built
def test_fewer_threads_than_asked_for_do_all_tasks():
    """Each thread has tasks of its own: those of a thread that does not come are done by the others."""
    run = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.stdout == "True\n", run.stderr


OUT_OF_MEMORY = """
import resource, torch, taylor_attention as ta
torch.set_num_threads({threads})
query, value = torch.randn(1, 1, 4, 3000) / 50, torch.randn(1, 1, 4, 255)
expected = ta.attention(query, query, value, degree=2, backend="cpu")  # in one chunk: scores alone
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
try:
    ta.attention(query, query, value, degree=2, backend="cpu", chunk_size=2, max_state_bytes=2**40)  # 4.6 GB
except MemoryError:
    print("MemoryError")
print(torch.equal(ta.attention(query, query, value, degree=2, backend="cpu"), expected))
"""


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and counts memory as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_is_not_there_is_an_error_and_no_crash(threads):
    code = OUT_OF_MEMORY.format(threads=threads)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.stdout == "MemoryError\nTrue\n", run.stderr

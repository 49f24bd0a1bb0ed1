"""What PyTorch does with the operator: compile it, trace it, check it, run it on another device."""

import shutil
from dataclasses import replace

import pytest
import torch

import taylor_attention as ta
from kernels import EITHER, built
from problems import Problem, make
from taylor_attention.ops.operator import attend, attend_backward
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="PyTorch's default compiler calls a C++ compiler"
)


def answer_of(problem, function, state):
    """Outputs, moments and counts; and the gradients of both by the inputs and by the sums of the state."""
    leaves, sums = problem.recorded(), state.sums.clone().requires_grad_()
    y, after = function(leaves, replace(state, sums=sums))
    loss = y.square().sum() + after.moments.sum()
    return y, after.moments, after.tokens, *torch.autograd.grad(loss, (*leaves.inputs, sums))


def solve(problem: Problem, state: ta.State):
    return problem.solve(state=state, return_state=True, chunk_size=8)


@EITHER
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by inductor itself
@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=needs_compiler), "aot_eager"])
def test_compiled_attention_is_the_same_with_a_state_in_and_out_and_its_backward(compiler):
    torch._dynamo.reset()
    problem = make(batch=2, heads=4, kv_heads=2, length=30, mask="holes", decay="hard")
    _, state = make(batch=2, heads=4, kv_heads=2, length=9, seed=1).solve(return_state=True)
    compiled = torch.compile(solve, fullgraph=True, backend=compiler)
    found, expected = answer_of(problem, compiled, state), answer_of(problem, solve, state)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < EXACT


def with_a_literal_degree(query, key, value, degree):
    return ta.attention(query, key, value, degree=2)


def with_a_degree_of_the_caller(query, key, value, degree):
    return ta.attention(query, key, value, degree=degree)


@pytest.mark.parametrize("function", [with_a_literal_degree, with_a_degree_of_the_caller])
def test_compiled_attention_takes_any_length_without_a_new_graph(function):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    problems = [make(length=length) for length in (30, 17, 41)]
    errors = [relative_error(compiled(*problem.arguments, 2), problem.oracle()) for problem in problems]
    assert max(errors) < EXACT
    assert len(graphs) == 1


def test_compiled_packed_attention_is_the_same():
    torch._dynamo.reset()
    cu_seqlens = torch.tensor([0, 5, 5, 30], dtype=torch.int32)
    problem = make(length=30)
    compiled = torch.compile(lambda p, c: p.solve(cu_seqlens=c, return_state=True), fullgraph=True, backend="aot_eager")
    (y, state), (expected, after) = (
        compiled(problem, cu_seqlens),
        problem.solve(cu_seqlens=cu_seqlens, return_state=True),
    )
    assert torch.equal(y, expected)
    assert torch.equal(state.moments, after.moments)
    assert torch.equal(state.tokens, after.tokens)


def test_inside_a_graph_an_unsafe_normaliser_gives_nan_rows_even_in_training():
    torch._dynamo.reset()
    problem = make(length=24, degree=3, radius=8.0).recorded()
    y = torch.compile(lambda p: p.solve(), fullgraph=True, backend="aot_eager")(problem)
    kernel = ta.series.EXP.coefficients(3)
    scores = problem.query @ problem.key.transpose(-1, -2) / 2
    normaliser = sum(c * scores**p for p, c in enumerate(kernel)).tril().sum(-1)
    unsafe = normaliser <= 1e-3 * torch.arange(1, 25)
    assert bool(unsafe.any())
    assert torch.equal(y.isnan(), unsafe[..., None].expand_as(y))


# ---- the operators ---------------------------------------------------------------------------------------------------

PATTERNS = {
    "plain": {},
    "state": {"state": True},
    "state, all": {"state": True, "causal": False},
    "mask and decay": {"mask": "holes", "decay": "hard"},
    "groups, kept": {"heads": 4, "kv_heads": 2, "keep": True},
    "cross, kept": {"causal": False, "queries": 5, "keep": True},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 12], dtype=torch.int32)},
    "packed, kept": {"cu_seqlens": torch.tensor([0, 5, 5, 12], dtype=torch.int32), "keep": True, "decay": "hard"},
    "nothing": {"length": 0, "keep": True},
}
EACH = pytest.mark.parametrize("name", ["torch", pytest.param("cpu", marks=built)])


def arguments(pattern, name, recorded=True):
    """What the operator takes, for a pattern and a backend's name."""
    options = dict(PATTERNS[pattern])
    keep, cu_seqlens, with_state = (options.pop(name, None) for name in ("keep", "cu_seqlens", "state"))
    problem = make(**{"length": 12, **options})
    problem = problem.recorded() if recorded else problem
    sums = compensation = None
    if with_state:
        sums, compensation = torch.randn(2, 1, 2, 4, 15, dtype=torch.float64) * torch.tensor([1, 1e-9]).view(
            2, 1, 1, 1, 1
        )
        sums = sums.requires_grad_(recorded)
    tensors = (*problem.arguments, problem.along.get("key_padding_mask"), problem.along.get("log_decay"), cu_seqlens)
    causal = problem.options.get("causal", True)
    return *tensors, sums, compensation, (1.0, 1.0, 0.5), causal, 4, bool(keep or with_state), name, True


@pytest.mark.parametrize("pattern", PATTERNS)
@EACH
def test_the_operator_passes_pytorchs_own_checks(name, pattern):
    found = torch.library.opcheck(attend, arguments(pattern, name))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("pattern", PATTERNS)
@EACH
def test_the_backward_operator_passes_pytorchs_own_checks(name, pattern):
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(attend_backward, backward_arguments(pattern, name), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


def backward_arguments(pattern, name):
    """What the operator of the backward pass takes after `attend`."""
    given = arguments(pattern, name, recorded=False)
    *tensors, coefficients, causal, chunk, keep, _, _ = given
    out, end, _, history = attend(*given)
    of_end = (torch.ones_like(end), end) if keep else (None, None)
    kept = history if history.numel() else None
    return torch.ones_like(out), of_end[0], out, of_end[1], *tensors, kept, coefficients, causal, chunk, name


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("operator", "arguments_of"), [(attend, arguments), (attend_backward, backward_arguments)])
@EACH
def test_the_operators_change_none_of_their_inputs(name, operator, arguments_of, pattern):
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments_of(pattern, name)]
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
    operator(*given)
    pairs = [(x, b) for x, b in zip(given, before, strict=True) if isinstance(x, torch.Tensor)]
    assert [torch.equal(x, b) for x, b in pairs] == [True] * len(pairs)


# ---- other devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [{}, {"heads": 4, "kv_heads": 2, "causal": False, "queries": 5}], ids=["causal", "cross"]
)
def test_shapes_are_known_without_computing(sizes):
    """On the device that has no numbers."""
    problem = make(length=12, **sizes)
    y, state = problem.each(lambda x: x.to("meta")).solve(return_state=True)
    expected, after = problem.solve(return_state=True)
    assert (y.device.type, y.shape, y.dtype) == ("meta", expected.shape, expected.dtype)
    assert (state.moments.shape, state.tokens.shape) == (after.moments.shape, after.tokens.shape)


def test_any_device_that_pytorch_has(device_name):
    problem = make(batch=2, heads=4, kv_heads=2, length=70, mask="holes", decay="soft", dtype=torch.float32)
    moved = problem.each(lambda x: x.to(device_name))
    moved = replace(moved, along={name: x.to(device_name) for name, x in moved.along.items()})
    y, state = moved.solve(return_state=True, chunk_size=16)
    assert (y.device.type, state.device.type) == (device_name, device_name)
    assert relative_error(y, problem.oracle()) < TOLERANCE[torch.float32]


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def device_name(request):
    """Where to compute."""
    return request.param

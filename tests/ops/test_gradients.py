"""Gradients: finite differences, autograd through the specification, the law, and what is kept in memory."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import taylor_attention as ta
from kernels import EITHER
from problems import carry, decode, make
from taylor_attention.core.basis import feature_count
from taylor_attention.ops import chunked, compiled
from taylor_attention.ops.tiling import Tiling
from tolerances import TOLERANCE, relative_error

pytestmark = EITHER

EXACT = TOLERANCE[torch.float64]

KINDS = {
    "causal": {},
    "groups": {"heads": 4, "kv_heads": 2},
    "holes": {"mask": "holes"},
    "a hidden row": {"mask": "row 0 hidden"},
    "decay": {"decay": "hard"},
    "resets": {"decay": "resets"},
    "decay and holes": {"decay": "hard", "mask": "holes", "heads": 4, "kv_heads": 2},
    "all": {"causal": False},
    "cross": {"causal": False, "queries": 5, "heads": 4, "kv_heads": 2},
    "cross, holes": {"causal": False, "queries": 50, "mask": "holes"},
    "degree 0": {"degree": 0},
    "degree 1": {"degree": 1},
    "odd degree, decay": {"degree": 3, "decay": "hard"},
    "degree 5, all": {"degree": 5, "causal": False},
    "series": {"degree": 4, "radius": 0.9, "series": ta.series.GEOMETRIC, "scale": 0.4},
}


def problem_of(kind, **sizes):
    return make(**{"batch": 2, "length": 23, **KINDS[kind], **sizes})


def weigh(problem):
    """A fixed direction in the space of outputs, of numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*problem.query.shape[:3], problem.value.shape[3], generator=generator).bfloat16().double()


def gradients(problem, answer, of_state=None):
    """Of the outputs (and moments) that `answer` gives for fresh leaves, by every input, as one vector per input."""
    leaves = problem.recorded()
    found = answer(leaves)
    y, state = found if isinstance(found, tuple) else (found, None)
    loss = (y.double() * weigh(problem)).sum()
    if of_state is not None:
        loss = loss + (state.moments.double() * of_state).sum()
    return torch.autograd.grad(loss, leaves.inputs, materialize_grads=True)


def errors(found, expected):
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


# ---- finite differences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["causal", "decay and holes", "all", "cross", "degree 0", "odd degree, decay", "series"]
)
@pytest.mark.parametrize(
    ("chunk", "length", "fast"),
    [(None, 7, True), (3, 7, True), (2, 3, False)],
    ids=["one chunk", "chunks", "every entry"],
)
def test_gradcheck(kind, chunk, length, fast):
    queries = {"cross": 2}.get(kind, length)
    problem = problem_of(kind, batch=1, length=length, head_dim=2, value_dim=2, queries=queries).recorded()

    def answer(query, key, value, log_decay=None):
        along = problem.along if log_decay is None else {**problem.along, "log_decay": log_decay}
        given = replace(problem, query=query, key=key, value=value, along=along)
        y, state = given.solve(return_state=True, chunk_size=chunk)
        return y, state.moments

    assert torch.autograd.gradcheck(answer, problem.inputs, fast_mode=fast)


@pytest.mark.parametrize("kind", ["causal", "decay and holes", "cross", "odd degree, decay"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_gradcheck_with_a_state_before(kind, chunk):
    sizes = {"batch": 1, "head_dim": 2, "value_dim": 2}
    problem = problem_of(kind, length=6, queries=4 if kind == "cross" else 6, **sizes).recorded()
    _, start = problem_of(kind, length=5, seed=1, **{**sizes, "queries": 5}).solve(return_state=True)
    leaf = start.sums.detach().clone().requires_grad_()

    def answer(sums, query, key, value, log_decay=None):
        along = problem.along if log_decay is None else {**problem.along, "log_decay": log_decay}
        given = replace(problem, query=query, key=key, value=value, along=along)
        y, state = given.solve(state=replace(start, sums=sums), return_state=True, chunk_size=chunk)
        return y, state.moments

    assert torch.autograd.gradcheck(answer, (leaf, *problem.inputs), fast_mode=True)


# ---- the specification -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_gradients_are_those_of_the_specification(kind, chunk):
    problem = problem_of(kind)
    expected = gradients(problem, lambda p: p.oracle())
    assert max(errors(gradients(problem, lambda p: p.solve(chunk_size=chunk)), expected)) < 10 * EXACT


CUTS = {
    "small tiles": Tiling(chunk=16, rows=5, together=64, direct=False),
    "row by row": Tiling(chunk=6, rows=4, together=1, direct=False),
    "rows in threes": Tiling(chunk=64, rows=64, together=3, direct=False),
    "scores alone": Tiling(chunk=64, rows=5, together=3, direct=True),
}


@pytest.mark.parametrize("kind", ["causal", "decay and holes", "all", "cross", "cross, holes"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("keep", [False, True], ids=["output", "output and state"])
def test_gradients_however_the_work_is_cut(kind, cut, keep, monkeypatch):
    problem = problem_of(kind)
    of_state = torch.ones(()) if keep else None
    expected = gradients(problem, lambda p: p.solve(chunk_size=8, return_state=True), of_state)
    monkeypatch.setattr(chunked, "choose", lambda *_, **__: CUTS[cut])
    monkeypatch.setattr(compiled, "choose", lambda *_, **__: CUTS[cut])
    found = gradients(problem, lambda p: p.solve(return_state=keep), of_state)
    assert max(errors(found, expected)) < 10 * EXACT


@pytest.mark.parametrize("degree", range(7))
@pytest.mark.parametrize("decay", [None, "hard"])
@pytest.mark.parametrize("length", [9, 150])
def test_single_precision_gradients(degree, decay, length):
    problem = make(heads=4, kv_heads=2, length=length, degree=degree, decay=decay, dtype=torch.float32)
    expected = gradients(problem.to(torch.float64), lambda p: p.oracle())
    found = gradients(problem, lambda p: p.solve(chunk_size=32))
    assert max(errors(found, expected)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "groups", "all"])
def test_half_precision_gradients_are_rounded_once(dtype, kind):
    problem = problem_of(kind, length=200, head_dim=8, value_dim=8, dtype=dtype)
    expected = gradients(problem.to(torch.float64), lambda p: p.oracle())
    found = gradients(problem, lambda p: p.solve())
    assert [f.dtype for f in found] == [dtype] * 3
    assert max(errors(found, expected)) < TOLERANCE[dtype]


# ---- the law ---------------------------------------------------------------------------------------------------------


def merged(problem):
    """Two parts begun from nothing and merged; a third goes on from them."""
    parts = [problem.part(a, b) for a, b in [(0, 6), (6, 13), (13, problem.length)]]
    states = [part.solve(return_state=True)[1] for part in parts[:2]]
    y, _ = carry(problem.part(0, 13), [6])
    rest, state = parts[2].solve(state=states[0].merge(states[1]), return_state=True)
    return torch.cat([y, rest], 2), state


WAYS = {
    "chunks of 1": lambda p: p.solve(return_state=True, chunk_size=1),
    "chunks of 5": lambda p: p.solve(return_state=True, chunk_size=5),
    "split in two": lambda p: carry(p, [11]),
    "split in many": lambda p: carry(p, [0, 1, 9, 9, 20], chunk_size=4),
    "merged, then continued": merged,
}


@pytest.mark.parametrize(
    "kind", ["causal", "groups", "holes", "decay", "resets", "decay and holes", "odd degree, decay"]
)
@pytest.mark.parametrize("way", WAYS)
def test_the_law_for_gradients(way, kind):
    problem = problem_of(kind)
    expected = gradients(problem, lambda p: p.solve(return_state=True, chunk_size=100), torch.ones(()))
    assert max(errors(gradients(problem, WAYS[way], torch.ones(())), expected)) < 10 * EXACT


@pytest.mark.parametrize("kind", ["causal", "all", "decay and holes", "odd degree, decay"])
def test_gradients_of_packed_sequences_are_those_of_each_alone(kind):
    borders = [0, 5, 5, 12, 13, 23]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    problem = problem_of(kind, batch=1)

    def one_by_one(p):
        found = [p.part(*cut).solve(return_state=True) for cut in pairwise(borders)]
        states = ta.State.from_tensors(
            {name: torch.cat([s.tensors()[name] for _, s in found]) for name in found[0][1].tensors()},
            found[0][1].metadata(),
        )
        return torch.cat([y for y, _ in found], 2), states

    def together(p):
        return p.solve(cu_seqlens=cu_seqlens, return_state=True, chunk_size=4)

    expected = gradients(problem, one_by_one, torch.ones(()))
    assert max(errors(gradients(problem, together, torch.ones(())), expected)) < 10 * EXACT


@pytest.mark.parametrize("kind", ["causal", "decay"])
def test_gradients_reach_the_moments_behind_a_tail(kind):
    """The state was decoded: some of its tokens wait in the tail, and their decay still fades the sums."""
    problem = problem_of(kind)
    _, state = decode(problem.part(0, 13))
    sums = state.sums.clone().requires_grad_()
    y = problem.part(13, 23).solve(state=replace(state, sums=sums))
    (found,) = torch.autograd.grad((y * weigh(problem)[:, :, 13:]).sum(), sums)

    step = 1e-6 * torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = [problem.part(13, 23).solve(state=replace(state, sums=state.sums + s * step)) for s in (1, -1)]
    difference = ((moved[0] - moved[1]) * weigh(problem)[:, :, 13:]).sum() / 2
    assert state.tail_length > 0
    assert float((found * step).sum()) == pytest.approx(float(difference), rel=1e-5)


# ---- where gradients go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_of_one_input_alone(wanted):
    problem = problem_of("decay")
    expected = gradients(problem, lambda p: p.solve())
    inputs = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(problem.inputs)]
    query, key, value, log_decay = inputs
    y = ta.attention(query, key, value, degree=2, log_decay=log_decay)
    (found,) = torch.autograd.grad((y * weigh(problem)).sum(), inputs[wanted])
    assert torch.equal(found, expected[wanted])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("causal", [True, False])
def test_hidden_keys_get_no_gradient_whatever_they_hold(bad, causal):
    problem = make(batch=2, length=23, mask="holes", causal=causal)
    hidden = ~problem.along["key_padding_mask"][:, None, :, None]
    filled = replace(problem, key=problem.key.masked_fill(hidden, bad), value=problem.value.masked_fill(hidden, bad))
    query, key, value = gradients(filled, lambda p: p.solve(chunk_size=8))
    assert [not x.masked_select(hidden).any() for x in (key, value)] == [True] * 2
    assert errors((query, key, value), gradients(problem, lambda p: p.solve(chunk_size=8))) == [0] * 3


def test_a_bad_sequence_spoils_no_gradient_of_another():
    problem = make(batch=3, length=23)
    spoiled = replace(problem, key=problem.key.index_fill(0, torch.tensor([1]), torch.nan))
    clean = gradients(problem, lambda p: p.solve(chunk_size=8))
    found = gradients(spoiled, lambda p: p.solve(chunk_size=8))
    assert [torch.equal(f[[0, 2]], c[[0, 2]]) for f, c in zip(found, clean, strict=True)] == [True] * 3


@pytest.mark.parametrize("sizes", [{"length": 0}, {"batch": 0}, {"causal": False, "queries": 0}], ids=str)
def test_gradients_of_nothing(sizes):
    problem = make(**{"batch": 2, "length": 5, **sizes}).recorded()
    problem.solve().sum().backward()
    assert [x.grad.shape for x in problem.inputs] == [x.shape for x in problem.inputs]
    assert [bool(x.grad.any()) for x in problem.inputs] == [False] * 3


def test_a_state_kept_for_later_carries_no_history_when_detached():
    problem = problem_of("causal").recorded()
    _, state = problem.solve(return_state=True)
    assert state.sums.requires_grad
    assert not problem.to(torch.float64).solve(state=state.detach()).requires_grad


def test_training_works_after_inference_mode_in_the_same_process():
    problem = make(head_dim=7, degree=4, length=40)  # a size of its own: inference mode fills the caches
    with torch.inference_mode():
        problem.solve(chunk_size=8)
        decode(problem.part(0, 3))
    expected = gradients(problem, lambda p: p.oracle())
    assert max(errors(gradients(problem, lambda p: p.solve(chunk_size=8)), expected)) < 10 * EXACT


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "decay"])
def test_activation_checkpointing_changes_nothing(kind):
    problem = problem_of(kind)

    def checkpointed(p):
        return checkpoint(
            lambda *inputs: replace(p, query=inputs[0]).solve(chunk_size=8), *p.inputs, use_reentrant=False
        )

    plain = gradients(problem, lambda p: p.solve(chunk_size=8))
    assert [torch.equal(a, b) for a, b in zip(gradients(problem, checkpointed), plain, strict=True)] == [True] * len(
        plain
    )


def saved_bytes(length, **sizes):
    """Bytes that one call keeps for its backward, each memory counted once."""
    problem = make(length=length, heads=2, head_dim=16, value_dim=16, degree=3, dtype=torch.float32, **sizes).recorded()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.solve(chunk_size=64, return_state=True)
    return sum(kept.values())


@pytest.mark.parametrize("decay", [None, "soft"])
def test_activations_grow_with_the_inputs_not_with_the_features(decay):
    grown = saved_bytes(512, decay=decay) - saved_bytes(256, decay=decay)
    per_token = grown / 256 / 2 / 4  # numbers per token and head
    assert per_token <= 6 * (16 + 16)
    assert per_token < feature_count(16, 3) / 5

"""`attend_near` beside its definition: a quadratic float64 computation of every pair."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from kernels import KERNELS
from taylor_attention.ops import near_compiled, near_torch
from taylor_attention.ops.near import attend_near, attend_near_backward, divide_near
from taylor_attention.ops.near_problem import Check
from taylor_attention.ops.normaliser import divide as divide_sums
from taylor_attention.ops.normaliser import find_unsafe
from tolerances import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float64]
SINGLE = TOLERANCE[torch.float32]

by_every_backend = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

NEVER = 10**9


@dataclass(frozen=True)
class Near:
    """The arguments of the operator, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    far: Tensor | None
    visible: Tensor | None
    log_decay: Tensor | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    sink_from: Tensor | None
    sink_until: Tensor | None
    sink_log_decay: Tensor | None
    window: int

    def attend(self, backend):
        return attend_near(*(getattr(self, field.name) for field in fields(self)), backend)

    def each(self, function):
        """The same problem with a function applied to its floating-point tensors."""
        changed = {
            field.name: function(x)
            for field in fields(self)
            if isinstance(x := getattr(self, field.name), Tensor) and x.is_floating_point()
        }
        return replace(self, **changed)

    def to(self, dtype):
        """In another accuracy; the log decay of the sinks is always float64."""
        changed = self.each(lambda x: x.to(dtype))
        return replace(changed, sink_log_decay=self.sink_log_decay)

    def recorded(self):
        return self.each(lambda x: x.detach().clone().requires_grad_())

    @property
    def leaves(self):
        found = (getattr(self, field.name) for field in fields(self))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def make(
    *,
    batch=1,
    heads=2,
    kv_heads=None,
    tokens=37,
    past=0,
    window=16,
    head_dim=4,
    value_dim=3,
    far=None,
    late=0,
    mask=False,
    decay=None,
    sinks=0,
    ending=False,
    size=1.0,
    seed=0,
):
    """A problem in float64; size: of the scores."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, keys = kv_heads or heads, past + tokens

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gates = None
    if decay:
        gates = -torch.rand(batch, kv_heads, keys, generator=generator, dtype=torch.float64)
        if decay == "resets":
            gates = torch.where(torch.rand(gates.shape, generator=generator) < 0.2, -1000.0, 0.1 * gates)
    visible = None
    if mask:
        visible = torch.rand(batch, keys, generator=generator) > 0.4
        visible[0, : keys // 3] = False
        gates = None if gates is None else gates.masked_fill(~visible[:, None], 0)
    columns = None
    if far is not None:
        columns = normal(batch, heads, tokens, value_dim + 1)
        columns[..., -1] = {"positive": columns[..., -1].abs() + 0.1, "zero": 0.0, "any": columns[..., -1]}[far]
        columns = columns * 0 if far == "zero" else columns
        columns[..., : tokens // 4, :] = 0  # queries without a far key
        columns = columns[..., late:, :]  # queries that have no far part at all
    some = {"sink_key": None, "sink_value": None, "sink_from": None, "sink_until": None, "sink_log_decay": None}
    if sinks:
        some["sink_key"] = normal(batch, kv_heads, sinks, head_dim)
        some["sink_value"] = normal(batch, kv_heads, sinks, value_dim)
        starts = torch.tensor([-1, NEVER, tokens // 2, 0, max(tokens - 1, 0)])
        place = torch.arange(sinks) + torch.arange(batch)[:, None, None] + torch.arange(kv_heads)[:, None]
        some["sink_from"] = starts[place % 5]  # [B, Hkv, X]
        if ending:
            some["sink_until"] = some["sink_from"] + torch.tensor([NEVER, 1, tokens // 3, 0])[place % 4]
        some["sink_log_decay"] = -torch.rand(batch, kv_heads, sinks, generator=generator, dtype=torch.float64)
    return Near(
        size * normal(batch, heads, tokens, head_dim) * head_dim**-0.5,
        normal(batch, kv_heads, keys, head_dim),
        normal(batch, kv_heads, keys, value_dim),
        columns,
        visible,
        gates,
        **some,
        window=window,
    )


def attend_by_definition(near):
    """Every pair of a query and a key or sink, in float64."""
    near = near.to(torch.float64)
    batch, heads, keys, _ = near.key.shape
    tokens, group = near.query.shape[2], near.query.shape[1] // heads
    key, columns = near.key, torch.cat([near.value, near.value.new_ones(batch, heads, keys, 1)], -1)
    place, query = torch.arange(keys), torch.arange(tokens)
    age = keys - tokens + query[:, None] - place
    seen = ((age >= 0) & (age < near.window)).expand(batch, 1, tokens, keys)
    if near.visible is not None:
        seen = seen & near.visible[:, None, None]
    fading = near.key.new_zeros(batch, heads, tokens, keys)
    if near.log_decay is not None:
        later = torch.ones(keys, keys, dtype=torch.bool).tril(-1)
        fading = torch.where(later, near.log_decay[..., None], 0).cumsum(-2)[:, :, keys - tokens :]
    if near.sink_key is not None:
        count = near.sink_key.shape[2]
        key = torch.cat([key, near.sink_key], 2)
        ones = near.sink_value.new_ones(batch, heads, count, 1)
        columns = torch.cat([columns, torch.cat([near.sink_value, ones], -1)], 2)
        shown = near.sink_from[:, :, None] <= query[:, None]  # [B, Hkv, T, X]
        if near.sink_until is not None:
            shown = shown & (near.sink_until[:, :, None] > query[:, None])
        seen = torch.cat([seen.expand(-1, heads, -1, -1), shown], -1)
        sinking = near.key.new_zeros(batch, heads, tokens, count)
        if near.log_decay is not None:
            sinking = near.log_decay.cumsum(-1)[..., keys - tokens :, None] + near.sink_log_decay[:, :, None]
        fading = torch.cat([fading, sinking], -1)
    fading = fading.masked_fill(fading < -745, -torch.inf)  # as a reset by -inf
    key, columns, fading = (x.repeat_interleave(group, 1) for x in (key, columns, fading))
    seen = seen.expand(-1, heads, -1, -1).repeat_interleave(group, 1)
    scores = (near.query @ key.mT + fading).masked_fill(~seen, -torch.inf)
    top = torch.cat([scores, scores.new_full((*scores.shape[:3], 1), -torch.inf)], -1).amax(-1)
    far = near.query.new_zeros(batch, near.query.shape[1], tokens, columns.shape[3])
    if near.far is not None:
        far = torch.cat([far[:, :, : tokens - near.far.shape[2]], near.far], 2)
    z = far[..., -1]
    top = torch.maximum(top, torch.where(z > 0, z, 0).log()).nan_to_num(neginf=0).detach()
    weights = (scores - top[..., None]).exp()
    return weights @ columns + (-top).clamp(max=700).exp()[..., None] * far, top


def assert_right(near, backend, dtype=torch.float64, tolerance=None):
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    near = near.to(dtype)
    out, top = near.attend(backend)
    expected, largest = attend_by_definition(near)
    assert (relative_error(out, expected) < tolerance, relative_error(top, largest) < tolerance) == (True, True)
    return out


def gradients_of(near, compute):
    leaves = near.recorded()
    out = compute(leaves)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad((out.double() * weights).sum(), leaves.leaves, materialize_grads=True)


def assert_right_gradients(near, backend, dtype=torch.float64):
    near = near.to(dtype)
    found = gradients_of(near, lambda x: x.attend(backend))
    expected = gradients_of(near, attend_by_definition)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype]


# ---- sizes -----------------------------------------------------------------------------------------------------------

WINDOWS = [0, 1, 2, 5, 16, 17, 64, 300]
DIMENSIONS = [1, 3, 8, 16, 20, 64]


# Keys before the queries: none, fewer than can be seen, just those, more.
PASTS = {
    "none": lambda window: 0,
    "some": lambda window: window // 2,
    "all but one": lambda window: max(window - 1, 0),
    "all": lambda window: window,
    "more": lambda window: window + 3,
}


def assert_right_plain_and_with_everything(backend, **sizes):
    assert_right(make(**sizes), backend)
    assert_right(make(**sizes, mask=True, decay="soft", sinks=2, far="positive"), backend)


@by_every_backend
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 100, 131])
def test_any_window_and_number_of_tokens(backend, window, tokens):
    sizes = {"heads": 2, "kv_heads": 1, "value_dim": DIMENSIONS[tokens % 6], "past": window // 3}
    assert_right_plain_and_with_everything(backend, tokens=tokens, window=window, **sizes)


@by_every_backend
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", [2, 33])
def test_any_window_and_number_of_keys_before_the_queries(backend, window, tokens, past):
    assert_right_plain_and_with_everything(backend, tokens=tokens, window=window, past=PASTS[past](window))


@by_every_backend
@DTYPES
@pytest.mark.parametrize("head_dim", DIMENSIONS)
@pytest.mark.parametrize("value_dim", [0, *DIMENSIONS])
def test_any_dimensions(backend, head_dim, value_dim, dtype):
    near = make(head_dim=head_dim, value_dim=value_dim, sinks=3, far="any", window=20)
    assert_right(near, backend, dtype)
    assert_right_gradients(near, backend, dtype)


MODES = {
    "plain": {},
    "mask": {"mask": True},
    "decay": {"decay": "soft"},
    "resets": {"decay": "resets", "mask": True},
    "sinks": {"sinks": 5},
    "far": {"far": "positive"},
    "far without weight": {"far": "zero"},
    "far of any sign": {"far": "any", "decay": "soft"},
    "late far": {"far": "positive", "late": 21, "decay": "soft"},
    "everything": {"far": "positive", "decay": "resets", "mask": True, "sinks": 4},
    "no window": {"far": "positive", "decay": "soft", "sinks": 4, "window": 0},
    "long": {"far": "positive", "decay": "soft", "mask": True, "sinks": 4},  # resets add up to sums that are less exact
    "many sinks": {"sinks": 330, "window": 3, "tokens": 20},
    "sinks that end": {"sinks": 9, "ending": True, "decay": "soft", "heads": 4, "kv_heads": 2, "batch": 2},
}


@by_every_backend
@DTYPES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [2, 17, 50])
def test_results_and_gradients_in_every_mode(backend, mode, window, dtype):
    sizes = {"batch": 2, "heads": 6, "kv_heads": 2, "tokens": 45, "past": 9, "window": window}
    near = make(**{**sizes, **MODES[mode]})
    assert_right(near, backend, dtype)
    assert_right_gradients(near, backend, dtype)


@by_every_backend
@pytest.mark.parametrize("tokens", [300, 700])
@pytest.mark.parametrize("window", [40, 330, 1000])
@pytest.mark.parametrize("mode", ["plain", "long", "late far"])
def test_more_tokens_than_are_computed_together(backend, tokens, window, mode):
    near = make(**{"heads": 3, "kv_heads": 1, "tokens": tokens, "past": 50, "window": window, **MODES[mode]})
    assert_right(near, backend)
    assert_right_gradients(near, backend)


@by_every_backend
def test_no_row_at_all(backend):
    out, top = make(batch=0, sinks=1).attend(backend)
    assert out.shape == (0, 2, 37, 4)
    assert top.shape == (0, 2, 37)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@by_every_backend
@DTYPES
@pytest.mark.parametrize("shift", [-200.0, 200.0])
@pytest.mark.parametrize("far", [None, "positive", "zero"])
def test_scores_far_from_zero_neither_overflow_nor_vanish(backend, shift, far, dtype):
    near = make(far=far, window=20, sinks=2)
    near = replace(
        near,
        query=torch.cat([near.query, torch.full_like(near.query[..., :1], shift)], -1),
        key=torch.cat([near.key, torch.ones_like(near.key[..., :1])], -1),
        sink_key=torch.cat([near.sink_key, torch.ones_like(near.sink_key[..., :1])], -1),
    )
    out = assert_right(near, backend, dtype, 1e-12 if dtype == torch.float64 else 1e-4)  # of scores of 200
    assert out.isfinite().all()
    assert (out[..., -1] >= 1 - 1e-6).all()


@by_every_backend
@DTYPES
def test_scores_of_any_size(backend, dtype):
    near = make(size=60.0, window=33, tokens=70)
    assert_right(near, backend, dtype, 1e-12 if dtype == torch.float64 else 1e-4)


@by_every_backend
@DTYPES
def test_a_reset_leaves_nothing_of_what_was_before(backend, dtype):
    """A gate of -1000 at every place of three panels of the widest vectors."""
    near = make(batch=100, heads=1, tokens=100, window=40, value_dim=1, head_dim=2)
    gates = torch.zeros(100, 1, 100, dtype=torch.float64)
    gates[torch.arange(100), 0, torch.arange(100)] = -1000
    assert_right(replace(near, log_decay=gates), backend, dtype)


@by_every_backend
@DTYPES
def test_what_a_reset_leaves_behind_has_no_weight_where_nothing_else_has(backend, dtype):
    """The keys from place 10 on are hidden, and the gate at place 20 resets: then neither keys nor sinks are left."""
    near = make(window=40, sinks=1)
    gates = torch.zeros(1, 2, 37, dtype=torch.float64)
    gates[..., 20] = -1000
    visible = (torch.arange(37) < 10)[None]
    near = replace(near, log_decay=gates, visible=visible)
    out = assert_right(near, backend, dtype)
    assert bool((out[:, :, 20:] == 0).all())
    assert_right_gradients(near, backend, dtype)


@by_every_backend
def test_one_key_gives_its_value(backend):
    near = make(window=1).to(torch.float32)
    out, _ = near.attend(backend)
    assert torch.equal(out[..., :-1], near.value)
    assert torch.equal(out[..., -1], torch.ones_like(out[..., -1]))


@by_every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_key_that_is_not_finite_reaches_those_who_see_it_and_no_others(backend, bad, where):
    near = make(batch=2, heads=4, kv_heads=2, past=5, window=7, sinks=2, far="positive")
    clean, _ = near.attend(backend)
    broken = getattr(near, where).clone()
    broken[1, 1, 20, 0] = bad
    out, top = replace(near, **{where: broken}).attend(backend)
    expected = clean.clone()
    expected[1, 2:, 15:22] = torch.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert relative_error(out.nan_to_num(), expected.nan_to_num()) < EXACT
    assert top.isfinite().all()
    hidden = torch.ones(2, 42, dtype=torch.bool)
    hidden[:, 20] = False
    shown = replace(near, visible=hidden)
    assert torch.equal(replace(shown, **{where: broken}).attend(backend)[0], shown.attend(backend)[0])


@by_every_backend
def test_a_sink_that_is_not_finite_reaches_those_who_see_it_and_no_others(backend):
    near = make(sinks=3)
    broken = near.sink_key.clone()
    broken[0, 1, :2] = torch.nan  # in this head the first is never there, the second from the middle on
    out, _ = replace(near, sink_key=broken).attend(backend)
    expected = near.attend(backend)[0].clone()
    expected[0, 1, 18:] = torch.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert relative_error(out.nan_to_num(), expected.nan_to_num()) < EXACT


@by_every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_reaches_its_own_row(backend, bad):
    near = make(far="positive", sinks=2)
    query = near.query.clone()
    query[0, 1, 20, 1] = bad
    out, top = replace(near, query=query).attend(backend)
    expected = near.attend(backend)[0].clone()
    expected[0, 1, 20] = torch.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert top.isfinite().all()


@by_every_backend
@DTYPES
def test_the_far_part_may_be_of_any_size(backend, dtype):
    near = make(tokens=100, far="positive").to(dtype)
    digits = 36 if dtype == torch.float32 else 300
    size = torch.logspace(-digits, digits, 100, dtype=torch.float64).to(dtype)
    out, top = replace(near, far=near.far * size[:, None]).attend(backend)
    expected, largest = attend_by_definition(replace(near, far=near.far * size[:, None]))
    assert relative_error(top, largest) < TOLERANCE[dtype]
    assert relative_error(out[..., :-1] / out[..., -1:], expected[..., :-1] / expected[..., -1:]) < TOLERANCE[dtype]


# ---- divided at once -------------------------------------------------------------------------------------------------


def divide(near, backend, count=None, constant=None):
    return divide_near(*(getattr(near, field.name) for field in fields(near)), backend, count, constant)


def divide_afterwards(near, backend, check=None):
    out, top = near.attend(backend)
    if check is None:
        return divide_sums(out, out[..., -1] == 0), 0
    seen = check.seen(out, top, near.far)
    unsafe = find_unsafe(out, seen, check.constant)
    return divide_sums(out, seen == 0).masked_fill(unsafe[..., None], torch.nan), int(unsafe.sum())


@by_every_backend
@DTYPES
@pytest.mark.parametrize("mode", MODES)
def test_divided_at_once_is_divided_afterwards(backend, mode, dtype):
    sizes = {"batch": 2, "heads": 6, "kv_heads": 2, "tokens": 45, "past": 9, "window": 17}
    near = make(**{**sizes, **MODES[mode]}).to(dtype)
    y, _ = divide(near, backend)
    assert same(y, divide_afterwards(near, backend)[0])


@by_every_backend
@DTYPES
@pytest.mark.parametrize("late", [0, 20, 300])
@pytest.mark.parametrize("constant", [1.0, -0.5, 0.0])
def test_normalisers_are_checked_where_they_are_divided(backend, late, constant, dtype):
    near = make(tokens=301, heads=4, kv_heads=2, window=3, far="any", late=late, sinks=2, decay="soft").to(dtype)
    count = torch.rand(1, 1, 301 - late).mul(100).to(dtype).expand(-1, 4, -1)
    y, unsafe = divide(near, backend, count, constant)
    expected, found = divide_afterwards(near, backend, Check(constant, count))
    assert same(y, expected)
    assert int(unsafe) == found == int(y.isnan().all(-1).sum())
    assert found < 1204


def same(x, y):
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@by_every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value", "sink_key", "sink_value", "far", "query"])
def test_what_is_not_finite_is_noticed_where_it_is_divided(backend, bad, where):
    near = make(tokens=40, window=5, far="positive", sinks=1)
    changed = getattr(near, where).clone()
    changed[:, 0, -1, 0] = bad
    near = replace(near, **{where: changed})
    y, _ = divide(near, backend)
    expected, _ = divide_afterwards(near, backend)
    assert same(y, expected)
    assert not y.isfinite().all()


# ---- addresses, threads ----------------------------------------------------------------------------------------------


def every_second(x):
    """The same numbers with others in between."""
    return torch.stack([x, torch.full_like(x, torch.nan) if x.is_floating_point() else x], -1)[..., 0]


def tokens_outside(x):
    """The same numbers with the tokens as the slowest axis."""
    axis = 2 if x.ndim == 4 else x.ndim - 1
    return x.movedim(axis, 0).contiguous().movedim(0, axis)


@by_every_backend
@pytest.mark.parametrize("layout", [every_second, tokens_outside])
def test_any_strides_of_everything(backend, layout):
    near = make(**{"batch": 2, "heads": 4, "kv_heads": 2, "window": 10, **MODES["everything"]})
    moved = near.each(layout)
    moved = replace(moved, visible=layout(near.visible), sink_from=layout(near.sink_from))
    assert torch.equal(moved.attend(backend)[0], near.attend(backend)[0])

    def compute(change):
        return gradients_of(near, lambda x: [change(x.each(change).attend(backend)[0])])

    same = [torch.equal(a, b) for a, b in zip(compute(layout), compute(lambda x: x), strict=True)]
    assert same == [True] * len(same)


@pytest.fixture
def threads(monkeypatch):
    """A way to compute with a number of threads, however small the problem."""
    before = torch.get_num_threads()
    monkeypatch.setattr(near_compiled, "count_threads", lambda _: torch.get_num_threads())
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("heads", [1, 3])
def test_no_bit_depends_on_the_number_of_threads(backend, heads, threads, monkeypatch):
    monkeypatch.setattr(near_compiled, "_SINK_PART", 100)
    near = make(**{"heads": heads, "tokens": 600, "window": 70, **MODES["long"]})
    found = {}
    for count in (1, 2, 7):
        threads(count)
        found[count] = [
            *near.attend(backend),
            *divide(near, backend, None, 1.0),
            *gradients_of(near, lambda x: x.attend(backend)),
        ]
    for count in (2, 7):
        assert [torch.equal(a, b) for a, b in zip(found[count], found[1], strict=True)] == [True] * len(found[1])
    expected = gradients_of(near, attend_by_definition)
    assert max(relative_error(a, b) for a, b in zip(found[1][4:], expected, strict=True)) < EXACT


def test_blocks_of_a_few_rows_at_a_time_give_the_same(monkeypatch):
    near = make(**{"batch": 3, "tokens": 200, **MODES["everything"]})
    monkeypatch.setattr(near_torch, "_WORKSPACE", 1)
    assert_right(near, "torch")
    assert_right_gradients(near, "torch")


# ---- what PyTorch asks of an operator --------------------------------------------------------------------------------


@by_every_backend
@pytest.mark.parametrize("mode", ["plain", "everything"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_pytorch_finds_the_operator_sound(backend, mode):
    near = make(**{"tokens": 5, "window": 3, **MODES[mode]}).recorded()
    arguments = [getattr(near, field.name) for field in fields(near)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.taylor_attention.attend_near.default, (*arguments, backend), test_utils=tests)
    out, top = (x.detach() for x in near.attend(backend))
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    given = (torch.ones_like(out), out, top, *arguments, backend)
    torch.library.opcheck(attend_near_backward, given, test_utils=tests[:2])
    torch.library.opcheck(divide_near, (*arguments, backend, None, None), test_utils=tests[:2])


def test_a_tracer_sees_shapes_and_gradients():
    near = make(**{"tokens": 9, "window": 4, **MODES["everything"]})
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.attend("torch"), fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients_of(near, compiled), gradients_of(near, lambda x: x.attend("torch")), strict=True
    ):
        assert relative_error(found, expected) < EXACT


@by_every_backend
def test_nothing_but_inputs_and_results_is_kept_for_the_backward(backend):
    near, kept = make(window=30, tokens=64, sinks=2, decay="soft", far="positive").recorded(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out, top = near.attend(backend)
    assert sum(kept) == sum(x.numel() for x in (*near.leaves, near.sink_from, out, top))


@by_every_backend
def test_autocast_changes_nothing(backend):
    near = make(sinks=2, decay="soft").to(torch.float32)
    expected = near.attend(backend)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(near.attend(backend)[0], expected)

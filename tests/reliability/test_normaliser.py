"""The normaliser's status: counted, readable, said once; where it is sure to be positive; what keeps scores small."""

import math
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import taylor_attention as ta
from kernels import KERNELS
from problems import carry, decode, make
from taylor_attention.core.basis import feature_count
from taylor_attention.errors import ArgumentError, NormaliserError, NormaliserWarning
from taylor_attention.lm.generation import prefill, stream
from taylor_attention.nn import LanguageModel, ModelConfig, TaylorAttention
from taylor_attention.ops.normaliser import divide
from taylor_attention.ops.reference import attention_reference, softmax_reference
from tolerances import TOLERANCE, relative_error

BACKENDS = pytest.mark.parametrize("backend", ["torch", *KERNELS], indirect=True)
ADVICE = "^the truncated series is negative for some scores, .* use an even degree of exp .* watch_normalisers"

WAYS = {  # and how many calls they are, for 24 tokens
    "one call": (lambda p, **o: p.solve(**o), 1),
    "pieces": (lambda p, **o: carry(p, [5, 11], **o)[0], 3),
    "decoding": (lambda p, **o: decode(p, **o)[0], 24),
    "several tokens at a time": (lambda p, **o: decode(p, 5, **o)[0], 5),
}
KINDS = {
    "far": {"heads": 4, "kv_heads": 2},
    "window": {"window": 2, "sinks": 1},
    "heavy": {"window": 2, "heavy": 1},
    "fitted": {"reading": "fitted", "radius": 25.0},
    "decay and holes": {"decay": "soft", "mask": "holes"},
}


def unsafe_problem(kind="far", **options):
    """Scores far outside where the third degree is positive."""
    return make(**{"batch": 2, "length": 24, "degree": 3, "radius": 9.0, **KINDS[kind], **options})


# ---- the status ------------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_status_counts_and_shows_every_unsafe_query_and_nothing_is_warned_of(backend, kind, way):
    problem, (solve, calls) = unsafe_problem(kind), WAYS[way]
    with ta.watch_normalisers(keep_masks=True) as seen:
        y = solve(problem, backend=backend)
    assert (seen.calls, seen.queries) == (calls, y[..., 0].numel())
    assert 0 < seen.unsafe < seen.queries
    assert torch.equal(torch.cat(seen.masks, 2), y.isnan().all(-1))
    assert seen.unsafe == int(y.isnan().any(-1).sum())


@BACKENDS
@pytest.mark.parametrize("way", WAYS)
def test_a_query_that_is_not_finite_itself_is_not_counted(backend, way):
    problem = make(batch=2, length=24)
    problem.query[1, 0, 7, 2] = math.nan
    with ta.watch_normalisers() as seen:
        y = WAYS[way][0](problem, backend=backend)
    assert seen.unsafe == 0
    assert y.isnan().all(-1).sum() == 1


def test_masks_are_kept_on_request_only():
    with ta.watch_normalisers() as seen:
        unsafe_problem().solve()
    assert seen.masks is None
    assert seen.unsafe > 0


def test_watching_changes_no_bit():
    problem = make(batch=2, degree=3)
    with ta.watch_normalisers(keep_masks=True) as seen:
        found = decode(problem)[0], problem.solve()
    assert torch.equal(found[0], decode(problem)[0])
    assert torch.equal(found[1], problem.solve())
    assert seen.unsafe == 0


@BACKENDS
@pytest.mark.parametrize("way", ["one call", "several tokens at a time", "decoding"])
def test_outside_of_the_block_it_is_a_warning_again(backend, way):
    problem, solve = unsafe_problem(), WAYS[way][0]
    with pytest.raises(ZeroDivisionError), ta.watch_normalisers() as seen:
        raise ZeroDivisionError
    with pytest.warns(NormaliserWarning, match=ADVICE):
        solve(problem, backend=backend)
    assert seen.calls == 0


def test_every_block_around_a_call_counts_it():
    with ta.watch_normalisers() as outer:
        unsafe_problem().solve()
        with ta.watch_normalisers() as inner:
            unsafe_problem("window").solve()
    assert (outer.calls, inner.calls) == (2, 1)
    assert outer.unsafe > inner.unsafe > 0


def test_another_thread_is_not_watched():
    caught = []

    def work():
        try:
            unsafe_problem().solve()
        except NormaliserWarning as warning:  # warnings are errors here
            caught.append(warning)

    with ta.watch_normalisers() as seen:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert seen.calls == 0


def test_in_training_it_is_an_error_watched_or_not():
    with ta.watch_normalisers() as seen, pytest.raises(NormaliserError, match=r"normaliser of [\d,]+ queries"):
        unsafe_problem().recorded().solve()
    assert seen.calls == 0


def test_a_layer_and_a_generated_text_are_seen_whole():
    layer = TaylorAttention(12, 2, degree=3, scale=20.0).requires_grad_(False)
    with ta.watch_normalisers() as seen:
        y = layer(torch.randn(3, 7, 12))
    assert (seen.calls, seen.queries) == (1, 3 * 2 * 7)
    assert seen.unsafe > 0
    assert y.isnan().any()
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, num_heads=2, num_layers=3, degree=2)).requires_grad_(False)
    states = model.new_states(1)
    with ta.watch_normalisers() as seen:
        logits = prefill(model, states, torch.tensor([[97, 98, 99]]))
        assert len(list(stream(model, states, logits, tokens=5))) == 5
    assert seen.calls == 3 * 6
    assert seen.queries == 3 * 2 * (3 + 5)
    assert seen.unsafe == 0


# ---- the warning -----------------------------------------------------------------------------------------------------


def shown(work):
    """The warnings that Python shows by its own rules: one for each text and place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        work()
    return caught


@BACKENDS
def test_a_decoding_loop_is_warned_of_once(backend):
    problem = unsafe_problem()
    caught = shown(lambda: decode(problem, backend=backend))
    assert [warning.category for warning in caught] == [NormaliserWarning]


@pytest.mark.parametrize("way", ["one call", "decoding", "layer"])
def test_each_place_of_the_callers_own_is_told(way):
    problem, layer = unsafe_problem(), TaylorAttention(12, 2, degree=3, scale=20.0).requires_grad_(False)
    x = torch.randn(3, 7, 12)
    with ta.watch_normalisers():
        _, state = decode(problem.part(0, 20))

    def call():
        if way == "layer":
            layer(x)
        elif way == "decoding":
            ta.decode_(*problem.part(20, 21).arguments, state)
        else:
            ta.attention(*problem.arguments, degree=3)

    caught = shown(lambda: (call(), call(), [call() for _ in range(3)]))
    assert len(caught) == 1
    assert caught[0].filename == __file__


# ---- where the normaliser is beyond what floats are ------------------------------------------------------------------


def overflowing(degree, **options):
    """Moments of 1e24 and a query of 1e9, along the keys: Z is 1e42. Values are small, so that N is not."""
    problem = make(heads=1, length=40, degree=degree, scale=1.0, **options)
    key, query = problem.key.abs() + 1, torch.zeros_like(problem.query)
    query[:, :, -1] = 1e9 ** (2 / degree)
    return replace(problem, query=query, key=key * 1e12 ** (2 / degree), value=problem.value * 1e-12).to(torch.float32)


@BACKENDS
@pytest.mark.parametrize("kind", ["far", "window"])
@pytest.mark.parametrize("way", ["one call", "decoding", "pieces"])
def test_a_normaliser_beyond_the_range_is_nan_and_counted(backend, kind, way):
    """Not N / Inf, which is 0. With an even degree nobody warns."""
    problem = overflowing(2, **({} if kind == "far" else {"window": 2}))
    expected = torch.arange(40) == 39
    y = WAYS[way][0](problem, backend=backend)
    assert torch.equal(y.isnan().all(-1)[0, 0], expected)
    assert torch.equal(y.isnan().any(-1)[0, 0], expected)
    with ta.watch_normalisers() as seen:
        WAYS[way][0](problem, backend=backend)
    assert seen.unsafe == 1


@BACKENDS
@pytest.mark.parametrize("kind", ["far", "window"])
@pytest.mark.parametrize("way", ["one call", "decoding", "pieces"])
def test_with_an_odd_degree_it_is_unsafe(backend, kind, way):
    problem = overflowing(3, **({} if kind == "far" else {"window": 2}))
    with pytest.warns(NormaliserWarning, match=ADVICE):
        y = WAYS[way][0](problem, backend=backend)
    assert y.isnan().all(-1)[0, 0].tolist() == [False] * 39 + [True]


@pytest.mark.parametrize(("z", "expected"), [(2.0, 1.5), (-2.0, math.nan), (math.inf, math.nan), (math.nan, math.nan)])
def test_what_divides(z, expected):
    """A negative normaliser of a series that is positive is nothing but rounding."""
    found = divide(torch.tensor([[3.0, z], [0.0, 0.0]]), torch.tensor([False, True]))
    assert found.tolist() == [[pytest.approx(expected, nan_ok=True)], [0.0]]


# ---- even degrees ----------------------------------------------------------------------------------------------------

USUAL = [0.01, 0.3, 1.0, 3.0]
SIZES = st.lists(
    st.sampled_from([*USUAL, *USUAL, *USUAL, 0.0, 1e-45, 1e-20, 30.0, 1e3, 1e6, 1e12, 1e19, 3e38]),
    min_size=10,
    max_size=10,
)


def tensor(sizes, seed):
    """Ten tokens of these sizes, in one head."""
    x = torch.rand(10, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x * torch.tensor(sizes)[:, None]).view(1, 1, 10, 2)


def room(query, key, value, degree):
    """What rounding in float32 can do to each row's Z [T], and to its N; infinite where a product may overflow."""
    scale = query.shape[3] ** -0.5
    sizes = [x.abs().double().flatten(0, 2) for x in (query * scale, key, value)]
    q, k, v = (x.amax(-1).clamp(min=1) for x in sizes)
    largest = (sizes[0] @ sizes[1].mT).tril()  # scores without signs
    weights = sum(largest**p / math.factorial(p) for p in range(degree + 1)).tril().sum(-1)
    terms = feature_count(query.shape[3], degree) * len(k)
    lost = 2.0**-149 * terms * (q**degree + (k**degree).cummax(0).values) * math.factorial(degree)
    error = 64 * 2.0**-24 * weights + lost
    highest = terms * math.factorial(degree) * q**degree * (k**degree * v).cummax(0).values
    return torch.where(highest < 1e37, error, math.inf), v.cummax(0).values


@given(
    query=SIZES,
    key=SIZES,
    value=SIZES,
    seed=st.integers(0, 999),
    degree=st.sampled_from([0, 2, 4, 6]),
    chunk=st.integers(0, 2),
)
@example([1.0] * 10, [1.0] * 10, [1.0] * 10, 0, 2, 1)
@example([1e3] * 10, [1e3] * 10, [1.0] * 10, 0, 4, 0)
@settings(max_examples=120)
def test_even_degrees_are_positive_for_every_finite_input_that_float32_can_tell(query, key, value, seed, degree, chunk):
    """No query is unsafe, and every output right, unless rounding alone is larger than the normaliser itself.

    In chunks of 1 and 2, so that the moments are read, or (0) token by token.
    """
    query, key, value = (tensor(sizes, seed + i) for i, sizes in enumerate((query, key, value)))
    with ta.watch_normalisers(keep_masks=True) as seen:
        try:
            if chunk:
                y = ta.attention(query, key, value, degree=degree, chunk_size=chunk)
            else:
                y, _ = decode(make_problem(query, key, value, degree))
        except ArgumentError:
            event("refused")
            return
    error, largest = room(query, key, value, degree)
    z = z_of(query, key, degree)
    sure = error < 1e-2 * z
    event(f"sure of {int(sure.sum())}")
    unsafe = torch.cat(seen.masks, 2)[0, 0]
    assert not (unsafe & sure).any()
    off = (y[0, 0].double() - attention_reference(query, key, value, degree=degree)[0, 0]).abs().amax(-1)
    assert (off[sure] <= (4 * error * largest / z)[sure] + 2.0**-140).all()


def make_problem(query, key, value, degree):
    problem = make(heads=1, degree=degree)
    return replace(problem, query=query, key=key, value=value)


def z_of(query, key, degree):
    scores = (query.double() @ key.double().mT)[0, 0] * query.shape[3] ** -0.5
    return sum(scores**p / math.factorial(p) for p in range(degree + 1)).tril().sum(-1)


# ---- what keeps scores small -----------------------------------------------------------------------------------------


def test_softmax_does_not_feel_a_constant_taken_off_all_keys_and_a_series_does():
    """The guard rail of `center_keys`: keys far from zero with a common offset."""
    problem = make(batch=2, heads=4, kv_heads=2, length=50, head_dim=8, degree=2, radius=1.0, causal=False)
    offset = 3 * torch.randn(2, 2, 1, 8, dtype=torch.float64)
    moved = replace(problem, key=problem.key + offset)
    exact = softmax_reference(*problem.arguments, causal=False)
    assert relative_error(softmax_reference(*moved.arguments, causal=False), exact) < TOLERANCE[torch.float64]
    assert relative_error(problem.solve(), exact) < 0.02
    assert relative_error(moved.solve(), exact) > 0.1


def test_qk_norm_keeps_scores_within_the_size_of_a_head():
    """|q| and |k| are sqrt(d) while the gains are 1, so that |q . k| / sqrt(d) is at most sqrt(d), and 1 on average."""
    layer, x = TaylorAttention(64, 4, degree=2).requires_grad_(False), 100 * torch.randn(2, 50, 64)
    heads = layer._project(x, None, None)
    scores = (heads.query @ heads.key.mT) * layer.head_dim**-0.5
    assert scores.abs().max() <= layer.head_dim**0.5 * (1 + 1e-5)
    assert scores.square().mean().sqrt() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("std", "degree", "mean", "part"), [(0.5, 2, 0.0, 1.0), (1.0, 2, 0.0, 1.0), (1.0, 4, 0.0, 1.0), (0.5, 2, 1.0, 0.65)]
)
def test_the_expected_error_is_that_of_outputs(std, degree, mean, part):
    """Normal scores of this mean and spread, and values that have nothing to do with them.

    Away from zero a part of the error is the same for all weights, and the division takes it out.
    """
    shares = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**15
    key = torch.special.ndtri(shares).view(1, 1, -1, 1)
    query, value = (
        torch.full((1, 1, 1, 1), std, dtype=torch.float64),
        torch.randn(1, 1, 2**15, 128, dtype=torch.float64),
    )
    query, key = torch.cat([query, torch.full_like(query, mean)], -1), torch.cat([key, torch.ones_like(key)], -1)
    options = {"causal": False, "scale": 1.0}
    found = ta.attention(query, key, value, degree=degree, **options)
    exact = softmax_reference(query, key, value, **options)
    assert relative_error(found, exact) == pytest.approx(part * ta.expected_error(std, degree, mean=mean), rel=0.15)

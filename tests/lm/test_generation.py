"""Sampling settings do what they say; reading in blocks and writing token by token agree with one pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from endurance import BLOCK, FLAT, alone, generate_long, measurable
from taylor_attention.core.threads import thread_count
from taylor_attention.errors import ArgumentError
from taylor_attention.lm.generation import distribution, prefill, sample, stream
from taylor_attention.nn import LanguageModel, ModelConfig

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0]])

# Summation order differs between a block and its parts; float32 rounds at 6e-8, over a few hundred sums.
SAME = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["taylor", "softmax"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=16, num_layers=2, num_heads=2, attention=request.param)).eval()


def text(length: int) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))


def test_distribution_at_temperature_one_is_the_softmax():
    torch.testing.assert_close(distribution(LOGITS), LOGITS.softmax(-1))


def test_temperature_divides_the_logits():
    torch.testing.assert_close(distribution(LOGITS, temperature=0.5), (2 * LOGITS).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-6])
def test_a_tiny_temperature_does_not_overflow(temperature: float):
    weights = distribution(LOGITS.double(), temperature=temperature)
    torch.testing.assert_close(weights, torch.tensor([[0, 0.5, 0, 0.5, 0]]).double())


def test_temperature_zero_takes_the_first_of_the_likeliest_and_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert sample(LOGITS, temperature=0, generator=generator).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_exactly_k_even_among_ties(top_k: int, kept: list[int]):
    weights = distribution(LOGITS, top_k=top_k)
    assert weights[0].nonzero().flatten().tolist() == kept
    expected = LOGITS[0, kept].softmax(-1)
    torch.testing.assert_close(weights[0, kept], expected)


# Probabilities 0.5, 0.25, 0.125, 0.125: powers of two, so that sums are exact.
@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: int):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()
    weights = distribution(logits, top_p=top_p)
    assert int((weights > 0).sum()) == kept
    torch.testing.assert_close(weights[0, :kept], logits[0, :kept].softmax(-1))


def test_top_p_counts_within_top_k():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()
    assert int((distribution(logits, top_k=2, top_p=0.6) > 0).sum()) == 1  # 0.5 is two thirds of the two


def test_rows_of_a_batch_are_independent():
    logits = torch.cat([LOGITS, LOGITS.flip(-1)])
    weights = distribution(logits, top_k=3, top_p=0.9)
    torch.testing.assert_close(weights[1:2], distribution(LOGITS.flip(-1), top_k=3, top_p=0.9))


def test_equal_seeds_give_equal_draws_and_other_seeds_others():
    logits = torch.zeros(1, 256)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(sample(logits, generator=generator)) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS.expand(20_000, -1), top_k=3, generator=generator)
    frequencies = torch.bincount(drawn, minlength=5) / 20_000
    # Four standard deviations of a frequency near a half.
    torch.testing.assert_close(frequencies, distribution(LOGITS, top_k=3)[0], rtol=0, atol=4 * (0.25 / 20_000) ** 0.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, float]):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        sample(LOGITS, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_failed_model_is_reported(value: float, temperature: float):
    logits = LOGITS.clone()
    logits[0, 2] = value
    with pytest.raises(ArgumentError, match=r"^logits: expected finite"):
        sample(logits, temperature=temperature)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_prefill_in_blocks_agrees_with_one_pass(model: LanguageModel, block: int):
    tokens = text(65)
    states = model.new_states(1)
    logits = prefill(model, states, tokens, block=block)
    torch.testing.assert_close(logits, model(tokens)[:, -1], **SAME)
    assert states[0].tokens.tolist() == [65]


def test_prefill_takes_bytes_as_they_are_stored(model: LanguageModel):
    tokens = text(9)
    expected = prefill(model, model.new_states(1), tokens)
    assert torch.equal(prefill(model, model.new_states(1), tokens.to(torch.uint8)), expected)


@pytest.mark.parametrize(
    ("tokens", "block", "name"), [(text(0), 8, "tokens"), (text(3)[0], 8, "tokens"), (text(3), 0, "block")]
)
def test_prefill_refuses_nothing_to_read(tokens: Tensor, block: int, name: str):
    model = LanguageModel(ModelConfig(d_model=8, num_layers=1, num_heads=1, attention="softmax"))
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        prefill(model, model.new_states(1), tokens, block=block)


def test_greedy_stream_is_what_repeated_full_passes_give(model: LanguageModel):
    tokens = text(20)
    states = model.new_states(1)
    logits = prefill(model, states, tokens)
    got = [int(token) for token in stream(model, states, logits, tokens=10, temperature=0)]
    for _ in range(10):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1)[None]], dim=1)
    assert got == tokens[0, 20:].tolist()


def test_stream_without_a_number_has_no_end_and_keeps_taylor_memory_constant():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, num_layers=1, num_heads=2))
    states = model.new_states(1)
    logits = prefill(model, states, text(10))
    before = sum(state.nbytes for state in states)
    for drawn, _ in enumerate(stream(model, states, logits), 1):
        if drawn == 300:
            break
    assert states[0].tokens.tolist() == [310]
    assert sum(state.nbytes for state in states) == before


@pytest.mark.slow
@measurable
def test_writing_for_long_takes_no_more_memory():
    course = alone(generate_long, 5, {"window": 16, "sinks": 4})
    assert course.tokens == [BLOCK * (1 + block) for block in range(5)]
    assert len(set(course.nbytes)) == 1
    assert course.growth < FLAT


def test_stream_of_a_batch_draws_for_every_sequence(model: LanguageModel):
    states = model.new_states(3)
    logits = prefill(model, states, text(12).reshape(3, 4))
    drawn = torch.stack(
        list(stream(model, states, logits, tokens=5, generator=torch.Generator().manual_seed(0))), dim=1
    )
    assert drawn.shape == (3, 5)
    assert states[-1].tokens.tolist() == [9, 9, 9]


def test_threads_are_put_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    with thread_count(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
    with pytest.raises(ArgumentError, match=r"^threads: expected"), thread_count(0):
        pass

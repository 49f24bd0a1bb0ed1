"""A million tokens one by one: memory stays as it is, no token is lost, and the last output is still right."""

import pytest
import torch

from endurance import BLOCK, FLAT, alone, decode_long, measurable
from kernels import built
from tolerances import TOLERANCE

RUNS = {  # blocks of 5,000 tokens, and what is exact
    "window and sinks": pytest.param(200, {"window": 16, "sinks": 4}, marks=built),  # PyTorch alone takes half an hour
    "heavy": pytest.param(10, {"window": 16, "sinks": 4, "heavy": 8}),
}


@pytest.mark.slow
@measurable
@pytest.mark.parametrize(("blocks", "near"), RUNS.values(), ids=RUNS.keys())
def test_decoding_for_long_takes_no_more_memory_and_stays_right(blocks, near):
    course = alone(decode_long, blocks, near)
    assert course.tokens == [BLOCK * (1 + block) for block in range(blocks)]
    assert len(set(course.nbytes)) == 1
    assert course.growth < FLAT
    assert course.finite == [True] * blocks
    assert max(course.error) < TOLERANCE[torch.float32]

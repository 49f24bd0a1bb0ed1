"""The one table of tolerances, and the one measure of error, that every test compares with."""

from __future__ import annotations

import torch
from torch import Tensor

# Bounds on `relative_error` against the float64 reference, which gets the inputs as rounded to the dtype under test.
TOLERANCE: dict[torch.dtype, float] = {
    # Sums of some thousand terms in another order: 1e3 * 2^-53 = 1e-13, and a decade for what division by Z adds.
    torch.float64: 1e-12,
    # The same sums in float32 grow like the root of their length: 30 * 2^-24 = 2e-6, and a decade as above.
    torch.float32: 2e-5,
    # Arithmetic is float32; only the output is rounded. eps is twice the largest rounding error of one number.
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, in float64; NaN anywhere gives NaN, which no comparison passes."""
    if actual.shape != expected.shape:  # broadcasting would compare something else
        raise ValueError(f"actual: expected the shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    norm = torch.linalg.vector_norm(expected).item()
    distance = torch.linalg.vector_norm(actual - expected).item()
    return distance / norm if norm > 0 else distance

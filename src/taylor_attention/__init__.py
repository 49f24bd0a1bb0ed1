"""Softmax attention at constant cost per token, by Taylor expansion in the minimal symmetric monomial basis.

The functional API is `attention` and `decode_`, the fixed-size memory of a sequence is `State`, and `TaylorAttention`
is a layer; `watch_normalisers` counts queries that got no answer. Series and costs: `error_bound`, `expected_error`,
`degree_for`, `state_size`, `flops_per_token`, `break_even_context`.
"""

from .core import series
from .core.cost import break_even_context, flops_per_token, state_size
from .core.series import Series, degree_for, error_bound, expected_error
from .core.state import State
from .nn.attention import TaylorAttention
from .ops.attention import attention
from .ops.decode import decode_
from .ops.normaliser import watch_normalisers

__version__ = "0.1.0"

__all__ = [
    "Series",
    "State",
    "TaylorAttention",
    "attention",
    "break_even_context",
    "decode_",
    "degree_for",
    "error_bound",
    "expected_error",
    "flops_per_token",
    "series",
    "state_size",
    "watch_normalisers",
]

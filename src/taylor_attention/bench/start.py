"""What starting costs, in fresh processes: importing the package after PyTorch, and the first call of attention."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from ..errors import TaylorAttentionError
from .cases import Case, Outcome, Result, Settings, count_heads

IMPORT, FIRST, SECOND = "import", "first call", "second call"

_CODE = """
import json, sys, time
import torch
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
inputs = 0.5 * torch.randn(3, 1, asked["heads"], asked["length"], asked["head_dim"])
torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)  # what PyTorch itself sets up
marks = [time.perf_counter()]
import taylor_attention
marks.append(time.perf_counter())
for _ in range(2):
    taylor_attention.attention(*inputs, degree=asked["degree"], backend=asked["backend"])
    marks.append(time.perf_counter())
print(json.dumps([1e3 * (after - before) for before, after in zip(marks, marks[1:])]))
"""


def measure(case: Case, settings: Settings) -> Result:
    """Milliseconds of the import beyond PyTorch's own, and of the first and second call; medians over processes.

    Raises:
        TaylorAttentionError: the process failed.
    """
    asked = {"threads": settings.threads, "heads": count_heads(case, settings), "length": case.length}
    asked |= {"head_dim": case.head_dim, "degree": case.degree}
    command = [sys.executable, "-c", _CODE, json.dumps(asked | {"backend": settings.backend})]
    found = []
    for _ in range(min(3, settings.repeats)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TaylorAttentionError(f"start: expected a fresh process to end well, got {done.stderr[-300:]}")
        found.append(json.loads(done.stdout))
    outcomes = {
        name: Outcome(statistics.median(times), min(times), max(times), len(times), 1)
        for name, times in zip((IMPORT, FIRST, SECOND), zip(*found, strict=True), strict=True)
    }
    return Result(case, outcomes)

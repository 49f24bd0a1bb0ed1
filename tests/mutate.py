"""By hand: breaks core lines one at a time and sees that the tests notice, by `python tests/mutate.py [NAME ...]`.

Each mutation is made in a temporary copy of the package, whose kernels are compiled again if it is theirs; the tests
that guard the line must then fail. docs/reliability.md names the mutations; `tests/test_mutations.py` sees to it that
their lines are still there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sources import ROOT, build, copy_sources, replace


@dataclass(frozen=True)
class Mutation:
    """A line of a source of the package, what it becomes, and the tests that must notice."""

    name: str
    source: str
    old: str
    new: str
    tests: str

    @property
    def path(self) -> Path:
        """The source in this repository."""
        return ROOT / "src" / "taylor_attention" / self.source


MUTATIONS = [
    Mutation(
        "a monomial counts once",
        "core/basis.py",
        "new_runs[part][:repeats] = tail + 1",
        "new_runs[part][:repeats] = 1",
        "tests/core/test_basis.py",
    ),
    Mutation(
        "sums forget what rounding drops",
        "core/moments.py",
        "        dropped = dropped - (carried - total)",
        "        dropped = torch.zeros_like(dropped)",
        "tests/ops/test_numerics.py tests/core/test_moments.py",
    ),
    Mutation(
        "merging does not fade",
        "core/state.py",
        "first.compensation, second.log_decay.exp()[..., None, None])",
        "first.compensation, torch.ones_like(second.log_decay)[..., None, None])",
        "tests/core/test_state.py",
    ),
    Mutation(
        "folding does not fade",
        "core/state.py",
        "            if fades:\n",
        "            if False:\n",
        "tests/core/test_state.py tests/ops/test_kernels_decode.py",
    ),
    Mutation(
        "the lightest token takes the place",
        "core/near.py",
        "(goes.value[..., -1] != 0) & (priority > lowest)",
        "(goes.value[..., -1] != 0) & (priority < lowest)",
        "tests/ops/test_heavy.py",
    ),
    Mutation(
        "an unsafe normaliser passes",
        "ops/normaliser.py",
        "return ~((z > SAFE_SHARE * abs(constant) * seen) & (z < torch.inf)) & (seen != 0)",
        "return seen != seen",
        "tests/ops/test_modes.py tests/ops/test_numerics.py",
    ),
    Mutation(
        "a token leaves the window late",
        "ops/sequence.py",
        "        return self.window - self.past\n",
        "        return self.window - self.past + 1\n",
        "tests/ops/test_hybrid.py",
    ),
    Mutation(
        "a damaged file is taken",
        "core/storage.py",
        'whole = header["digest"] == _digest(tensors, metadata)',
        "whole = True",
        "tests/core/test_storage.py",
    ),
    Mutation(
        "a file is written in place",
        "core/storage.py",
        'temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")',
        "temporary = target",
        "tests/core/test_storage.py",
    ),
    Mutation(
        "two processes share a session",
        "core/locks.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/lm/test_session.py",
    ),
    Mutation(
        "draws are not taken up",
        "lm/session.py",
        '            session.generator.set_state(tensors["generator"])\n',
        "",
        "tests/lm/test_session.py",
    ),
    Mutation(
        "a resumed run forgets its momentum",
        "lm/resume.py",
        '_KEPT = ("step", "exp_avg", "exp_avg_sq")',
        '_KEPT = ("step", "exp_avg_sq", "exp_avg_sq")',
        "tests/lm/test_training.py",
    ),
    Mutation(
        "a model forgets what came before",
        "nn/transformer.py",
        "x, new = block(x, state=state, return_state=return_states, **shared)",
        "x, new = block(x, state=None, return_state=return_states, **shared)",
        "tests/nn/test_transformer.py",
    ),
    Mutation(
        "a query sees what comes after it (kernels)",
        "ops/kernels/sweep.h",
        "p.causal && key == first, decaying()}, block, y);",
        "false, decaying()}, block, y);",
        "tests/ops/test_kernels.py",
    ),
    Mutation(
        "queries read the moments before another chunk than theirs (kernels)",
        "ops/kernels/sweep.h",
        "from && p.history ? before(from) : sums",
        "from && p.history ? before(p.chunk) : sums",
        "tests/ops/test_kernels.py",
    ),
    Mutation(
        "queries miss their own panel of keys in gradients (kernels)",
        "ops/kernels/scores.h",
        "last = edge && begin + N < to ? begin + N : to;",
        "last = edge && begin + N < to ? begin : to;",
        "tests/ops/test_kernels.py",
    ),
    Mutation(
        "a token takes its neighbour's slot (kernels)",
        "ops/kernels/decode.h",
        "const Index place = at % window;",
        "const Index place = (at + 1) % window;",
        "tests/ops/test_kernels_decode.py",
    ),
    Mutation(
        "sums forget what rounding drops (kernels)",
        "ops/kernels/moments.h",
        "  compensation = dropped - (sum - total);",
        "  compensation = V{};",
        "tests/ops/test_numerics.py tests/ops/test_kernels.py",
    ),
]


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass although the line is broken."""
    compiled = mutation.path.suffix == ".h"
    with tempfile.TemporaryDirectory() as folder:
        package = copy_sources(Path(folder) / "src", *(["*.so"] if compiled else []))
        replace(package / mutation.source, mutation.old, mutation.new)
        if compiled:
            build(package, ["-O1"])
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1", "CI": "true"}
        command = [sys.executable, "-m", "pytest", *mutation.tests.split(), "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # no test ran: neither passed nor failed
        raise SystemExit(f"{mutation.name}: the tests cannot run\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Try those asked for, or all; how many survive."""
    asked = set(sys.argv[1:])
    unknown = asked - {mutation.name for mutation in MUTATIONS}
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}")
    survivors = []
    for mutation in MUTATIONS:
        if asked and mutation.name not in asked:
            continue
        alive = survives(mutation)
        print(f"{'SURVIVES' if alive else 'caught':9} {mutation.name}", flush=True)
        survivors += [mutation.name] * alive
    print(f"surviving: {', '.join(survivors) or 'none'}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())

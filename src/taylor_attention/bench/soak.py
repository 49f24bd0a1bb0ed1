"""A soak: one long sequence, call after call with the state carried, beside a float64 twin that sees the same tokens.

How wrong a moment T = sum_t x_t is: |T - exact| / max(|exact|, sqrt(sum_t x_t^2)). Where the terms have one sign that
is the error relative to the moment itself; where they cancel, to the size that a sum of such terms of random signs has.
(Relative to the sum of absolute terms, which is never smaller than either, it would be less.) How wrong an output is:
||y - exact|| / ||exact||.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.state import State
from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError, expect
from ..ops.attention import attention
from ..ops.backends import uses_kernels
from .machine import settled_bytes
from .streams import STREAMS, Tokens, draw

KIND = "soak"
"""Kind of the file that a soak goes on from."""

MOMENTS, MOMENTS_TORCH, OUTPUTS = 1e-6, 4e-6, 1e-5
"""Bounds on how wrong moments and outputs are, whatever the number of tokens.

PyTorch's own products sum a whole chunk in a row, the kernels only a few tokens: a wider bound, as constant.
"""

GROWTH = 16 * 2**20
"""Bytes by which resident memory may grow while tokens pass: what allocators do, not what tokens need."""

WARM = 3
"""Lines of a process after which its memory has settled."""


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and must agree before it is taken up again.

    Attributes:
        stream: by its name in `STREAMS`. seed: of its tokens.
        heads, head_dim, degree: of the state. block: tokens per call.
        threads: of PyTorch. backend: as `attention` takes it. version: of this package.
    """

    stream: str = "random"
    seed: int = 0
    heads: int = 2
    head_dim: int = 8
    degree: int = 2
    block: int = 2**14
    threads: int = 1
    backend: str = "auto"
    version: str = __version__


@dataclass(frozen=True)
class Stretch:
    """What was found between one line of the report and the next.

    Attributes:
        tokens: since the beginning, at its end. since: tokens before it.
        moments, outputs: how wrong they were at worst.
        seconds: in calls of attention, the twin's not counted.
        state_bytes, resident_bytes: of the state and of the process (None where the system does not say), at its end.
    """

    tokens: int
    since: int
    moments: float = 0.0
    outputs: float = 0.0
    seconds: float = 0.0
    state_bytes: int = 0
    resident_bytes: int | None = None

    @property
    def case(self) -> int:
        """What it is known by."""
        return self.tokens

    @property
    def nanoseconds(self) -> float:
        """Per token, all heads together."""
        return 1e9 * self.seconds / (self.tokens - self.since)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Stretch:
        """The stretch that gave this dict; KeyError or TypeError if none did."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Position:
    """Where a soak stands: everything that the next call depends on."""

    state: State
    twin: State  # [the stream, the squares of its terms] as a batch of two, in float64
    stretch: Stretch


class Soak:
    """A run under some settings, from the first token or from where an earlier one stopped.

    Attributes:
        position: replaced as a whole after each call, so that an interrupted one has not happened.
    """

    def __init__(self, settings: Settings) -> None:
        """Begin.

        Raises:
            ArgumentError: there is no such stream or backend, or no such state.
        """
        self.settings = settings
        expect(settings.stream in STREAMS, "stream", f"one of {', '.join(STREAMS)}", settings.stream)
        size = (settings.heads, settings.head_dim, settings.head_dim, settings.degree)
        self.position = Position(State.zeros(1, *size), State.zeros(2, *size, dtype=torch.float64), Stretch(0, 0))
        self._attend(draw(settings.stream, settings.seed, 0, 1, settings.heads, settings.head_dim), None)

    @property
    def bound(self) -> float:
        """On moments, for what computes."""
        return MOMENTS if uses_kernels(self.settings.backend, torch.device("cpu")) else MOMENTS_TORCH

    @property
    def tokens(self) -> int:
        """How many it has seen."""
        return self.position.stretch.tokens

    def advance(self) -> None:
        """Feed one block to both, and see how wrong the state and the outputs are."""
        now, last, each = self.position, self.position.stretch, self.settings
        tokens = draw(each.stream, each.seed, last.tokens // each.block, each.block, each.heads, each.head_dim)
        start = time.perf_counter()
        y, state = self._attend(tokens, now.state)
        seconds = time.perf_counter() - start
        expected, twin = self._attend(with_squares(tokens), now.twin)
        stretch = replace(
            last,
            tokens=last.tokens + each.block,
            moments=moment_error(state, twin),
            outputs=_worse(last.outputs, output_error(y, expected[:1])),
            seconds=last.seconds + seconds,
        )
        self.position = Position(state, twin, stretch)

    def _attend(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        return attention(
            **tokens.arguments(),
            degree=self.settings.degree,
            backend=self.settings.backend,
            state=state,
            return_state=True,
        )

    def finish_stretch(self) -> Stretch:
        """What was found since the last call of this; what follows counts for the next."""
        state_bytes, resident = self.position.state.nbytes, settled_bytes()
        done = replace(self.position.stretch, state_bytes=state_bytes, resident_bytes=resident)
        self.position = replace(self.position, stretch=Stretch(done.tokens, done.tokens))
        return done

    def save(self, path: Path) -> None:
        """Write where it stands to a file, replacing it atomically; StorageError where that fails."""
        states = {"state": self.position.state, "twin": self.position.twin}
        tensors = {f"{part}.{name}": x for part, state in states.items() for name, x in state.tensors().items()}
        metadata = {part: json.dumps(state.metadata()) for part, state in states.items()}
        metadata |= {
            "settings": json.dumps(asdict(self.settings)),
            "stretch": json.dumps(asdict(self.position.stretch)),
        }
        write_tensors(path, tensors, kind=KIND, metadata=metadata)

    def restore(self, path: Path) -> None:
        """Go on from a file; StorageError where there is none of these settings."""
        tensors, metadata = read_tensors(path, kind=KIND)
        try:
            if json.loads(metadata["settings"]) != asdict(self.settings):
                raise StorageError(f"{path}: a soak of other settings; leave out --resume, or name another --out")
            state, twin = (_state(part, tensors, metadata) for part in ("state", "twin"))
            self.position = Position(state, twin, Stretch.from_dict(json.loads(metadata["stretch"])))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path}: no whole soak ({type(error).__name__}: {error})") from error


def _state(part: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> State:
    own = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
    return State.from_tensors(own, json.loads(metadata[part]))


def with_squares(tokens: Tokens) -> Tokens:
    """The tokens in float64 and, as a second sequence, others whose terms are the squares of theirs.

    Phi(k)^2 = Phi(k^2): the moments of squared keys and values are sums of squared terms. Queries there are zeros.
    """
    query, key, value = tokens.query.double(), tokens.key.double(), tokens.value.double()
    both = torch.cat([query, torch.zeros_like(query)]), torch.cat([key, key**2]), torch.cat([value, value**2])
    decay = None if tokens.log_decay is None else tokens.log_decay.double()
    return Tokens(*both, None if decay is None else torch.cat([decay, 2 * decay]))


def moment_error(state: State, twin: State) -> float:
    """How wrong the worst moment is, beside a twin of `with_squares`; NaN if any is."""
    exact, squares = twin.moments[:1], twin.moments[1:]
    return float(((state.moments.double() - exact).abs() / torch.maximum(exact.abs(), squares.sqrt())).max())


def output_error(y: Tensor, exact: Tensor) -> float:
    """How wrong the worst row of outputs is; NaN if any is."""
    return float(((y.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def _worse(worst: float, found: float) -> float:
    return float(torch.tensor([worst, found], dtype=torch.float64).max())  # unlike max(), never drops a NaN


@dataclass(frozen=True)
class Verdict:
    """What a run was asked for, what it found at worst, and what was allowed; None: it found nothing."""

    name: str
    found: float | None
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it was allowed."""
        return self.found is None or self.found <= self.bound


def judge(stretches: Sequence[Stretch], here: int, bound: float) -> list[Verdict]:
    """The verdicts on a run, of which this process did the last `here` stretches; bound: on moments."""
    moments, outputs, sizes = 0.0, 0.0, {each.state_bytes for each in stretches}
    for each in stretches:
        moments, outputs = _worse(moments, each.moments), _worse(outputs, each.outputs)
    resident = [each.resident_bytes for each in stretches[len(stretches) - here :][WARM:]]
    known = [size for size in resident if size is not None]
    return [
        Verdict("moments", moments, bound),
        Verdict("outputs", outputs, OUTPUTS),
        Verdict("state_bytes_growth", float(max(sizes, default=0) - min(sizes, default=0)), 0.0),
        Verdict("resident_bytes_growth", float(max(known) - known[0]) if len(known) > 1 else None, GROWTH),
    ]

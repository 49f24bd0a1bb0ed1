"""What is measured: a case is one problem in one form, a result is how each contestant did in it, with its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import __version__
from ..core.state import needed_bytes
from ..errors import TaylorAttentionError, expect
from .machine import GEMM, READ

OURS, SOFTMAX, RECURRENT = "taylor", "sdpa", "recurrent"
PURE, SLIDING = "pure", "sliding"
"""In cases with a window: ours without it, and softmax over the window alone."""
FORWARD = "taylor forward"
"""In training cases: the forward pass alone."""
EARLY, EARLY_CONTEXT = "taylor at 1,024", 1024
"""In longer decoding cases: the same step after so few tokens, by turns with that of the case."""
OWN = (OURS, FORWARD, EARLY)
"""Contestants that are no rivals."""

START, PREFILL, TRAIN, DECODE, MODEL = KINDS = ("start", "prefill", "train", "decode", "model")

MODEL_SHAPE = (16, 2)
"""Head size and degree of the shipped model."""

MODEL_CONTEXT = 16384
"""The models read longer contexts only where there is no shorter one: softmax takes minutes for 64K bytes."""


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run, and must agree before its results are taken up again.

    Attributes:
        width: heads times head size.
        threads: of PyTorch.
        seed: of the inputs.
        repeats: turns of a case at most. budget: seconds of a case's timing, at least three turns however.
        patience: seconds that one call of a rival may take, or reading one context ten times as long.
        backend, chunk: as `attention` takes them.
        against: rivals by name, besides the two that are always there.
        max_state_bytes: larger states are skipped.
        version: of this package.
    """

    width: int = 512
    threads: int = 1
    seed: int = 0
    repeats: int = 7
    budget: float = 1.5
    patience: float = 1.0
    backend: str = "auto"
    chunk: int | None = None
    against: tuple[str, ...] = ()
    max_state_bytes: int = 2**30
    version: str = __version__


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        length: the context of a decode or model step, or the tokens of a prefill or training step.
        window: how many of the latest tokens are attended to exactly.
    """

    kind: str
    head_dim: int
    degree: int
    length: int
    window: int = 0


@dataclass(frozen=True)
class Outcome:
    """How one contestant did.

    Attributes:
        milliseconds: of a step, median over turns; None where it did not take part, and `skipped` says why.
        fastest, slowest: of the turns, in milliseconds. turns, steps: turns timed, and steps in each.
        error: largest relative L2 difference from the float64 reference, None where there is nothing to compare.
        nbytes: allocated for the context (decode, model), or the most by which resident memory grew in a call.
        attention: milliseconds of the step that the attention operator takes (model).
        skipped: why it did not take part.
    """

    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    turns: int = 0
    steps: int = 0
    error: float | None = None
    nbytes: int | None = None
    attention: float | None = None
    skipped: str | None = None

    @property
    def attention_share(self) -> float | None:
        """Of the step's time that the attention operator takes (model)."""
        return None if self.attention is None or self.milliseconds is None else self.attention / self.milliseconds


@dataclass(frozen=True)
class Result:
    """A finished case.

    Attributes:
        outcomes: by contestant, ours under `OURS`.
        rates: FLOP/s and bytes/s of the machine, taken by turns with the contestants.
        needed: FLOPs (prefill) or bytes (decode) that the method cannot avoid.
        window_needed: FLOPs among them that are the window's (prefill).
        chunk: tokens per chunk that the library takes (prefill).
        peak_bytes: the most resident memory while the case was timed, of the whole process with all contestants in it.
        seconds: that the case took, checks included.
    """

    case: Case
    outcomes: dict[str, Outcome]
    rates: dict[str, float] = field(default_factory=dict)
    needed: int | None = None
    window_needed: int | None = None
    chunk: int | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0

    def milliseconds(self, name: str) -> float | None:
        """The time of a contestant; None where it did not take part."""
        return self.outcomes[name].milliseconds if name in self.outcomes else None

    @property
    def fraction(self) -> float | None:
        """Of the limit's rate that ours reaches."""
        own = self.milliseconds(OURS)
        rate = self.rates.get(READ if self.case.kind == DECODE else GEMM)
        return None if own is None or rate is None or self.needed is None else self.needed / (own / 1e3) / rate

    @property
    def window_ratio(self) -> float | None:
        """Of a prefill with a window: its time over that of the pure method and of the window's FLOPs in the GEMM."""
        own, pure, rate = self.milliseconds(OURS), self.milliseconds(PURE), self.rates.get(GEMM)
        if own is None or pure is None or rate is None or self.window_needed is None:
            return None
        return own / (pure + 1e3 * self.window_needed / rate)

    @property
    def forward_ratio(self) -> float | None:
        """Of a training case: forward and backward over forward."""
        both, forward = self.milliseconds(OURS), self.milliseconds(FORWARD)
        return None if both is None or forward is None else both / forward

    @property
    def early_ratio(self) -> float | None:
        """Of a decoding case: a step after its context over one after `EARLY_CONTEXT` tokens."""
        own, early = self.milliseconds(OURS), self.milliseconds(EARLY)
        return None if own is None or early is None else own / early

    @property
    def attention_shares(self) -> dict[str, float | None]:
        """Of a model case: what part of each contestant's step its attention operator takes."""
        return {name: outcome.attention_share for name, outcome in self.outcomes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is derived stands there too, for readers."""
        names = ("fraction", "window_ratio", "forward_ratio", "early_ratio", "attention_shares")
        return asdict(self) | {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Result:
        """The result that gave this dict; KeyError, TypeError or AttributeError if none did."""
        outcomes = {name: Outcome(**outcome) for name, outcome in fields["outcomes"].items()}
        names = ("rates", "needed", "window_needed", "chunk", "peak_bytes", "seconds")
        return cls(Case(**fields["case"]), outcomes, **{name: fields[name] for name in names})


@dataclass(frozen=True)
class Ready:
    """A contestant that has been checked: its step, what is known of it before it is timed, and how to time it."""

    step: Callable[[], object]
    error: float | None = None
    nbytes: int | None = None
    together: int = 1
    often: int = 1


class DeclinedError(TaylorAttentionError):
    """A contestant does not take part in a case; the message says why."""


def plan_cases(
    kinds: Iterable[str],
    head_dims: Iterable[int],
    degrees: Iterable[int],
    *,
    contexts: Iterable[int],
    lengths: Iterable[int],
    window: int = 0,
) -> list[Case]:
    """Every combination, kind by kind in the order of `KINDS`, short before long; start-up is one case.

    The shipped model has one shape, whatever is asked for, and reads contexts up to `MODEL_CONTEXT`, else the shortest.
    Neither it nor start-up has a window.
    """
    sizes = {DECODE: sorted(set(contexts)), PREFILL: sorted(set(lengths)), TRAIN: sorted(set(lengths)), START: [256]}
    sizes[MODEL] = [size for size in sizes[DECODE] if size <= MODEL_CONTEXT] or sizes[DECODE][:1]
    shapes = [(head_dim, degree) for head_dim in sorted(set(head_dims)) for degree in sorted(set(degrees))]
    wanted = set(kinds)
    return [
        Case(kind, head_dim, degree, size, 0 if kind in (START, MODEL) else window)
        for kind in KINDS
        if kind in wanted
        for head_dim, degree in {START: shapes[:1], MODEL: [MODEL_SHAPE]}.get(kind, shapes)
        for size in sizes[kind]
    ]


def count_heads(case: Case, settings: Settings) -> int:
    """Heads of a case: the width over the head size.

    Raises:
        ArgumentError: the head size does not divide the width.
    """
    divides = case.head_dim >= 1 and settings.width % case.head_dim == 0
    expect(divides, "--head-dim", f"a divisor of the width {settings.width}", case.head_dim)
    return settings.width // case.head_dim


def refuse_large_state(case: Case, settings: Settings) -> None:
    """Decline a case whose state is over the limit.

    Raises:
        DeclinedError: it is.
    """
    heads, near = count_heads(case, settings), (case.window, 0, 0)
    needed = needed_bytes(heads, case.head_dim, case.head_dim + 1, case.degree, near, torch.float32)
    if needed > settings.max_state_bytes:
        raise DeclinedError(f"larger than --max-state-bytes {settings.max_state_bytes:,}: a state of {needed:,} bytes")

"""The same small model, data and budget: softmax against Taylor's series, by degree, head size and what helps."""

from __future__ import annotations

from statistics import mean
from typing import Any

from ...nn import ModelConfig
from .experiment import Case, Experiment, Finding, Findings, Table, number
from .learning import judge, learn, state_bytes
from .noted_text import noted_text, plain_text
from .training_pictures import pictures

WIDTH, LAYERS, LENGTH = 64, 2, 512
STEPS = {"notes": 600, "text": 300}
BATCH = {"notes": 2, "text": 4}
RATE = 4e-3
WINDOWS = 64
"""Of validation text."""

NEAR = 0.01
"""How much more loss than softmax's still counts as at least as good."""

SIZES = {64: 1, 32: 2, 16: 4, 8: 8}
"""Head sizes and how many heads they make of the width."""


def heads(size: int, count: int | None = None, **options: Any) -> dict[str, Any]:
    """Options of a model with heads of this size."""
    return {"head_dim": size, "num_heads": SIZES[size] if count is None else count, **options}


def softmax(size: int, **options: Any) -> dict[str, Any]:
    """A softmax model."""
    return heads(size, attention="softmax", **options)


FIRST: dict[str, Any] = {"degree": 2, "window": 128, "far_layers": 1, "far_dim": 32}
"""A far part, with keys of its own, in the first layer alone."""

MAIN: dict[str, dict[str, Any]] = {
    "softmax, 1 x 64": softmax(64),
    "softmax, 2 x 32": softmax(32),
    "softmax, 4 x 16": softmax(16),
    "softmax, 8 x 8": softmax(8),
    "softmax, 2 x 32: with RoPE": softmax(32, rope=True),
    "window 256 alone, 2 x 32": heads(32, degree=None, window=256),
    "degree 2, 2 x 32": heads(32, degree=2),
    "degree 2, 4 x 16": heads(16, degree=2),
    "degree 4, 8 x 8": heads(8, degree=4),
    "degree 2 + window 32, 2 x 32, 1 kv": heads(32, degree=2, window=32, num_kv_heads=1),
    "degree 2 + window 128, 2 x 32, 1 kv": heads(32, degree=2, window=128, num_kv_heads=1),
    "degree 2 + window 32, 2 x 36, 1 kv": {
        **heads(32, degree=2, window=32, num_kv_heads=1),
        "head_dim": 36,
        "value_dim": 32,
    },
    "degree 2 in the first layer + window 128, 2 x 32: near RoPE": heads(32, **FIRST, rope="near"),
}
"""What is run with every seed."""

SIDE: dict[str, dict[str, Any]] = {
    "window 32 alone, 2 x 32": heads(32, degree=None, window=32),
    "window 128 alone, 2 x 32": heads(32, degree=None, window=128),
    "degree 2, 1 x 64": heads(64, degree=2),
    "degree 2, 8 x 8": heads(8, degree=2),
    "degree 1, 2 x 32": heads(32, degree=1),
    "degree 3, 8 x 8": heads(8, degree=3),
    "degree 4, 4 x 16": heads(16, degree=4),
    "degree 2, 2 x 32, 1 kv": heads(32, degree=2, num_kv_heads=1),
    "degree 2, 8 x 16 (more heads)": heads(16, 8, degree=2),
    "degree 2, 2 x 16 with values of 64": heads(16, 2, degree=2, value_dim=64),
    "degree 2, 2 x 24 with values of 32": {"head_dim": 24, "num_heads": 2, "value_dim": 32, "degree": 2},
    "degree 4, 4 x 8 with values of 32": heads(8, 4, degree=4, value_dim=32),
    "degree 2, 2 x 32: without QK-norm": heads(32, degree=2, qk_norm=False),
    "degree 2, 2 x 32: without convolution": heads(32, degree=2, conv=0),
    "degree 2, 2 x 32: with RoPE": heads(32, degree=2, rope=True),
    "degree 2, 2 x 32: decay per head": heads(32, degree=2, decay="head"),
    "degree 2, 2 x 32: decay per token": heads(32, degree=2, decay="token"),
    "degree 2, 2 x 32: fitted": heads(32, degree=2, reading="fitted"),
    "degree 2, 2 x 32: centred keys": heads(32, degree=2, center_keys=True),
    "degree 2 + window 32 + 4 sinks, 2 x 32, 1 kv": heads(32, degree=2, window=32, sinks=4, num_kv_heads=1),
    "degree 2 + window 32, 2 x 32, 1 kv: decay per token": heads(
        32, degree=2, window=32, num_kv_heads=1, decay="token"
    ),
    "degree 2 + window 32, 2 x 32, 1 kv: fitted": heads(32, degree=2, window=32, num_kv_heads=1, reading="fitted"),
    "degree 2 + window 32 + far gain, 2 x 32, 1 kv": heads(32, degree=2, window=32, far_gain=True, num_kv_heads=1),
    "softmax, 2 x 32: without convolution": softmax(32, conv=0),
    "degree 2 + window 128, 2 x 32, 1 kv: with RoPE": heads(32, degree=2, window=128, num_kv_heads=1, rope=True),
    "degree 2 + window 128, 2 x 32, 1 kv: near RoPE": heads(32, degree=2, window=128, num_kv_heads=1, rope="near"),
    "degree 2 + window 128, 2 x 32, far keys of 20: near RoPE": heads(
        32, degree=2, window=128, far_dim=20, rope="near"
    ),
    "degree 2 in the first layer + window 128, 2 x 32, far keys of 24: near RoPE": heads(
        32, **FIRST | {"far_dim": 24}, rope="near"
    ),
    "softmax, 2 x 32, 1 kv: with RoPE": softmax(32, num_kv_heads=1, rope=True),
    "degree 2 in the first layer + window 128, 2 x 32: with RoPE": heads(32, **FIRST, rope=True),
    "window 448 alone, 2 x 32: with RoPE": heads(32, degree=None, window=448, rope=True),
}
"""What is run with the first seed alone."""

TEXT = ("softmax, 4 x 16", "window 128 alone, 2 x 32", "window 32 alone, 2 x 32", "degree 2, 4 x 16")
"""What is run on the text without notes too, with the first seed."""

SEEDS = 3


def plan(quick: bool) -> list[Case]:
    """The main rows with all seeds, the others with the first; a quick look takes four rows and fewer steps."""
    if quick:
        rows = ("softmax, 2 x 32", "window 32 alone, 2 x 32", "degree 2 + window 128, 2 x 32, 1 kv", "degree 3, 8 x 8")
        return [_case("notes", row, 0, 60) for row in rows]
    cases = [_case("notes", row, run, STEPS["notes"]) for run in range(SEEDS) for row in MAIN]
    cases += [_case("notes", row, 0, STEPS["notes"]) for row in SIDE]
    return cases + [_case("text", row, 0, STEPS["text"]) for row in TEXT]


def _case(data: str, row: str, run: int, steps: int) -> Case:
    return {"data": data, "model": row, "run": run, "steps": steps}


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Train the row's model; its losses, its curve, its state at 512 tokens and its time."""
    notes = case["data"] == "notes"
    texts = [
        noted_text(side, seed) if notes else plain_text(side, most)
        for side, most in (("training", 2_000_000), ("validation", 100_000))
    ]
    options = {"rope": not notes, "decay": None, "conv": 4} | (MAIN | SIDE)[case["model"]]
    config = ModelConfig(d_model=WIDTH, num_layers=LAYERS, **options)
    learnt = learn(
        config,
        texts[0],
        steps=case["steps"],
        batch=BATCH[case["data"]],
        length=LENGTH,
        rate=RATE,
        seed=1000 * seed + case["run"],
        recall=notes,
    )
    whole = learnt.stopped is None
    return {
        "losses": judge(learnt.model, texts[1], length=LENGTH, windows=WINDOWS) if whole else None,
        "stopped": learnt.stopped,
        "curve": learnt.curve,
        "ms_per_step": learnt.milliseconds,
        "state_bytes": state_bytes(learnt.model, LENGTH),
        "parameters": sum(parameter.numel() for parameter in learnt.model.parameters()),
    }


def group(findings: Findings, data: str) -> dict[str, list[Finding]]:
    """Findings of each row on this data, all seeds together, in the order of the plan."""
    rows: dict[str, list[Finding]] = {}
    for each in findings:
        if each.case["data"] == data:
            rows.setdefault(each.case["model"], []).append(each)
    return rows


def mean_loss(row: list[Finding], part: str = "loss") -> float | None:
    """Over the seeds; None if a run stopped, or if it has no such part."""
    values = [each.values["losses"] and each.values["losses"][part] for each in row]
    return None if None in values else mean(values)


def tables(findings: Findings) -> list[Table]:
    """One for each data set."""
    return [_table(group(findings, data), data) for data in STEPS if group(findings, data)]


def _table(rows: dict[str, list[Finding]], data: str) -> Table:
    parts = {"notes": {"known values": "known", "33-128 back": "to 128", "257-512 back": "to 512"}, "text": {}}[data]
    return Table(
        {"notes": "Words with notes that come again", "text": "Speeches and plays as they are"}[data],
        ("model", "seeds", "loss", "spread", *parts, "KiB at 512", "ms per step", "parameters"),
        tuple(
            (
                name,
                str(len(row)),
                *_losses(row),
                *(_show(mean_loss(row, part)) for part in parts.values()),
                number(row[0].values["state_bytes"] / 1024),
                number(mean(each.values["ms_per_step"] for each in row)),
                f"{row[0].values['parameters']:,}",
            )
            for name, row in sorted(rows.items(), key=lambda item: mean_loss(item[1]) or float("inf"))
        ),
        "Losses in nats per byte on held-out documents; spread: between the seeds, largest less smallest. KiB at 512: "
        "the states of all layers after 512 tokens, float32, with what compensates their rounding. Milliseconds of "
        "processor time, one thread. 'stopped': the normaliser failed at that step, ending the run. 1 kv: query heads "
        "share one key/value head. All rows have a convolution of 4, QK-norm and no decay unless they say otherwise"
        + (_POSITIONS if data == "notes" else "; RoPE."),
    )


_POSITIONS = (
    "; positions enter by the convolution alone, unless with RoPE; near RoPE turns queries and keys for near tokens "
    "only. Degree 2 in the first layer: the other one has its window alone; far keys are made of the head's by learned "
    "matrices, of 32 entries unless it says otherwise."
)


def _losses(row: list[Finding]) -> tuple[str, str]:
    """Loss and its spread."""
    loss = mean_loss(row)
    if loss is None:
        steps = [each.values["stopped"] for each in row if each.values["stopped"] is not None]
        return f"stopped at {min(steps)}", ""
    values = [each.values["losses"]["loss"] for each in row]
    return f"{loss:.3f}", f"{max(values) - min(values):.3f}" if len(values) > 1 else ""


def _show(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.2f}"


def conclusions(findings: Findings) -> list[str]:
    """Whether the far past pays here; the best row with a state below the cache; what stopped; the text alone.

    What is best is chosen among the rows that were run with all seeds.
    """
    told = []
    grouped = group(findings, "notes")
    rows = {name: (mean_loss(row), row[0].values["state_bytes"]) for name, row in grouped.items()}
    done = {name: (loss, size) for name, (loss, size) in rows.items() if loss is not None}
    seeds = max((len(grouped[name]) for name in done), default=0)
    firm = {name: each for name, each in done.items() if len(grouped[name]) == seeds}  # one run may have been lucky
    caches = {name: each for name, each in firm.items() if name.startswith("softmax")}
    alone = {name: each for name, each in done.items() if "alone" in name}
    ours = {name: each for name, each in firm.items() if name.startswith("degree")}
    if caches:
        best, (least, cache) = min(caches.items(), key=lambda item: item[1][0])
        for name, (loss, _) in sorted(alone.items()):
            told.append(
                f"With notes, {best} reaches {least:.3f} nats per byte; {name}: {loss:.3f} ({_more(loss, least)})."
            )
        small = {name: each for name, each in ours.items() if each[1] < cache}
        told += _recipe(small, best, least, cache) + _same_positions(small, caches) + _as_many_bytes(small, alone)
    stopped = [name for name, (loss, _) in rows.items() if loss is None]
    if stopped:
        told.append(f"A normaliser failed while training, which ended the run: {'; '.join(stopped)}.")
    text = {name: mean_loss(row) for name, row in group(findings, "text").items()}
    if text:
        listed = ", ".join(f"{name} {loss:.3f}" for name, loss in text.items() if loss is not None)
        told.append(f"On speeches and plays as they are, at this size and budget: {listed}.")
    return told


def _recipe(small: dict[str, tuple[float, int]], best: str, least: float, cache: int) -> list[str]:
    """The best row among those with a state below the cache."""
    if not small:
        return ["No finished row of ours has a state below the cache of 512 tokens."]
    name, (loss, size) = min(small.items(), key=lambda item: item[1][0])
    verdict = "at least as good (within 1%)" if loss <= (1 + NEAR) * least else "not as good"
    return [
        f"Of ours with a state below that cache ({cache / 1024:.0f} KiB), {name} is best: {loss:.3f} nats per byte, "
        f"{_more(loss, least)} than {best}, with {size / 1024:.0f} KiB: {verdict}."
    ]


def _same_positions(small: dict[str, tuple[float, int]], caches: dict[str, tuple[float, int]]) -> list[str]:
    """The best row of ours beside the softmax row that learns positions in the same way, where that is another one."""
    if not small:
        return []
    name, (loss, _) = min(small.items(), key=lambda item: item[1][0])
    alike = {other: least for other, (least, _) in caches.items() if ("RoPE" in other) == ("RoPE" in name)}
    if not alike:
        return []
    best = min(alike, key=alike.__getitem__)
    if best == min(caches, key=caches.__getitem__):  # beside which it stands already
        return []
    return [
        f"Beside {best}, which like it has {'' if 'RoPE' in name else 'no '}RoPE, that is {_more(loss, alike[best])}."
    ]


def _as_many_bytes(small: dict[str, tuple[float, int]], alone: dict[str, tuple[float, int]]) -> list[str]:
    """The best row of ours beside the best window alone of no more bytes."""
    if not small:
        return []
    _, (loss, size) = min(small.items(), key=lambda item: item[1][0])
    windows = {name: each for name, each in alone.items() if each[1] <= size}
    if not windows:
        return []
    name, (other, bytes_) = min(windows.items(), key=lambda item: item[1][0])
    return [
        f"A window of no more bytes, {name} with {bytes_ / 1024:.0f} KiB, reaches {other:.3f} on these {LENGTH} "
        f"tokens: {_more(other, loss)}. Beyond them see how the models read on."
    ]


def _more(loss: float, least: float) -> str:
    return f"{abs(loss / least - 1):.1%} {'more' if loss >= least else 'less'}"


EXPERIMENT = Experiment(
    "training",
    "Trained models: softmax and Taylor's series",
    "Which model with a state of constant size learns as well as softmax where the far past pays?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

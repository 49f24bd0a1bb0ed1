"""Tables, pictures and sentences of the experiment `runtime`."""

from __future__ import annotations

from typing import Any

from .drawing import add_legend, panels
from .experiment import Finding, Findings, Picture, Table, number


def tables(findings: Findings) -> list[Table]:
    """A row per head size and context."""
    rows = [
        (
            f"{_name(each)}, {own['context']:,}",
            _number(own.get("stream_us")),
            _number(own.get("taylor", [None])[0]),
            _number(own.get("softmax", [None])[0]),
            _number(own.get("state_bytes")),
            _number(own.get("resident_bytes")),
            _number(own.get("cache_bytes")),
        )
        for each in findings
        for own in each.values["contexts"]
        if "taylor" in own or "softmax" in own
    ]
    note = (
        "One layer of heads x head size, degree 3, float32, one sequence. read: microseconds for each token that the "
        "state takes in, since the row above. step: milliseconds, median over turns. process: bytes by which it has "
        "grown since before the first token. -: not measured, as reading would take longer than a case has, or the "
        "cache would not fit."
    )
    columns = ("heads, context", "read (us)", "step: Taylor", "step: softmax", "state bytes", "process", "cache bytes")
    return [Table("After so many tokens", columns, tuple(rows), note)]


def _name(finding: Finding) -> str:
    return f"{finding.case['heads']} x {finding.case['head_dim']}"


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def pictures(findings: Findings) -> list[Picture]:
    """A step's time, and bytes held, by context."""
    figure, (times, memory) = panels(2, width=5.0, height=4.0)
    for color, each in enumerate(findings):
        for axes, names in ((times, ("taylor", "softmax")), (memory, ("state_bytes", "cache_bytes"))):
            for name, style in zip(names, ("-", ":"), strict=True):
                points = [(own["context"], _first(own[name])) for own in each.values["contexts"] if name in own]
                label = _name(each) if style == "-" else None
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.plot(x, y, style, color=f"C{color}", marker="." if style == ":" else "o", label=label)
    for axes, what in ((times, "milliseconds per decoded token"), (memory, "bytes of state or cache")):
        axes.set(xscale="log", yscale="log", xlabel="context (tokens that were processed)", ylabel=what)
        add_legend(axes, loc="upper left")
    caption = (
        "One layer of heads x head size, degree 3: Taylor attention (solid) after streams that were really processed, "
        "and softmax over a cache of as many tokens (dotted)."
    )
    return [Picture("runtime", caption, figure)]


def _first(value: Any) -> float:
    return value[0] if isinstance(value, list) else value


def conclusions(findings: Findings) -> list[str]:
    """How constant a token's cost is, and from where on softmax's is larger."""
    return [sentence for each in findings for sentence in _of_head(each)]


def _of_head(finding: Finding) -> list[str]:
    streamed = [own for own in finding.values["contexts"] if "taylor" in own]
    if not streamed:
        return []
    name, last, steps = _name(finding), streamed[-1], [own["taylor"][0] for own in streamed]
    told = [
        f"{name}: {last['context']:,} tokens were processed; at {streamed[0]['context']:,} and more a step "
        f"takes {min(steps):.2g} to {max(steps):.2g} ms, and the state has {last['state_bytes']:,} bytes."
    ]
    both = [own for own in streamed if "softmax" in own]
    slower = [own for own in both if own["softmax"][0] > own["taylor"][0]]
    if slower:
        largest = slower[-1]
        ratio = largest["softmax"][0] / largest["taylor"][0]
        memory = largest["cache_bytes"] / largest["state_bytes"]
        told.append(
            f"{name}: softmax's step is the slower one from {slower[0]['context']:,} tokens on; at "
            f"{largest['context']:,} it takes {ratio:,.1f} times as long and its cache {memory:,.1f} times the bytes."
        )
    elif both:
        told.append(f"{name}: up to {both[-1]['context']:,} tokens softmax's step is the faster one.")
    return told

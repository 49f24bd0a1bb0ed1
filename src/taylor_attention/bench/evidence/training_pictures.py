"""Pictures of the experiment on training: loss against state, recall by distance, and curves."""

from __future__ import annotations

from .drawing import panels
from .experiment import Findings, Picture, select
from .learning import DISTANCES

SHOWN = (
    "softmax, 2 x 32",
    "window 32 alone, 2 x 32",
    "window 256 alone, 2 x 32",
    "degree 2, 2 x 32",
    "degree 2, 4 x 16",
    "degree 4, 8 x 8",
    "degree 2 + window 32, 2 x 32, 1 kv",
    "degree 2 + window 128, 2 x 32, 1 kv",
)
"""Rows whose recall and curves are drawn, of the first seed."""

TICKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""KiB."""

KINDS = {"softmax": "C0", "window": "C3", "degree": "C2"}
"""By how their names begin."""


def pictures(findings: Findings) -> list[Picture]:
    """Of what was trained on the text with notes."""
    notes = [each for each in select(findings, data="notes") if each.values["losses"] is not None]
    if not notes:
        return []
    figure, (sizes, recall, curves) = panels(3, height=4.6)
    for kind, color in KINDS.items():
        own = [each for each in notes if each.case["model"].startswith(kind)]
        x, y = ([each.values["state_bytes"] / 1024 for each in own], [each.values["losses"]["loss"] for each in own])
        sizes.scatter(x, y, color=color, s=18, alpha=0.7, label=kind if kind != "window" else "window alone")
    sizes.set(xscale="log", xlabel="KiB of state at 512 tokens", ylabel="validation loss (nats per byte)")
    for shade, name in enumerate(SHOWN):
        for each in select(notes, model=name, run=0):
            losses = each.values["losses"]
            reached = [(end, losses[f"to {end}"]) for end in DISTANCES if losses[f"to {end}"] is not None]
            recall.plot(*zip(*reached, strict=True), marker="o", markersize=3, color=f"C{shade}", label=name)
            curves.plot(*zip(*each.values["curve"], strict=True), color=f"C{shade}")
    recall.set(xscale="log", xlabel="bytes back, at most", ylabel="loss of a known value (nats)")
    recall.set_xticks(DISTANCES, [str(end) for end in DISTANCES], minor=False)
    recall.minorticks_off()
    curves.set(xlabel="step", ylabel="training loss (nats per byte)")
    sizes.set_xticks(TICKS, [str(tick) for tick in TICKS], minor=False)
    sizes.minorticks_off()
    sizes.legend(fontsize="small")
    figure.legend(*recall.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    caption = (
        "Text with notes that come again. Left: every run, its loss against its state. Middle: loss of values that "
        "stood before, by how far back (a guess: 2.77). Right: training."
    )
    return [Picture("training", caption, figure)]

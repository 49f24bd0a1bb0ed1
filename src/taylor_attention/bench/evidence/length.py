"""Trained on 512 tokens, read to 65,536: the loss by position, of softmax too."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NormaliserError
from ...nn import LanguageModel, ModelConfig
from .drawing import panels
from .experiment import Case, Experiment, Findings, Picture, Table, number, select
from .learning import learn, recall_losses
from .noted_text import PERIOD, noted_text, recall_distances
from .training import BATCH, FIRST, LAYERS, LENGTH, RATE, STEPS, WIDTH, heads, softmax

MODELS: dict[str, dict[str, Any]] = {
    "softmax": softmax(32),
    "softmax, RoPE": softmax(32, rope=True),
    "softmax, decay": softmax(32, decay="head"),
    "window 256 alone": heads(32, degree=None, window=256),
    "degree 2": heads(32, degree=2),
    "degree 2, RoPE": heads(32, degree=2, rope=True),
    "degree 2, decay": heads(32, degree=2, decay="head"),
    "degree 2 + window 128": heads(32, degree=2, window=128, num_kv_heads=1),
    "degree 2 + window 128, decay": heads(32, degree=2, window=128, num_kv_heads=1, decay="head"),
    "degree 4, heads of 8": heads(8, degree=4),
    "window 448 alone, RoPE": heads(32, degree=None, window=448, rope=True),
    "degree 2 in the first layer + window 128, near RoPE": heads(32, **FIRST, rope="near"),
    "degree 2 in the first layer + window 128, near RoPE, decay": heads(32, **FIRST, rope="near", decay="head"),
}
"""Heads of 32 unless they say otherwise."""

LONGEST = 65_536
QUICK = 4096
BLOCK = 512
TICKS = (512, 2048, 8192, 32_768)


def plan(quick: bool) -> list[Case]:
    """Every model; a quick look reads less, with less trained models, and fewer of them."""
    models = ("softmax", "degree 2, decay", "window 256 alone") if quick else MODELS
    return [{"model": name, "steps": 60 if quick else STEPS["notes"], "tokens": QUICK if quick else LONGEST}
            for name in models]  # fmt: skip


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Train; then the losses by position in one text whose values never change, and in one where they do."""
    config = ModelConfig(
        d_model=WIDTH, num_layers=LAYERS, **{"rope": False, "decay": None, "conv": 4} | MODELS[case["model"]]
    )
    learnt = learn(
        config,
        noted_text("training", seed),
        steps=case["steps"],
        batch=BATCH["notes"],
        length=LENGTH,
        rate=RATE,
        seed=1000 * seed,
        recall=True,
    )
    if learnt.stopped is not None:
        return {"stopped": learnt.stopped}
    return {"stopped": None} | {
        name: _read(learnt.model, noted_text("validation", seed, period=period)[: case["tokens"] + 1].long())
        for name, period in (("changing", PERIOD), ("constant", LONGEST))
    }


@torch.no_grad()
def _read(model: LanguageModel, text: Tensor) -> dict[str, Any]:
    """One text [N + 1] from its beginning, block by block: losses by position, and time and bytes at its end."""
    states, read = model.new_states(1), torch.zeros(0)
    started, failed = time.process_time(), None
    for start in range(0, len(text) - 1, BLOCK):
        part = text[start : min(start + BLOCK, len(text) - 1)]
        try:
            logits = model.decode_(part[None], states)[0]
        except NormaliserError:
            failed = start
            break
        wanted = text[start + 1 : start + 1 + len(part)]
        read = torch.cat([read, functional.cross_entropy(logits, wanted, reduction="none")])
    seconds = time.process_time() - started
    size = sum(state.nbytes for state in states)
    return {"ranges": _ranges(read, text), "failed": failed, "seconds": seconds, "state_bytes": size}


def _ranges(losses: Tensor, text: Tensor) -> list[dict[str, Any]]:
    """Mean losses up to 512 tokens, from there to 1024, and so on, doubling."""
    known = recall_distances(text[None, :-1])[0]
    ranges: list[dict[str, Any]] = []
    begin, end = 0, BLOCK
    while begin < len(losses):
        own = losses[begin:end]
        place = {"from": begin, "to": begin + len(own), "loss": float(own.mean())}
        ranges.append(place | recall_losses(own, known[begin : begin + len(own)]))
        begin, end = end, 2 * end
    return ranges


TEXTS = {"changing": f"values drawn anew every {PERIOD:,} notes", "constant": "values that never change"}


def tables(findings: Findings) -> list[Table]:
    """Loss by position, one for each text."""
    return [_table(findings, text, title) for text, title in TEXTS.items()]


def _table(findings: Findings, text: str, title: str) -> Table:
    ends = sorted({place["to"] for each in findings for place in each.values.get(text, {"ranges": []})["ranges"]})
    rows = []
    for each in findings:
        if each.values["stopped"] is not None:
            rows.append((each.case["model"], *([""] * len(ends)), f"stopped at {each.values['stopped']}", ""))
            continue
        own = each.values[text]
        reached = {place["to"]: place["loss"] for place in own["ranges"]}
        losses = (f"{reached[end]:.2f}" if end in reached else "failed" for end in ends)
        rows.append((each.case["model"], *losses, number(own["seconds"]), number(own["state_bytes"] / 1024)))
    return Table(
        f"Loss by position: {title}",
        ("model", *(f"to {end:,}" for end in ends), "seconds", "KiB"),
        tuple(rows),
        f"Nats per byte, trained at {LENGTH} tokens, one seed; each column from where the one before ends. Seconds of "
        "processor time and bytes of state for the whole text, read in blocks.",
    )


def pictures(findings: Findings) -> list[Picture]:
    """Losses by position in both texts."""
    figure, axes = panels(2, height=4.6)
    for where, (text, title) in zip(axes, TEXTS.items(), strict=True):
        for shade, name in enumerate(MODELS):
            for each in select(findings, model=name):
                places = each.values.get(text, {"ranges": []})["ranges"]
                x, y = [place["to"] for place in places], [place["loss"] for place in places]
                line = "-" if shade < 10 else "--"  # there are ten colours
                where.plot(x, y, line, marker="o", markersize=3, color=f"C{shade % 10}", label=name)
        where.set(xscale="log", xlabel="position, at most", ylabel="loss (nats per byte)", title=title)
        where.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
        where.minorticks_off()
        where.axvline(LENGTH, color="gray", linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    caption = (
        f"Trained on {LENGTH} tokens (dotted), read far beyond: the mean loss from the point before to each point."
    )
    return [Picture("length", caption, figure)]


def conclusions(findings: Findings) -> list[str]:
    """Who keeps the loss of the length trained at, and who does not."""
    told = []
    for text, title in TEXTS.items():
        changes = {}
        for each in findings:
            places = each.values.get(text, {"ranges": []})["ranges"]
            if len(places) > 1 and each.values[text]["failed"] is None:
                changes[each.case["model"]] = (places[0]["loss"], places[-1]["loss"], places[-1]["to"])
        listed = ", ".join(f"{name} {first:.2f} to {last:.2f}" for name, (first, last, _) in changes.items())
        if changes:
            longest = max(end for _, _, end in changes.values())
            told.append(f"With {title}, from the first {LENGTH} tokens to the last of {longest:,}: {listed}.")
    return told


EXPERIMENT = Experiment(
    "length",
    "Read further than trained",
    "What does the loss do beyond the length that a model was trained at?",
    plan,
    tables,
    pictures,
    conclusions,
    measure=measure,
)

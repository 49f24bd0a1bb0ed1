"""Tables, pictures and sentences of the experiment with pretrained models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .drawing import add_legend, panels
from .experiment import Finding, Findings, Picture, Table, number, select

SOFTMAX, WINDOW, BY_HEAD = "softmax", "sinks + window", "windows by head"
FAR = {
    "window + degree 1, centred": (1, "taylor"),
    "window + degree 1, fitted": (1, "fitted"),
    "window + degree 2, centred": (2, "taylor"),
}
"""Degree and reading of the far tokens."""

LEARNED = "window + learned far part"
DEGREES = (0, 1, 2, 3, 4)

Method = tuple[str, float | str]
"""A method with its budget: a share of the bytes of all keys and values, or the folder of what was learned for them."""


class Losses:
    """The mean losses of each method over the speeches.

    Attributes:
        found: for each method, its findings.
        ends: where the ranges of positions end.
    """

    def __init__(self, findings: Findings) -> None:
        self.found: dict[Method, list[Finding]] = {}
        for each in select(findings, model="smollm2"):
            self.found.setdefault((each.case["method"], each.case["budget"]), []).append(each)
        self.ends = sorted({place["to"] for each in self for place in each.values["ranges"]})

    def __iter__(self) -> Iterator[Finding]:
        return (each for some in self.found.values() for each in some)

    def at(self, method: Method, end: int | None = None, what: str = "loss") -> float | None:
        """The loss in the range that ends there, or in the last one; None if some speech could not be read."""
        if not self.ends:
            return None
        losses = [_loss(each, end or self.ends[-1], what) for each in self.found.get(method, [])]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known and len(known) == len(losses) else None

    def rival(self, method: Method) -> Method:
        """Sinks and a window at the bytes of a method."""
        return WINDOW, method[1]

    def closed(self, method: Method) -> float | None:
        """The share of the gap between its rival and softmax that a method closes, over the last range."""
        own, plain, best = (self.at(each) for each in (method, self.rival(method), (SOFTMAX, 1.0)))
        if own is None or plain is None or best is None or plain <= best or method[0] == SOFTMAX:
            return None
        return (plain - own) / (plain - best)

    def nbytes(self, method: Method) -> int:
        """Of one sequence at the end of the text."""
        return int(self.found[method][0].values["bytes"])

    def share(self, method: Method) -> float | None:
        """Bytes as a share of those of all keys and values."""
        whole = (SOFTMAX, 1.0)
        return self.nbytes(method) / self.nbytes(whole) if whole in self.found else None


def _loss(finding: Finding, end: int, what: str = "loss") -> float | None:
    return next((place.get(what) for place in finding.values["ranges"] if place["to"] == end), None)


def _label(method: Method) -> str:
    """A method in tables; what was learned with the folder that it is in."""
    return f"{method[0]}: {method[1]}" if method[0] == LEARNED else method[0]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def _digits(value: float | None, absent: str = "failed") -> str:
    return absent if value is None else f"{value:.4f}"


def tables(findings: Findings) -> list[Table]:
    """Losses by position and by text, what heads keep, and embeddings."""
    losses = Losses(findings)
    apart = _apart(losses)
    return [
        _by_position(losses),
        _by_speech(losses),
        *([apart] if apart.rows else []),
        _kept(losses),
        _encoder(findings),
    ]


def _by_position(losses: Losses) -> Table:
    rows = []
    for method in losses.found:
        own = (_digits(losses.at(method, end)) for end in losses.ends)
        size = number(losses.nbytes(method) / 1e6)
        rows.append((_label(method), _percent(losses.share(method)), size, *own, _percent(losses.closed(method))))
    return Table(
        "SmolLM2-135M: next-token loss by position",
        ("method", "bytes", "MB", *(f"to {end:,}" for end in losses.ends), "gap closed"),
        tuple(rows),
        "Nats per token, mean of the speeches; each column from where the one before ends. Bytes of one sequence in "
        "float32 at the end of the text, of all layers, as a share of all keys and values. Gap closed: (window alone "
        "at these bytes - method) / (window alone - softmax), last column of losses. Failed: a normaliser was not "
        "safely positive.",
    )


def _by_speech(losses: Losses) -> Table:
    names = list(dict.fromkeys(each.case["speech"] for each in losses))
    rows = []
    for method, found in losses.found.items():
        own = {each.case["speech"]: _loss(each, losses.ends[-1]) for each in found}
        seconds = sum(each.seconds for each in found) / len(found)
        cells = (_digits(own[name]) if name in own else "" for name in names)
        rows.append((_label(method), _percent(losses.share(method)), *cells, number(seconds)))
    where = f"to {losses.ends[-1]:,}" if losses.ends else ""
    return Table(
        f"SmolLM2-135M: each speech, last positions ({where})",
        ("method", "bytes", *names, "seconds"),
        tuple(rows),
        "Nats per token. Seconds of a whole text, the first case of a method with what it chooses by.",
    )


def _apart(losses: Losses) -> Table:
    """Divergence from softmax by position, where it was measured."""
    methods = [method for method in losses.found if losses.at(method, what="divergence") is not None]
    rows = [
        (
            _label(method),
            _percent(losses.share(method)),
            *(_digits(losses.at(method, end, "divergence")) for end in losses.ends),
        )
        for method in methods
    ]
    return Table(
        "SmolLM2-135M: how far next-token distributions are from those of softmax",
        ("method", "bytes", *(f"to {end:,}" for end in losses.ends)),
        tuple(rows),
        "Kullback-Leibler divergences in nats per token, mean of the speeches, by position as above.",
    )


def _kept(losses: Losses) -> Table:
    """Which heads keep what, by budget."""
    chosen = {method: found[0].values["heads"] for method, found in losses.found.items() if method[0] == BY_HEAD}
    counts = {method: {_kind(head): head["count"] for head in heads} for method, heads in chosen.items()}
    order = {_kind(head): _place(head) for heads in chosen.values() for head in heads}
    kinds = sorted(order, key=order.__getitem__)
    rows = [(kind, *(str(own.get(kind, 0)) for own in counts.values())) for kind in kinds]
    return Table(
        "Windows by head: how many key/value heads keep what",
        ("what is kept", *(f"at {_percent(losses.share(method))}" for method in chosen)),
        tuple(rows),
        "Chosen by the profiler within a budget of bytes, on speeches that are not measured on; beside 4 sinks.",
    )


def _place(head: dict[str, Any]) -> tuple[bool, int, str]:
    return head["window"] is None, head["window"] or 0, _kind(head)


def _kind(head: dict[str, Any]) -> str:
    """What a head keeps, in words."""
    if head["window"] is None:
        return "everything (softmax)"
    parts = [f"window {head['window']:,}"] + [f"{head['heavy']:,} heavy"] * (head["heavy"] > 0)
    if head["degree"] is not None:
        parts.append(f"degree {head['degree']}" + ", fitted" * (head["reading"] == "fitted"))
    return " + ".join(parts)


def _name(finding: Finding) -> str:
    degree = finding.case["degree"]
    return SOFTMAX if degree is None else f"degree {degree}" + ", centred" * finding.case["centred"]


def _encoder(findings: Findings) -> Table:
    rows = []
    for each in select(findings, model="minilm"):
        own = each.values
        numbers = (_digits(own[name]) for name in ("cosine", "lowest", "pearson"))
        rows.append((_name(each), number(own["bytes"] / 1e6), *numbers, str(own["unsafe"])))
    return Table(
        "MiniLM-L6-v2: embeddings of Lee's 50 documents, pure Taylor attention",
        ("attention", "MB", "cosine", "lowest", "Pearson", "unsafe"),
        tuple(rows),
        "MB: the state of one sequence in float32, of all layers; softmax: keys and values of 512 tokens. Cosine with "
        "softmax's embedding (mean, lowest) of the documents whose normalisers were safely positive in all layers, the "
        "others being unsafe; Pearson: correlation of cosines between documents with how similar people found them, "
        "1,225 pairs.",
    )


def pictures(findings: Findings) -> list[Picture]:
    """Losses and cosines against bytes."""
    figure, (left, right) = panels(2)
    losses = Losses(findings)
    for name in dict.fromkeys(name for name, _ in losses.found):
        points = [(losses.share(each), losses.at(each)) for each in losses.found if each[0] == name]
        drawn = sorted((100 * x, y) for x, y in points if x is not None and y is not None)
        if name == SOFTMAX and drawn:
            left.axhline(drawn[0][1], color="black", linestyle=":", label=SOFTMAX)
        elif drawn:
            left.plot(*zip(*drawn, strict=True), marker="o", label=name)
    where = f", last positions to {losses.ends[-1]:,}" if losses.ends else ""
    left.set(xlabel="bytes (% of all keys and values)", ylabel="loss (nats per token)", title=f"SmolLM2{where}")
    encoder = select(findings, model="minilm")
    for centred, label in ((False, "keys as they are"), (True, "centred keys")):
        own = [each for each in encoder if each.case["degree"] is not None and each.case["centred"] == centred]
        safe = [(each.values["bytes"] / 1e6, each.values["cosine"]) for each in own if each.values["unsafe"] == 0]
        if safe:
            right.plot(*zip(*safe, strict=True), marker="o", label=label)
    for each in select(encoder, degree=None):
        right.axvline(each.values["bytes"] / 1e6, color="black", linestyle=":", label="512 cached tokens")
    right.set(xlabel="state (MB)", ylabel="cosine with softmax's embedding", title="MiniLM, even degrees 0 to 4")
    if encoder:
        right.set_xscale("log")
    add_legend(left)
    add_legend(right)
    caption = "Left: loss of SmolLM2 against the bytes that a sequence keeps. Right: MiniLM with pure Taylor attention."
    return [Picture("pretrained", caption, figure)]


def conclusions(findings: Findings) -> list[str]:
    """What is closed of the gap to softmax at equal bytes, whether a far part earns its bytes, and what is left."""
    losses = Losses(findings)
    told = [_tell_gap(losses, method) for method in losses.found if method[0] == BY_HEAD]
    told += [_tell_far(losses, name) for name in (*FAR, LEARNED)]
    told += [_tell_apart(losses, method) for method in losses.found if method[0] == LEARNED]
    return [line for line in (*told, _tell_encoder(findings)) if line is not None]


def _tell_gap(losses: Losses, method: Method) -> str | None:
    closed = losses.closed(method)
    if closed is None:
        return None
    own, plain, best = (_digits(losses.at(each)) for each in (method, losses.rival(method), (SOFTMAX, 1.0)))
    tokens = losses.found[method][0].case["tokens"]
    change = f"close {_percent(closed)} of" if closed > 0 else f"add {_percent(-closed)} to"
    return (
        f"At {_percent(losses.share(method))} of the bytes of {tokens:,} cached tokens, windows by head {change} the "
        f"gap between one window for all heads and softmax over the last positions: {own}, {plain}, {best} nats per "
        "token."
    )


def _tell_far(losses: Losses, name: str) -> str | None:
    """Beside a window alone at the same bytes."""
    methods = [method for method in losses.found if method[0] == name]
    if not methods:
        return None
    failed = [method for method in methods if losses.at(method) is None]
    if failed:
        budgets = ", ".join(_percent(losses.share(method)) for method in failed)
        return f"{name}: at {budgets} of the bytes, a normaliser was not safely positive, so there is no loss."
    compared = [(_where(losses, each), losses.at(each), losses.at(losses.rival(each))) for each in methods]
    pairs = [(where, own, plain) for where, own, plain in compared if own is not None and plain is not None]
    if not pairs:
        return None
    earned = sum(own < plain for _, own, plain in pairs)
    verdict = {0: "does not earn its bytes", len(pairs): "earns its bytes"}.get(earned, "earns its bytes at some only")
    listed = ", ".join(f"{where} {own - plain:+.4f}" for where, own, plain in pairs)
    return f"{name} {verdict}: its loss less that of a window alone of the same bytes is {listed} nats per token."


def _tell_apart(losses: Losses, method: Method) -> str | None:
    """What a learned far part does to next-token distributions."""
    places = [[losses.at(each, end, "divergence") for end in losses.ends] for each in (method, losses.rival(method))]
    own, plain = ([value for value in values if value is not None] for values in places)
    if not own or len(own) != len(plain):
        return None
    nearer = sum(mine < theirs for mine, theirs in zip(own, plain, strict=True))
    return (
        f"By divergence from softmax the learned far part ({_where(losses, method)} of the bytes) is nearer "
        f"than a window alone of the same bytes at {nearer} of {len(own)} ranges of positions; over the last "
        f"{own[-1]:.4f} beside {plain[-1]:.4f} nats per token."
    )


def _where(losses: Losses, method: Method) -> str:
    """Of how many bytes, and what was learned in which folder."""
    return f"{method[1]}, " * (method[0] == LEARNED) + f"at {_percent(losses.share(method))}"


def _tell_encoder(findings: Findings) -> str | None:
    softmax = next(iter(select(findings, model="minilm", degree=None)), None)
    tried = [each for each in select(findings, model="minilm") if each.case["degree"] is not None]
    safe = [each for each in tried if each.values["unsafe"] == 0]
    if softmax is None or not safe:
        return None
    best = max(safe, key=lambda each: each.values["pearson"])
    return (
        f"MiniLM with softmax has a correlation of {softmax.values['pearson']:.3f} with people's ratings; of pure "
        f"Taylor attention up to degree {max(each.case['degree'] for each in tried)}, {_name(best)} has the highest, "
        f"{best.values['pearson']:.3f}, with a mean cosine of {best.values['cosine']:.3f} and "
        f"{best.values['bytes'] / softmax.values['bytes']:.3g} times the bytes of 512 cached tokens."
    )

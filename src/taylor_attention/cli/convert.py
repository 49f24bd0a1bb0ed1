"""`taylor-attention convert`: checkpoints of ours as models of transformers, and back."""

from __future__ import annotations

import os

import click

from ..errors import expect
from ..lm.checkpoint import SHIPPED, shipped


@click.command(short_help="Checkpoints as models of transformers, and back.")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option("--force", is_flag=True, help="Replace what OUT holds of a model.")
def convert(source: str, out: str, force: bool) -> None:
    """Write the checkpoint IN (or a shipped one: taylor, softmax) as the folder OUT for transformers.

    Where IN is such a folder, OUT is a checkpoint. Logits are the same, bit for bit. Needs the extra [hf].
    """
    known = source in SHIPPED or os.path.isfile(source) or os.path.isdir(source)
    expect(known, "IN", f"a checkpoint, one of {', '.join(SHIPPED)}, or a folder of transformers", source)
    expect(force or not os.path.lexists(out), "OUT", "a name that is free, or --force", f"{out}, which exists")
    from ..hf.convert import convert as write  # transformers takes seconds to load

    model = write(shipped(source) if source in SHIPPED else source, out, force=force)
    kind = "a folder for transformers" if os.path.isdir(out) else "a checkpoint"
    click.echo(f"{out}: {kind}, {model.num_parameters():,} parameters")

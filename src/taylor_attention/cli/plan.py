"""`taylor-attention plan`: what a model's attention will cost, before building it."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.table import Table

from ..core.cost import Plan
from ..core.cost import plan as make_plan
from ..core.series import EXP
from ..core.state import State
from ..errors import LARGEST_INT
from .console import degree_option, emit_json, json_option, out, size, table


@click.command(short_help="What attention will cost: memory, FLOPs, break-even contexts.")
@click.option("--heads", type=int, required=True, help="Query heads of a layer.")
@click.option("--kv-heads", type=int, help="Key/value heads, a divisor of --heads [--heads].")
@click.option("--head-dim", type=int, required=True, help="Entries of a query or key.")
@click.option("--value-dim", type=int, help="Entries of a value [--head-dim].")
@degree_option(required=True, help="Where the series is cut; even ones are positive everywhere. none: no far part.")
@click.option("--window", type=int, default=0, show_default=True, help="Latest tokens that are attended to exactly.")
@click.option("--sinks", type=int, default=0, show_default=True, help="First tokens that are attended to exactly.")
@click.option("--heavy", type=int, default=0, show_default=True, help="Weightiest tokens that are, beside these.")
@click.option("--layers", type=int, default=1, show_default=True, help="Attention layers.")
@click.option("--context", type=int, required=True, help="Tokens of the key/value cache to compare with.")
@click.option("--dtype", default="float32", show_default=True, help="Of the state.")
@click.option("--cache-dtype", help="Of the key/value cache [--dtype].")
@click.option("--score-radius", "radius", type=float, help="Largest |scaled score|: gives a bound on the error.")
@json_option
def plan(as_json: bool, **asked: Any) -> None:
    """Memory, FLOPs and break-even contexts of Taylor attention beside softmax with a key/value cache.

    Every layer has a far part, of keys of --head-dim; far keys of their own (rope="near", far_dim) are not counted.
    """
    made = make_plan(**asked)
    if as_json:
        derived = {"allocated_bytes": _allocated(made), "negative_intervals": _negative(made)}
        return emit_json(made.to_dict() | derived)
    console = out()
    heads = f"{made.heads} heads" + (f" ({made.kv_heads} key/value)" if made.kv_heads != made.heads else "")
    shape = f"{made.layers} layers, {heads}, head dimension {made.head_dim}, values {made.value_dim}"
    near = "".join(f", {name} {count:,}" for name, count in _near(made).items() if count)
    console.print(f"{shape}, degree {made.degree}{near}; one sequence", markup=False, soft_wrap=True)
    console.print(_costs(made))
    for line in _remarks(made):
        console.print(line, markup=False, soft_wrap=True)


def _costs(made: Plan) -> Table:
    """Taylor and softmax side by side."""
    shown = table(f"At a context of {made.context:,} tokens", "", "Taylor", "softmax", "softmax / Taylor")
    rows = (
        ("memory", made.state_bytes, made.cache_bytes, size),
        ("memory per layer", made.state_bytes_per_layer, made.cache_bytes_per_layer, size),
        ("FLOPs per token", made.flops_per_token, made.cache_flops_per_token, "{:,}".format),
    )
    for name, ours, theirs, write in rows:
        shown.add_row(name, write(ours), write(theirs), f"{theirs / ours:,.3g}")
    shown.add_row("dtype", made.dtype, made.cache_dtype, "")
    return shown


def _allocated(made: Plan) -> int | None:
    """Bytes that the states really take (eq. 13 counts the moments alone); None for a dtype that they cannot have."""
    dtype = getattr(torch, made.dtype)
    if dtype not in (torch.float32, torch.float64):
        return None
    sizes = made.kv_heads, made.head_dim, made.value_dim, made.degree
    return (
        made.layers
        * State.zeros(1, *sizes, **_near(made), dtype=dtype, device="meta", max_state_bytes=LARGEST_INT).nbytes
    )


def _near(made: Plan) -> dict[str, int]:
    return {"window": made.window, "sinks": made.sinks, "heavy": made.heavy}


def _negative(made: Plan) -> tuple[tuple[float, float], ...]:
    """Scores whose weights are not positive."""
    return () if made.degree is None else EXP.negative_intervals(made.degree)


def _remarks(made: Plan) -> list[str]:
    """Where the state begins to win, and how far the series can be trusted."""
    lines = [
        f"Taylor takes less memory from {made.break_even_memory:,} tokens on, fewer FLOPs from "
        f"{made.break_even_flops:,} tokens on.",
    ]
    allocated = _allocated(made)
    if allocated is not None:
        lines.append(
            f"As allocated, with rounding compensation and the latest tokens, the states take {size(allocated)}."
        )
    if made.radius is not None and made.error_bound is not None:
        lines.append(
            f"Scores within {made.radius:g} of 0: every weight is right to a relative error of {made.error_bound:.2g}."
        )
    for low, high in _negative(made):
        lines.append(
            f"Degree {made.degree} gives weights that are not positive for scores in ({low:.4g}, {high:.4g}): the "
            "normaliser can vanish. An even degree cannot do that."
        )
    return lines

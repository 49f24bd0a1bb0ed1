"""`taylor-attention profile`: what the heads of a model of transformers look at, and what each would have to keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.state import check_device
from ..errors import expect
from .console import COUNT, SEED, Number, check_target, emit_json, err, json_option, out, progress_bar
from .profile_report import report

if TYPE_CHECKING:
    from ..hf.profiling import Profile, Recommendation

_FILE = click.Path(dir_okay=False, path_type=Path)

ERROR = 0.1
"""A head's largest relative error, unless another or a budget is asked for."""


@click.command(short_help="What a model's heads look at, and what each would have to keep.")
@click.argument("model")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="In UTF-8.")
@click.option("--tokens", type=COUNT, default=2048, show_default=True, help="Of the text that are profiled, at most.")
@click.option("--queries", type=COUNT, default=128, show_default=True, help="Of each head that are looked at.")
@click.option("--error", type=Number(min=0, min_open=True), help=f"A head's largest relative error [{ERROR}].")
@click.option("--budget", type=Number(min=0, max=1, min_open=True), help="Or: bytes, as a share of the cache's.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the choice of queries.")
@click.option("--gguf-file", help="A file in MODEL to load it from.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--heads", is_flag=True, help="A row for each query head.")
@click.option("--figure", type=_FILE, help="Heat maps as a PNG.")
@click.option("--apply", "applied", type=_FILE, help="Write the recommended settings for `hf.use`.")
@click.option(
    "--centres", type=_FILE, help="Take each head's mean key off its keys; write it for `hf.set_key_centres`."
)
@click.option("--no-effect", is_flag=True, help="Leave out what the settings do to the model in the end.")
@json_option
def profile(model: str, gguf_file: str | None, device: str, as_json: bool, **asked: Any) -> None:
    """What the heads of MODEL look at in a text, which approximation is good enough, and what that does in the end.

    MODEL is a folder, or a name on the hub where that can be reached: a language model, or an encoder. The later part
    of the text, as long as the profiled one, is held out: on it the end effect is measured.
    """
    _check(model, gguf_file, device, asked)
    from ..hf import profiling  # needs transformers, which takes seconds to import

    with err().status(f"loading {model}"):
        text = profiling.read_text(asked["text"])
        network = profiling.load_model(model, gguf_file=gguf_file, dtype=asked["dtype"], device=device)
        tokenizer = profiling.load_tokenizer(model, gguf_file=gguf_file)
        pieces, held_out = profiling.cut(tokenizer, text, asked["tokens"], profiling.longest(network, tokenizer))
    with progress_bar() as bar:
        task = bar.add_task("layers", total=network.config.num_hidden_layers * len(pieces))
        found = profiling.profile(
            network, pieces, queries=asked["queries"], seed=asked["seed"], notify=lambda: bar.advance(task)
        )
    advice = _advise(found, asked["error"], asked["budget"], centred=asked["centres"] is not None)
    effect = None
    if not asked["no_effect"]:
        with progress_bar() as bar:
            task = bar.add_task("end effect", total=profiling.effect_steps(found, held_out))
            effect = profiling.measure_effect(network, found, advice, held_out, notify=lambda: bar.advance(task))
    _write(found, advice, asked)
    if as_json:
        facts = {"model": model, "text": str(asked["text"]), "profile": found.to_dict()}
        return emit_json(facts | {"recommendation": advice.to_dict(), "effect": effect})
    report(out(), found, advice, effect, each_head=asked["heads"])


def _check(model: str, gguf_file: str | None, device: str, asked: dict[str, Any]) -> None:
    """Refuse before a model is loaded what would be refused minutes later."""
    expect(asked["error"] is None or asked["budget"] is None, "--budget", "no --error beside it", asked["error"])
    if gguf_file is not None:
        here = not os.path.isdir(model) or os.path.isfile(os.path.join(model, gguf_file))
        expect(gguf_file != "" and here, "--gguf-file", f"a file in {model}", gguf_file)
    check_device(device)
    for name, path in _files(asked).items():
        if path is not None:
            check_target(path, name)


def _files(asked: dict[str, Any]) -> dict[str, Path | None]:
    return {"--figure": asked["figure"], "--apply": asked["applied"], "--centres": asked["centres"]}


def _write(found: Profile, advice: Recommendation, asked: dict[str, Any]) -> None:
    """Write the files that were asked for."""
    if asked["applied"]:
        advice.settings.save(asked["applied"])
    if asked["centres"]:
        from ..hf import save_key_centres

        save_key_centres(asked["centres"], found.centres)
    if asked["figure"]:
        from ..bench.profile_drawn import draw

        draw(asked["figure"], found, advice)


def _advise(found: Profile, error: float | None, budget: float | None, *, centred: bool) -> Recommendation:
    from ..hf.profiling import recommend, recommend_within

    if budget is not None:
        return recommend_within(found, budget, centred=centred)
    return recommend(found, error=ERROR if error is None else error, centred=centred)

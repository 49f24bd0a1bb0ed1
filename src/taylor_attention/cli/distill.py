"""`taylor-attention distill`: learn a cheap far part for a pretrained model, layer by layer and then all together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..core.state import check_device
from ..errors import expect
from .console import (
    COUNT,
    COUNT_OR_NONE,
    DEGREE,
    SEED,
    emit_json,
    err,
    json_option,
    make_folder,
    out,
    progress_bar,
    size,
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Learn a cheap far part for a pretrained model.")
@click.argument("model")
@click.option("--text", "texts", type=FILE, multiple=True, required=True, help="In UTF-8; may be given again.")
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False),
    required=True,
    help="Folder for what is learned, piece by piece.",
)
@click.option("--resume", is_flag=True, help="Go on with the work that --out holds.")
@click.option("--settings", type=FILE, help="What heads keep, as `profile --apply` writes it; else these two:")
@click.option("--window", type=COUNT_OR_NONE, default=512, show_default=True, help="Latest tokens that stay exact.")
@click.option("--sinks", type=COUNT_OR_NONE, default=4, show_default=True, help="First tokens that stay exact.")
@click.option("--degree", type=DEGREE, default=2, show_default=True, help="Of the far part.")
@click.option("--far-dim", type=click.IntRange(1, 64), default=8, show_default=True, help="Entries of a far key.")
@click.option("--length", type=COUNT, default=4096, show_default=True, help="Tokens that are read together.")
@click.option("--tokens", type=COUNT, default=131_072, show_default=True, help="Each layer learns from alone, at most.")
@click.option(
    "--together",
    type=COUNT_OR_NONE,
    default=73_728,
    show_default=True,
    help="Tokens that all layers then learn from together, at most; 0: none.",
)
@click.option("--steps", type=COUNT, default=8, show_default=True, help="Of each layer for each piece of text.")
@click.option("--queries", type=COUNT, default=24, show_default=True, help="Of each head that a step looks at.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the choice of queries.")
@click.option("--gguf-file", help="A file in MODEL to load it from.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--no-effect", is_flag=True, help="Leave out what it does to the model in the end.")
@json_option
def distill(model: str, texts: Sequence[Path], folder: str, as_json: bool, **asked: Any) -> None:
    """Learn, for each layer of MODEL, a few entries that stand for what its far tokens say.

    MODEL is a folder, or a name on the hub where that can be reached: a language model. Its weights stay as they are.
    First each layer learns alone, from what softmax gives it; then all learn together, by the next-token distributions
    of the whole model. The last two pieces of the texts are not learned from. On the first of them heads are found
    whose far part does not earn its bytes, and lose it; on the other one the end effect is measured, beside softmax,
    and beside the same number of bytes spent on longer windows. What is learned is used with
    `hf.Distilled.load(FOLDER).use(model)`.
    """
    gguf, device = asked["gguf_file"], asked["device"]
    if gguf is not None:
        expect(os.path.isfile(os.path.join(model, gguf)) or not os.path.isdir(model), "--gguf-file", "a file", gguf)
    check_device(device)
    from ..hf import profiling  # needs transformers, which takes seconds to import
    from ..hf.distillation import choose
    from ..hf.distillation import distill as learn
    from ..hf.distilled import measure_learned, with_far_maps
    from ..hf.settings import HeadSettings, ModelSettings
    from ..hf.together import learn_together, parts

    if asked["settings"] is None:
        kept = ModelSettings(HeadSettings(asked["window"], asked["sinks"], 0, asked["degree"]))
    else:
        kept = ModelSettings.load(asked["settings"])
    settings = with_far_maps(kept, asked["degree"], asked["far_dim"])
    target = make_folder(folder)
    with err().status(f"loading {model}"):
        network = profiling.load_model(model, gguf_file=gguf, device=device)
        tokenizer = profiling.load_tokenizer(model, gguf_file=gguf)
        length = min(asked["length"], profiling.longest(network, tokenizer))
        pieces = profiling.pieces(tokenizer, [profiling.read_text(text) for text in texts], length)
    expect(len(pieces) >= 3, "--text", f"at least three pieces of {length} tokens", len(pieces))
    learned_from = pieces[:-2][: max(1, asked["tokens"] // length)]
    options = {name: asked[name] for name in ("steps", "queries", "seed", "resume")}
    errors: list[float] = []
    with _progress("each layer alone", len(learned_from), "error") as told:

        def notify(found: list[float]) -> None:
            errors.append(sum(found) / len(found))
            told(errors[-1])

        learned = learn(network, learned_from, settings, folder=target, notify=notify, **options)
    with err().status("choosing the heads where it pays"):
        learned = choose(network, learned, pieces[-2:-1])
        learned.save(target)
    far = sum(head.far_dim is not None for head in learned.settings.heads.values())
    divergences: list[float] = []
    if asked["together"] and far:
        shorter = parts(pieces[:-2], learned.settings, asked["together"], asked["seed"])
        again = {name: asked[name] for name in ("seed", "resume")}
        with _progress("all together", len(shorter), "divergence") as told:

            def note(found: float) -> None:
                divergences.append(found)
                told(found)

            learned = learn_together(network, learned, shorter, folder=target, notify=note, **again)
        learned.save(target)
    effect = None
    if not asked["no_effect"]:
        with err().status("measuring the end effect"):
            effect = measure_learned(network, learned, pieces[-1:])
    if as_json:
        about = {"folder": str(target), "pieces": len(learned_from), "heads": far}
        return emit_json({**about, "errors": errors, "divergences": divergences, "effect": effect})
    out().print(f"{target}: learned from {len(learned_from)} pieces of {length:,} tokens")
    out().print(f"heads with a far part that earns its bytes: {far} of {len(learned.settings.heads)}")
    _tell(errors, divergences, effect)


def _tell(errors: list[float], divergences: list[float], effect: Mapping[str, Any] | None) -> None:
    """Write what was measured, in words; nothing of work that was done before."""
    if errors:
        out().print(f"relative squared error of a layer's outputs: {errors[0]:.3f} at first, {errors[-1]:.3f} at last")
    if divergences:
        first, last = (sum(few) / len(few) for few in (divergences[:8], divergences[-8:]))
        out().print(f"divergence from softmax, nats per token: {first:.4f} at first, {last:.4f} at last")
    if effect is None:
        return
    out().print(f"loss of the later half of a held-out piece, nats per token: {effect['softmax']:.4f} with softmax")
    for name, what in (("learned", "learned far part"), ("windows", "windows alone")):
        out().print(f"  {what} {effect[name]:.4f}, divergence from softmax {effect['divergence'][name]:.4f}")
    out().print(f"  both at {size(effect['bytes'])} of state")


@contextmanager
def _progress(name: str, total: int, measure: str) -> Iterator[Callable[[float], None]]:
    """A bar of so many pieces that a call advances, with what was measured."""
    with progress_bar("{task.fields[found]}") as bar:
        task = bar.add_task(name, total=total, found="")
        yield lambda found: bar.update(task, advance=1, found=f"{measure} {found:.3f}")

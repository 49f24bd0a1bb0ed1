"""`taylor-attention generate`: a prompt of any length in, text out as it comes, in constant memory."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import click

from ..core.locks import locked
from ..core.threads import thread_count
from ..errors import LARGEST_INT, ArgumentError, StorageError
from ..lm import generation
from ..lm.session import Session, uninterrupted
from ..nn import LanguageModel
from .console import COUNT_OR_NONE, THREADS, emit_json, err, json_option, load, progress_bar, size

_READ = 1 << 16  # bytes taken from the prompt at a time: a whole number of blocks, so that pipes change nothing


@click.command(short_help="Continue a text, in constant memory; sessions resume exactly.")
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), help="Prompt; - is stdin.")
@click.option("--model", default="taylor", show_default=True, help="A checkpoint, or a shipped one: taylor, softmax.")
@click.option("--session", type=click.Path(dir_okay=False), help="Go on from this file if it exists, and save to it.")
@click.option("-n", "--tokens", type=COUNT_OR_NONE, default=400, show_default=True, help="Bytes; 0: no end.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest byte.")
@click.option("--top-k", type=int, help="Draw from the k likeliest bytes only.")
@click.option("--top-p", type=float, help="Draw from the likeliest bytes that together reach this probability.")
@click.option("--threads", type=THREADS, default=1, show_default=True, help="For writing.")
@click.option(
    "--seed",
    type=click.IntRange(-LARGEST_INT - 1, LARGEST_INT),
    help="Start of the draws of a new text (0 if not given); kept in its session.",
)
@json_option
def generate(
    prompt: str | None,
    file: str | None,
    model: str,
    session: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    threads: int,
    seed: int | None,
    as_json: bool,
) -> None:
    """Continue PROMPT (- reads stdin), streaming the text to stdout.

    A session holds the whole context in a fixed size and goes on exactly where it stopped: a prompt is then appended.
    Ctrl-C saves it and ends cleanly.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    generation.check_sampling(**sampling)  # type: ignore[arg-type]
    if session == "":
        raise click.UsageError("--session: expected the name of a file, got an empty one")
    if as_json and tokens == 0:
        raise click.UsageError("--json: expected a number of --tokens, got 0 (a text without end)")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_source(prompt, file, session))
        if session:
            stack.enter_context(locked(session))
        network = load(model)
        run = Run(_open(network, session, seed), as_json)
        run.go(source, tokens or None, threads, sampling)
        run.close(session, model)


@contextlib.contextmanager
def _source(prompt: str | None, file: str | None, session: str | None) -> Iterator[BinaryIO | None]:
    """The prompt as a stream of bytes, or None where a session goes on without one."""
    if prompt is not None and file is not None:
        raise click.UsageError("--file: expected no PROMPT beside it, got both")
    if prompt == "":
        raise click.UsageError("PROMPT: expected at least one byte, got an empty text")
    if file is not None and file != "-":
        with _opened(file) as stream:
            yield stream
    elif file == "-" or prompt == "-":
        yield sys.stdin.buffer
    elif prompt is not None:
        yield io.BytesIO(os.fsencode(prompt))
    elif session is not None and os.path.exists(session):
        yield None
    else:
        raise click.UsageError("PROMPT: expected a text, --file, or --session with an existing file, got none")


def _opened(file: str) -> BinaryIO:
    """A file with something in it, to be read."""
    try:
        stream = open(file, "rb")  # noqa: SIM115  # who asked for it closes it
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            if not stream.peek(1):
                raise click.UsageError(f"--file: expected at least one byte, got the empty file {file}")
            stack.pop_all()
    except OSError as error:
        raise click.UsageError(f"--file: expected a file that can be read, got {file} ({error.strerror})") from error
    return stream


def _open(model: LanguageModel, path: str | None, seed: int | None) -> Session:
    """The session of an existing file, or a new one."""
    if path is None or not os.path.exists(path):
        return Session(model, seed=seed or 0)
    session = Session.load(path, model)
    if seed not in (None, session.seed):
        raise ArgumentError(f"--seed: expected {session.seed}, which {path} was begun with, or none, got {seed}")
    return session


@dataclass
class Run:
    """One call of the command: what was read and written, how long it took, and how it ended."""

    session: Session
    quiet: bool
    read: int = 0
    written: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failure: OSError | None = None
    text: list[str] = field(default_factory=list)

    def go(self, source: BinaryIO | None, tokens: int | None, threads: int, sampling: dict[str, Any]) -> None:
        """Read the prompt, then write; Ctrl-C, a reader who has gone and a full disk end it between two bytes."""
        try:
            if source is not None:
                self._read(source)
            with thread_count(threads):
                self._write(tokens, sampling)
        except KeyboardInterrupt:
            self.interrupted = True

    def _read(self, source: BinaryIO) -> None:
        total = _remaining(source)
        with progress_bar() as bar:
            task = bar.add_task("reading", total=total, visible=total is None or total > _READ)
            while block := _next_block(source):
                self.session.read(block)
                self.read += len(block)
                bar.update(task, completed=self.read)
        if not self.read:
            raise ArgumentError("PROMPT: expected at least one byte on stdin, got none")

    def _write(self, tokens: int | None, sampling: dict[str, Any]) -> None:
        """Draw and show; a character is shown when its last byte is there, and a session keeps one that is not."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        waiting, self.session.unshown = self.session.unshown, b""
        self._pass_on(waiting, decoder)
        start = time.perf_counter()
        while self.failure is None and (tokens is None or self.written < tokens):
            with uninterrupted():  # a byte that is in the session is on the screen, or waits to be shown
                byte = self.session.step(**sampling)
                self.written += 1
                self._pass_on(bytes([byte]), decoder)
            self.seconds = time.perf_counter() - start

    def _pass_on(self, drawn: bytes, decoder: codecs.IncrementalDecoder) -> None:
        self.session.unshown += drawn
        self._show(decoder.decode(drawn))
        if self.failure is None:
            self.session.unshown = decoder.getstate()[0]

    def _show(self, text: str) -> None:
        if self.quiet:
            self.text.append(text)
        elif text:
            with self._output():
                click.echo(text, nl=False)

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Note that nothing more can be shown, so that the session is saved before that is told."""
        try:
            yield
        except OSError as error:
            self.failure = error
            # Python would complain about the same stream once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self, path: str | None, model: str) -> None:
        """Save the session, and say how it went."""
        session = self.session
        if path is None and session.unshown:
            self._show("\N{REPLACEMENT CHARACTER}")
        if path is not None and session.tokens:
            with uninterrupted():
                session.save(path)
        each = 1000 * self.seconds / max(self.written, 1)
        saved = f"; saved in {path}" if path is not None and session.tokens else ""
        if self.quiet:
            with self._output():
                self._emit(path, model, each)
        if self.failure is not None and not isinstance(self.failure, BrokenPipeError):
            raise click.ClickException(f"the text cannot be written ({self.failure.strerror}){saved}")
        if self.quiet:
            return
        if sys.stdout.isatty():
            click.echo()
        ended = "stopped after" if self.interrupted else "wrote"
        context = f"context {session.tokens:,} bytes in {size(session.nbytes)}"
        err().print(
            f"{ended} {self.written:,} bytes, {each:.2f} ms each; {context}{saved}", markup=False, soft_wrap=True
        )

    def _emit(self, path: str | None, model: str, each: float) -> None:
        session = self.session
        emit_json(
            {
                "text": "".join(self.text),
                "bytes": self.written,
                "prompt_bytes": self.read,
                "context": session.tokens,
                "context_nbytes": session.nbytes,
                "ms_per_byte": each,
                "seed": session.seed,
                "model": model,
                "session": path,
                "interrupted": self.interrupted,
            }
        )


def _next_block(source: BinaryIO) -> bytes:
    try:
        return source.read(_READ)
    except OSError as error:
        raise StorageError(f"PROMPT: cannot be read ({error.strerror})") from error


def _remaining(source: BinaryIO) -> int | None:
    """Bytes left in a stream that has a size (a file, a text), None for a pipe."""
    if not source.seekable():
        return None
    here = source.tell()
    end = source.seek(0, os.SEEK_END)
    source.seek(here)
    return end - here

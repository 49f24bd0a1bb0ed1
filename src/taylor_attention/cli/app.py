"""The group of commands, and what an error looks like: one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import TaylorAttentionError
from .bench import bench
from .convert import convert
from .demo import demo
from .distill import distill
from .evaluate import evaluate
from .generate import generate
from .needles import needles
from .plan import plan
from .profile import profile
from .report import report
from .reproduce import reproduce
from .soak import soak
from .train import train

BAD_INPUT, INTERRUPTED = 2, 130


class Application(click.Group):
    """A group whose errors, its own and the library's, are one line; anything else is a defect, with its traceback."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit: 0, 2 for bad input, 130 for Ctrl-C."""
        extra["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name or a text that it cannot show is no failure
        try:
            with ended_like_ctrl_c():
                code = super().main(*args, **extra)
        except click.Abort:
            _fail("interrupted", INTERRUPTED)
        except click.ClickException as error:
            _fail(error.format_message(), BAD_INPUT)
        except TaylorAttentionError as error:
            _fail(str(error), BAD_INPUT)
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            _fail("this needs more memory than there is: smaller sizes, or another machine", BAD_INPUT)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) end the block as Ctrl-C does, which saves what is only in memory."""
    main = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP") if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler else ():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lacks_memory(error: Exception) -> bool:
    """Whether Python or PyTorch, which has no error of its own for it on CPUs, could not get memory."""
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _fail(message: str, code: int) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(code)


@click.group(cls=Application, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="taylor-attention")
@click.pass_context
def app(context: click.Context) -> None:
    """Softmax attention at constant cost and memory per token, to a precision that you choose."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (plan, bench, needles, soak, reproduce, report, train, generate, evaluate, convert, demo, profile, distill)
for command in COMMANDS:
    app.add_command(command)

"""Errors of the package: each message names the argument, what was expected and what came."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

LARGEST_INT = 2**63 - 1
"""Larger ones are no sizes, counts or seeds anywhere in PyTorch."""

_SHOWN = 200  # characters of a value


class TaylorAttentionError(Exception):
    """Base of every error that the package raises on purpose."""


class ArgumentError(TaylorAttentionError, ValueError):
    """An argument is not what the function takes; nothing was changed."""


class StorageError(TaylorAttentionError):
    """A file cannot be read, written or trusted; no file was half written."""


class MissingDependencyError(TaylorAttentionError, ImportError):
    """An optional dependency is needed here and is not installed."""


class NormaliserError(TaylorAttentionError, ArithmeticError):
    """A truncated series gave a normaliser that is not safely positive while gradients were being recorded."""


class NormaliserWarning(UserWarning):
    """Some queries have a normaliser that is not safely positive; their output rows are NaN."""


class BackendWarning(UserWarning):
    """A faster way to compute is not there; results are the same."""


def expect(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise `ArgumentError("<argument>: expected <expected>, got <got>")` unless `condition` holds.

    got: what came, in words or itself; where it may be a string, by `shown`, which puts it in quotes.
    """
    if not condition:
        came = got if isinstance(got, str) else _write(str, got)
        raise ArgumentError(f"{argument}: expected {expected}, got {came}")


def expect_int(argument: str, value: object, least: int, most: int = LARGEST_INT) -> None:
    """Raise `ArgumentError` unless a value is an int, and no bool, from `least` to `most`."""
    if isinstance(value, int) and not isinstance(value, bool):
        if least <= value <= most:
            return
        expect(value < least, argument, f"an int <= {most:,}", shown(value))
    expect(False, argument, f"an int >= {least}", shown(value))


def expect_bool(argument: str, value: object) -> None:
    """Raise `ArgumentError` unless a value is True or False."""
    if not isinstance(value, bool):
        expect(False, argument, "a bool", shown(value))


def is_number(value: object) -> bool:
    """Whether a value is an int or a float that is finite as a float; a bool is none."""
    largest = sys.float_info.max  # an int is compared with it exactly
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def shown(value: object) -> str:
    """A value as an error shows it: on one line, cut where it is long; strings in quotes, of an array what it is."""
    return _write(repr, value)


def _write(write: Callable[[object], str], value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    try:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
        text = " ".join(write(value).split())
    except Exception:  # noqa: BLE001  # an int of 4,300 digits, a nested tensor: an error about an error helps nobody
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def first_line(error: Exception) -> str:
    """What an error says first: PyTorch's go on for many lines."""
    return str(error).partition("\n")[0]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise `MissingDependencyError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingDependencyError(f"{purpose} needs {package}: pip install 'taylor-attention[{extra}]'") from error

"""Errors of the package: each message names the argument, what was expected and what came."""

from __future__ import annotations

import importlib
from types import ModuleType


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
    """Raise `ArgumentError("<argument>: expected <expected>, got <got>")` unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{argument}: expected {expected}, got {got}")


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

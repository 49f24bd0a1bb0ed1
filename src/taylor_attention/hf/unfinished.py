"""Learning that may be interrupted: parameters and what their optimizer knows, in a file from which work goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError, expect

KIND = "distillation"


class Unfinished(Protocol):
    """What gives everything to go on from as tensors, and takes it; KeyError or RuntimeError if it is of another."""

    def tensors(self) -> dict[str, Tensor]: ...  # noqa: D102

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...  # noqa: D102


def keep(path: Path, parts: Sequence[Unfinished], about: Mapping[str, str], done: int) -> None:
    """Write what all parts have learned from so many pieces; StorageError if it cannot be written."""
    tensors = {f"{index}.{name}": x for index, part in enumerate(parts) for name, x in part.tensors().items()}
    write_tensors(path, tensors, kind=KIND, metadata={**about, "pieces": str(done)})


def take_up(path: Path, parts: Sequence[Unfinished], about: Mapping[str, str]) -> int:
    """Let all parts go on from a file, if it is there: how many pieces are done.

    Raises:
        StorageError: it cannot be read, or holds work of which something else was said in `about`.
    """
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        for name, text in about.items():
            expect(metadata[name] == text, name, "those of the work begun", "others")
        for index, part in enumerate(parts):
            part.restore({name: tensors[f"{index}.{name}"] for name in _names(tensors, f"{index}.")})
        return int(metadata["pieces"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"{path}: expected the work on these texts with these settings, got {error}") from error


def mark(tensors: Sequence[Tensor]) -> str:
    """What tells these tensors from others."""
    return str([sha256(x.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16] for x in tensors])


def tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and what the optimizer knows of them."""
    found = {name: x.detach() for name, x in module.named_parameters()}
    for name, x in module.named_parameters():
        found |= {f"{name}.{key}": value for key, value in optimizer.state[x].items()}
    return found


@torch.no_grad()
def put_back(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `tensors_of` gave; KeyError or RuntimeError if it is of another module."""
    for name, x in module.named_parameters():
        x.copy_(tensors[name])
        keys = ("step", "exp_avg", "exp_avg_sq")
        found = {key: tensors[f"{name}.{key}"].clone() for key in keys if f"{name}.{key}" in tensors}
        if found:
            optimizer.state[x] = found


def _names(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

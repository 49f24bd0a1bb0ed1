"""The file that a training run resumes from: weights, optimiser state and the run's own notes, in one atomic write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError
from ..nn.checkpoint import check_weights
from ..nn.transformer import LanguageModel

KIND = "training"
"""Kind of the file, as `core.storage` keeps it."""

_KEPT = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""


def write_position(path: Path, model: LanguageModel, optimizer: torch.optim.AdamW, metadata: Mapping[str, str]) -> None:
    """Write everything that the next step depends on; raises StorageError where the file cannot be written."""
    tensors = {f"model/{name}": weight for name, weight in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": kept[key] for key in _KEPT}
    write_tensors(path, tensors, kind=KIND, metadata=metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The run's notes alone; raises StorageError where the file cannot be trusted."""
    return read_tensors(path, kind=KIND)[1]


def read_position(path: Path, model: LanguageModel, optimizer: torch.optim.AdamW) -> None:
    """Put weights and optimiser state back; raises StorageError and changes nothing where they do not fit."""
    groups: dict[str, dict[str, Tensor]] = {key: {} for key in ("model", *_KEPT)}
    for full_name, tensor in read_tensors(path, kind=KIND)[0].items():
        group, _, name = full_name.partition("/")
        groups.setdefault(group, {})[name] = tensor
    check_weights(model, groups["model"], path)
    parameters = dict(model.named_parameters())
    for key in _KEPT:
        if groups[key].keys() != parameters.keys() or not all(
            _fits(key, kept, parameters[name]) for name, kept in groups[key].items()
        ):
            raise StorageError(f"{path}: expected {key} of every weight, in its shape and finite, got something else")
    model.load_state_dict(groups["model"])
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {key: groups[key][name] for key in _KEPT}


def _fits(key: str, kept: Tensor, parameter: Tensor) -> bool:
    """Whether AdamW may take it up; its kernels do not ask."""
    shape, dtype = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
    if kept.shape != shape or kept.dtype != dtype or not bool(kept.isfinite().all()):
        return False
    return key == "exp_avg" or bool((kept >= 0).all())

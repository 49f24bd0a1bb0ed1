"""Model files: weights and configuration, over `core.storage`."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.state import check_device
from ..core.storage import read_tensors, write_tensors
from ..errors import StorageError, expect, shown
from .layer import resolve_sizes
from .transformer import LanguageModel, ModelConfig, expect_model

KIND = "model"
"""Kind of a model file, as `core.storage` keeps it."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_checkpoint(
    path: str | Path,
    model: LanguageModel,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model, replacing the file atomically.

    Args:
        path: the file.
        model: its weights and configuration are written.
        metadata: more text to keep ("config" is taken).
        dtype: to store the weights in; torch.float16 halves the file at a relative error of 2^-11 per weight.

    Raises:
        StorageError: the file cannot be written.
        ArgumentError: the metadata has a name that is taken, or another argument is not as above.
    """
    expect_model(model)
    expect(dtype is None or dtype in _DTYPES, "dtype", "a floating-point dtype of 16, 32 or 64 bits", shown(dtype))
    extra = dict(metadata or {})
    expect("config" not in extra, "metadata", "names other than 'config'", sorted(extra))
    tensors = {name: weight.detach().to(dtype=dtype) for name, weight in model.state_dict().items()}
    write_tensors(path, tensors, kind=KIND, metadata={**extra, "config": _config_text(model)})


def load_checkpoint(
    path: str | Path, *, device: torch.device | str | None = None
) -> tuple[LanguageModel, dict[str, str]]:
    """(model in float32 and eval mode, metadata) as `save_checkpoint` wrote them.

    Raises:
        StorageError: the file is missing, damaged, of another kind, or does not hold a model that this version has.
    """
    check_device(device)
    tensors, metadata = read_tensors(path, kind=KIND)
    try:
        config = ModelConfig.from_dict(json.loads(metadata.pop("config")))
        _check_size(config, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise StorageError(f"{path}: expected a model configuration, got {error}") from error
    model = LanguageModel(config)
    check_weights(model, tensors, path)
    model.load_state_dict(tensors)
    return model.to(device=device).eval(), metadata


def _check_size(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for a configuration of more than what is there, before a model is made that memory lacks."""
    heads, width, key_dim, value_dim = config.num_heads, config.d_model, config.head_dim, config.value_dim
    sizes = width, heads, config.num_kv_heads, key_dim, value_dim, bool(config.rope)
    kv_heads, key_dim, value_dim = resolve_sizes(*sizes)
    block = width * ((heads + kv_heads) * (key_dim + value_dim) + 2 * int(config.mlp_ratio * width))
    matrices = config.vocab_size * width + config.num_layers * block
    there = sum(tensor.numel() for tensor in tensors.values())
    expect(matrices <= there, "configuration", f"a model of at most {there:,} numbers", f"one of {matrices:,}")


def check_weights(model: LanguageModel, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise StorageError unless these are the model's weights: all of them, of its shapes, finite."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())
        raise StorageError(f"{path}: expected the weights of its configuration, got a difference in {differing[:4]}")
    for name, weight in tensors.items():
        if weight.shape != own[name].shape:
            raise StorageError(f"{path}: {name}: expected shape {tuple(own[name].shape)}, got {tuple(weight.shape)}")
        if weight.dtype not in _DTYPES:
            raise StorageError(f"{path}: {name}: expected floating-point numbers, got {weight.dtype}")
        if not bool(weight.isfinite().all()):
            raise StorageError(f"{path}: {name}: expected finite numbers, got others")


def fingerprint(model: LanguageModel) -> str:
    """SHA-256, in hexadecimal, of the configuration and every weight: the same model, or not."""
    expect_model(model)
    digest = hashlib.sha256(_config_text(model).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        stored = weight.detach().cpu().contiguous()
        digest.update(ctypes.string_at(stored.data_ptr(), stored.nbytes))  # the bytes, with or without NumPy
    return digest.hexdigest()


def _config_text(model: LanguageModel) -> str:
    return json.dumps(model.config.to_dict(), sort_keys=True)

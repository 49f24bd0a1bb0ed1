"""Chooses this attention for a model of transformers; its settings live in the model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.state import check_reach
from ..errors import expect, shown
from .settings import HeadSettings, ModelSettings

NAME = "taylor"
"""Of the attention function and of the mask function, as `set_attn_implementation` takes it."""

ATTRIBUTE = "taylor_attention"
"""Of a configuration: the settings, as `ModelSettings.to_dict` gives them. Without it the default settings hold."""

Model = TypeVar("Model", bound=PreTrainedModel)


class Sizes(NamedTuple):
    """What the configuration of a model says of its attention."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


def use(model: Model, settings: ModelSettings | HeadSettings | str | Path | None = None) -> Model:
    """Let a model attend by this library, in training and generation; nothing else of it changes.

    The settings become `model.config.taylor_attention`, which `save_pretrained` writes and
    `from_pretrained(..., attn_implementation="taylor")` reads; `model.set_attn_implementation("sdpa")` goes back.

    Args:
        model: of one stack of attention layers.
        settings: what each head keeps; a file of them; one for all heads; None: `HeadSettings()` for all.

    Returns:
        The same model.

    Raises:
        ArgumentError: this is no such model, the settings do not fit it, or it has no choice of attention functions.
        StorageError: the file cannot be read.
    """
    expect(isinstance(model, PreTrainedModel), "model", "a model of transformers", type(model))
    config, chosen = text_config(model), _resolve(settings)
    check_settings(chosen, config)
    model.set_attn_implementation(NAME)
    possible = "a model whose attention function can be set"
    expect(config._attn_implementation == NAME, "model", possible, type(model).__name__)
    setattr(config, ATTRIBUTE, chosen.to_dict())
    return model


def settings_of(model: PreTrainedModel | PreTrainedConfig) -> ModelSettings:
    """The settings of a model or of its configuration; the default ones where it has none.

    Raises:
        ArgumentError: there is something else under their name.
    """
    return read_settings(text_config(model))


def read_settings(config: Any) -> ModelSettings:
    """As `settings_of`, of any object that may have them."""
    source = getattr(config, ATTRIBUTE, None)
    return ModelSettings() if source is None else ModelSettings.from_dict(source)


def text_config(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model of one stack of attention layers; ArgumentError for anything else."""
    good = isinstance(model, PreTrainedModel | PreTrainedConfig)
    expect(good, "model", "a model of transformers or its configuration", type(model))
    config = model.config if isinstance(model, PreTrainedModel) else model
    one = not config.is_encoder_decoder and config.get_text_config() is config
    expect(one, "model", "one stack of attention layers, no encoder with a decoder and no images", type(model).__name__)
    return config


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """Layers, heads and their width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(config.num_hidden_layers, heads, kv_heads, head_dim)


def check_settings(settings: ModelSettings, config: PreTrainedConfig) -> None:
    """Raise ArgumentError for settings of heads that such a model does not have, or cannot have."""
    sizes = sizes_of(config)
    settings.check_sizes(sizes.layers, sizes.kv_heads)
    for head in {settings.default, *settings.heads.values()}:
        if head.window is not None:
            check_reach(head.degree, head.window, head.sinks, head.heavy, head.far_dim or sizes.head_dim)


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention function, in the order of their layers."""
    layers = text_config(model).num_hidden_layers
    expect(isinstance(model, PreTrainedModel), "model", "a model of transformers", type(model))
    found = [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
    by_index: dict[Any, nn.Module] = {module.layer_idx: module for module in found}
    one_each = len(found) == layers and set(by_index) == set(range(layers))
    expect(one_each, "model", f"one attention layer for each of {layers} layers", f"{len(found)} of them")
    return [by_index[index] for index in range(layers)]


def _resolve(settings: ModelSettings | HeadSettings | str | Path | None) -> ModelSettings:
    if settings is None:
        return ModelSettings()
    if isinstance(settings, HeadSettings):
        return ModelSettings(settings)
    if isinstance(settings, str | Path):
        return ModelSettings.load(settings)
    expect(isinstance(settings, ModelSettings), "settings", "ModelSettings, HeadSettings or a file", shown(settings))
    return settings

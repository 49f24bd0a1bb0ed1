"""The configuration of our language model as a model of transformers: the fields of `nn.ModelConfig`, checked by it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import ArgumentError, expect
from ..nn import ModelConfig

_SHAPE = [field.name for field in dataclasses.fields(ModelConfig)]
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_THEIRS = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {
    # what transformers writes into a configuration, or hands over with it, beside its fields
    *("_name_or_path", "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "model_type"),
    *("name_or_path", "num_labels", "output_attentions", "quantization_config", "tie_word_embeddings", "torch_dtype"),
}


class TaylorConfig(PreTrainedConfig):
    """Configuration of a `TaylorForCausalLM`.

    Args:
        use_cache: whether the model gives back its states where nothing else is said.
        bos_token_id, eos_token_id, pad_token_id: tokens with a meaning, or None.
        options: the fields of `ModelConfig`, some also by the names that transformers has for them (`hidden_size`,
            `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`), and what every configuration of
            transformers takes.

    Raises:
        ArgumentError: a name is none of these, or a value is none that `ModelConfig` takes.
    """

    model_type = "taylor_attention"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }

    def __init__(
        self,
        *,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        given = {self.attribute_map.get(name, name): value for name, value in options.items()}
        expect(len(given) == len(options), "options", "one name for each", "two names of the same field")
        unknown = sorted(given.keys() - _THEIRS - {*_SHAPE})
        if unknown:
            raise ArgumentError(f"configuration: expected names among {sorted({*_SHAPE, *_TOKENS})}, got {unknown}")
        shape = ModelConfig(**{name: given.pop(name) for name in _SHAPE if name in given})
        for name, value in shape.to_dict().items():
            setattr(self, name, value)
        self.use_cache, self.pad_token_id = use_cache, pad_token_id
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        super().__init__(**given)

    @property
    def shape(self) -> ModelConfig:
        """The same as a `ModelConfig`; raises ArgumentError for a field that was set to what it does not take."""
        return ModelConfig(**{name: getattr(self, name) for name in _SHAPE})

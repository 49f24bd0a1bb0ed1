"""Our language model as a model of transformers: `generate`, `Trainer`, `pipeline`, `save_pretrained`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ArgumentError, StorageError, expect, shown
from ..nn import LanguageModel
from ..nn.transformer import expect_model
from ..ops.validation import expect_tensor
from .configuration import TaylorConfig
from .states import LanguageModelCache

_FOR_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")

_REFUSED = {
    "inputs_embeds": "None, as this model reads input_ids",
    "position_ids": "None, as positions follow from attention_mask and past_key_values",
    "output_attentions": "False, as no attention matrix is formed",
    "output_hidden_states": "False, as hidden states are not kept",
}


class TaylorForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model of `taylor-attention train`, with Taylor or softmax attention, in transformers.

    Args:
        config: a `TaylorConfig`.

    Attributes:
        model: the `LanguageModel` that holds the weights.
    """

    config_class = TaylorConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012  # as transformers declares it
    _is_stateful = True  # states cannot be cropped, which generation with an assistant needs

    def __init__(self, config: TaylorConfig) -> None:
        expect(isinstance(config, TaylorConfig), "config", "a TaylorConfig", type(config))
        super().__init__(config)
        self.model = _initialised(LanguageModel(config.shape))
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **options: Any) -> TaylorForCausalLM:
        """The same model, whose weights it shares, in transformers; `options` are further ones of `TaylorConfig`."""
        expect_model(model)
        with torch.device("meta"):  # weights that are replaced at once are not made
            made = cls(TaylorConfig(**model.config.to_dict(), **options))
        made.model = _initialised(model)
        return made.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LanguageModelCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the token after each one.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, past + T] of 0 (padding, which counts nowhere) and 1.
            past_key_values: what came before; the tokens are appended to it.
            labels: int64 [B, T], the tokens themselves, -100 where none is to be predicted.
            use_cache: whether to give back the states, which are made if none are given; `config.use_cache` if None,
                and not in training.
            logits_to_keep: logits of so many last tokens, or of those at these places; 0 for all.
            return_dict: whether to return a `CausalLMOutputWithPast` or a tuple; `config.return_dict` if None.
            kwargs: for the loss: `num_items_in_batch`, `ignore_index`, `shift_labels`.

        Returns:
            Loss if there are labels, logits [B, T, vocab_size], and the cache if it is used.

        Raises:
            ArgumentError: an argument is not as above, or one that models of transformers have and this one has not.
        """
        _refuse(kwargs)
        expect_tensor("input_ids", input_ids, 2, "[B, T]")
        assert input_ids is not None
        expect(input_ids.shape[1] > 0, "input_ids", "at least one token after what the cache holds", "none")
        cache = self._choose_cache(past_key_values, use_cache)
        mask = _padding(attention_mask, input_ids, 0 if cache is None else cache.length)
        if cache is None:
            logits = self.model(input_ids, key_padding_mask=mask)
        else:
            logits = cache.read(self.model, input_ids, mask)
        logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        loss = None if labels is None else self._loss(logits, labels, kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _choose_cache(self, given: LanguageModelCache | None, use_cache: bool | None) -> LanguageModelCache | None:
        if given is not None:
            expect(isinstance(given, LanguageModelCache), "past_key_values", "a LanguageModelCache", type(given))
            return given
        use = self.config.use_cache and not self.training if use_cache is None else use_cache
        return LanguageModelCache() if use else None

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        expect_tensor("labels", labels, 2, "[B, T]")
        expected = f"shape {tuple(logits.shape[:2])}, as the logits"
        expect(labels.shape == logits.shape[:2], "labels", expected, tuple(labels.shape))
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return loss

    # ---- what transformers asks of a model

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does, but refuse a text that what the cache holds is no beginning of."""
        if next_sequence_length is not None:
            held = input_ids.shape[1] - next_sequence_length
            expected = f"a text longer than the {held} tokens read, or new tokens with an attention_mask over all"
            expect(next_sequence_length > 0, "input_ids", expected, f"{input_ids.shape[1]} tokens")
        theirs: Any = super()
        inputs: dict[str, Any] = theirs.prepare_inputs_for_generation(input_ids, next_sequence_length, *args, **kwargs)
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Generate with our states: the library's caches hold keys and values."""
        asked = generation_config.cache_implementation
        expect(asked is None, "cache_implementation", "None, as this model has its own cache", shown(asked))
        theirs: Any = super()
        result = theirs._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LanguageModelCache()
        return result

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Refuse another attention than that of the configuration."""
        own = requested_attention in (None, "eager")
        expected = "None, as the configuration says how this model attends"
        expect(own, "attn_implementation", expected, shown(requested_attention))
        return "eager"

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse another attention than that of the configuration."""
        self.get_correct_attn_implementation(attn_implementation)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which is the head as well."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, and so the head."""
        expect(isinstance(value, nn.Embedding), "value", "an Embedding", type(value))
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value
        self.model.config = dataclasses.replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> None:
        """None: there is no head but the embedding."""

    def _init_weights(self, module: nn.Module) -> None:
        """Refuse files that lack weights: everything else is initialised when it is made."""
        lacking = [name for name, each in self.named_parameters() if not getattr(each, "_is_hf_initialized", False)]
        if lacking:
            raise StorageError(f"weights: expected all of the configuration, got none for {lacking[:4]}")
        if isinstance(module, nn.Embedding):  # one of another size, to replace the model's
            nn.init.normal_(module.weight, std=0.02)


def _initialised(model: LanguageModel) -> LanguageModel:
    """Tell transformers that the model has initialised its weights itself; those without values wait for a file."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return model


def _refuse(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would otherwise be ignored."""
    for name, value in kwargs.items():
        if name not in _FOR_THE_LOSS and value is not None and value is not False:
            if name not in _REFUSED:
                raise ArgumentError(f"{name}: expected no such argument, got {shown(value)}")
            expect(False, name, _REFUSED[name], shown(value))


def _padding(attention_mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
    """Which of the new tokens to attend to, bool [B, T]; None for all."""
    if attention_mask is None:
        return None
    expect_tensor("attention_mask", attention_mask, 2, "[B, past + T]")
    wanted = (input_ids.shape[0], past + input_ids.shape[1])
    got = tuple(attention_mask.shape)
    expect(got == wanted, "attention_mask", f"shape {wanted}, with the {past} tokens before", got)
    new = attention_mask[:, past:].to(input_ids.device)
    binary = new.dtype == torch.bool or bool(((new == 0) | (new == 1)).all())
    expect(binary, "attention_mask", "0 and 1 alone", "other numbers")
    return None if bool(new.all()) else new.bool()

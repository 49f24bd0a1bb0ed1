"""A small pre-norm language model over bytes; one argument chooses Taylor or softmax attention, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.state import State
from ..errors import ArgumentError, expect, expect_bool, expect_int, is_number, shown
from ..ops.validation import check_reading, expect_tensor
from .attention import SoftmaxAttention, TaylorAttention, check_center_keys, check_far, check_far_gain, check_near_rope
from .cache import KeyValueCache
from .convolution import ConvolvedState, check_conv
from .layer import MAX_WIDTH, check_decay, check_rope, check_rope_base, resolve_sizes
from .norm import RMSNorm

MAX_LAYERS = 2**12
"""More of them were not meant."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `LanguageModel`; names and defaults as `TaylorAttention` has them.

    Attributes:
        vocab_size: symbols; 256 for bytes.
        d_model: width of the residual stream.
        num_layers: blocks.
        num_heads, num_kv_heads, head_dim, value_dim, qk_norm, rope, rope_base, decay, conv: see `TaylorAttention`.
        attention: "taylor" or "softmax".
        degree, window, sinks, heavy, reading, center_keys, far_gain, far_dim: see `TaylorAttention`; a softmax model
            keeps them unused, so that twins differ in one field.
        far_layers: how many of the first layers have a far part; the others attend to near tokens alone, at less cost.
            All if None.
        mlp_ratio: hidden width of the MLP over d_model.

    Where the far past pays, what came closest to softmax with moments in fewer bytes than its cache was `window=128,
    rope="near", far_dim=32, far_layers=1, conv=4, decay=None` with heads of 32; a longer window alone may do better
    (docs/evidence.md, "Trained models").
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    attention: str = "taylor"
    degree: int | None = 2
    window: int = 0
    sinks: int = 0
    heavy: int = 0
    reading: str = "taylor"
    center_keys: bool = False
    far_gain: bool = False
    far_dim: int | None = None
    far_layers: int | None = None
    qk_norm: bool = True
    rope: bool | str = True
    rope_base: float = 10000.0
    decay: str | None = "head"
    conv: int = 0
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        expect_int("vocab_size", self.vocab_size, 1, MAX_WIDTH)
        expect_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        expect_bool("qk_norm", self.qk_norm)
        check_rope(self.rope)
        expect(self.attention in ("taylor", "softmax"), "attention", "'taylor' or 'softmax'", shown(self.attention))
        check_rope_base(self.rope_base)
        check_reading(self.reading, None, True)
        check_center_keys(self.center_keys)
        check_decay(self.decay)
        check_conv(self.conv)
        sizes = (self.d_model, self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim, bool(self.rope))
        _, head_dim, _ = resolve_sizes(*sizes)
        check_far(self.degree, self.window, self.sinks, self.heavy, head_dim, self.far_dim)
        check_far_gain(self.far_gain, self.degree, self.window, self.sinks)
        check_near_rope(self.rope, self.degree, self.window, self.sinks, self.center_keys)
        self._check_far_layers()
        expect(is_number(self.mlp_ratio) and self.mlp_ratio > 0, "mlp_ratio", "a number > 0", shown(self.mlp_ratio))
        fits = 1 <= self.mlp_ratio * self.d_model < MAX_WIDTH + 1
        expect(fits, "mlp_ratio", f"an MLP 1 to {MAX_WIDTH:,} wide at d_model = {self.d_model}", self.mlp_ratio)

    def _check_far_layers(self) -> None:
        if self.far_layers is None:
            return
        expect_int("far_layers", self.far_layers, 1, self.num_layers)
        useful = self.degree is not None and self.window + self.sinks > 0
        expect(useful, "far_layers", "None without a degree, or without a window or sinks", self.far_layers)

    def build_attention(self, layer: int = 0) -> TaylorAttention | SoftmaxAttention:
        """A new attention layer of this configuration, to stand at this place from 0 on."""
        expect_int("layer", layer, 0, self.num_layers - 1)
        sizes = (self.d_model, self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim)
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("qk_norm", "rope", "rope_base", "decay", "conv")
        }
        if self.attention == "softmax":
            return SoftmaxAttention(*sizes, **options)
        options |= {name: getattr(self, name) for name in ("window", "sinks", "heavy")}
        if self.far_layers is not None and layer >= self.far_layers:
            options |= {"degree": None, "rope": bool(self.rope)}
        else:
            far = ("degree", "reading", "center_keys", "far_gain", "far_dim")
            options |= {name: getattr(self, name) for name in far}
        return TaylorAttention(*sizes, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_dict` gave; raises ArgumentError for a name or value that is none of ours."""
        expect(isinstance(values, Mapping), "model configuration", "names and values", shown(values))
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            raise ArgumentError(f"model configuration: expected names among {sorted(known)}, got {unknown}")
        return ModelConfig(**values)


def _expect_config(config: ModelConfig) -> None:
    expect(isinstance(config, ModelConfig), "config", "a ModelConfig", type(config))


def expect_model(model: LanguageModel) -> None:
    """Refuse what is no language model."""
    expect(isinstance(model, LanguageModel), "model", "a LanguageModel", type(model))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the MLP squares a ReLU (So et al. 2021), cheap and no worse."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        _expect_config(config)
        width, hidden = config.d_model, int(config.mlp_ratio * config.d_model)
        self.attention_norm = RMSNorm(width)
        self.attention = config.build_attention(layer)
        self.mlp_norm = RMSNorm(width)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        return_state: bool = False,
        **shared: Any,
    ) -> tuple[Tensor, Any]:
        """x [B, T, d_model] -> the same shape, and the state after it (None unless `return_state`).

        `shared` by all blocks: `key_padding_mask` and `rotation`, as `Attention` takes them.
        """
        self.attention.check_input(x)
        expect_bool("return_state", return_state)
        mixed = self.attention(self.attention_norm(x), state=state, return_state=return_state, **shared)
        mixed, after = mixed if return_state else (mixed, None)
        return self._feed(x + mixed), after

    def decode_(self, x: Tensor, state: Any, **shared: Any) -> Tensor:
        """x [B, n, d_model] -> the same shape; the tokens are appended to `state` in place. `shared`: see `forward`."""
        self.attention.check_input(x)
        return self._feed(x + self.attention.decode_(self.attention_norm(x), state, **shared))

    def _feed(self, x: Tensor) -> Tensor:
        return x + self.contract(functional.relu(self.expand(self.mlp_norm(x))).square())


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, and the embedding again as the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _expect_config(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = RMSNorm(config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model)
        self._initialise()

    def forward(
        self,
        tokens: Tensor,
        *,
        states: Sequence[Any] | None = None,
        return_states: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Any:
        """Predict the symbol after each one.

        Args:
            tokens: int64 [B, T].
            states: what came before, one per layer; not changed.
            return_states: whether to return the states after these tokens as well.
            key_padding_mask: bool [B, T], True = attend.

        Returns:
            Logits [B, T, vocab_size], or (logits, states).

        Raises:
            ArgumentError: the tokens or the states do not fit this model.
        """
        self._check(tokens, states)
        expect_bool("return_states", return_states)
        x, after, past = self._embed(tokens), [], states or [None] * len(self.blocks)
        shared = self._share(x, past[0], key_padding_mask)
        for block, state in zip(self._layers(), past, strict=True):
            x, new = block(x, state=state, return_state=return_states, **shared)
            after.append(new)
        return (self._read(x), after) if return_states else self._read(x)

    @torch.no_grad()
    def decode_(self, tokens: Tensor, states: Sequence[Any], *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits [B, n, vocab_size] of n more tokens [B, n], appended to the states in place, without gradients.

        Where a layer makes keys or values that its state refuses, the states of earlier layers have the tokens already.
        """
        expect(states is not None, "states", "what came before, from new_states(batch_size)", None)
        self._check(tokens, states)
        x = self._embed(tokens)
        shared = self._share(x, states[0], key_padding_mask)
        for block, state in zip(self._layers(), states, strict=True):
            x = block.decode_(x, state, **shared)
        return self._read(x)

    def new_states(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> list[Any]:
        """The states of `batch_size` sequences before their first token, one per layer."""
        return [block.attention.new_state(batch_size, device=device, dtype=dtype) for block in self._layers()]

    def states_from_tensors(self, stored: Sequence[tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> list[Any]:
        """States of this model's kind from what their `tensors()` and `metadata()` gave, one pair per layer.

        Raises:
            StorageError: they are no states.
            ArgumentError: they are those of another model.
        """
        expect(len(stored) == len(self.blocks), "states", f"{len(self.blocks)} of them, one per layer", len(stored))
        restore: Any = KeyValueCache.from_tensors if self.config.attention == "softmax" else State.from_tensors
        if self.config.conv:
            restore = partial(ConvolvedState.from_tensors, attention=restore)
        states = [restore(dict(tensors), dict(metadata)) for tensors, metadata in stored]
        for layer, (state, own) in enumerate(zip(states, self.new_states(0), strict=True)):
            for name, wanted in own.layout.items():
                got = state.layout[name]
                expect(got == wanted, f"state of layer {layer}", f"{name} {wanted}, as this model has it", got)
        return states

    def _check(self, tokens: Tensor, states: Sequence[Any] | None) -> None:
        """Check everything before the first layer changes its state."""
        expect_tensor("tokens", tokens, 2, "[B, T]")
        expect(tokens.dtype == torch.int64, "tokens", "dtype torch.int64", tokens.dtype)
        device = self.embedding.weight.device
        expect(tokens.device == device, "tokens", f"the model's device {device}", str(tokens.device))
        if states is None:
            return
        layers = self._layers()
        good = isinstance(states, Sequence) and len(states) == len(layers)
        expect(
            good,
            "states",
            f"{len(layers)} of them, one per layer",
            len(states) if isinstance(states, Sequence) else type(states),
        )
        expect(len(set(map(id, states))) == len(states), "states", "another one for each layer", "one of them twice")
        for block, state in zip(layers, states, strict=True):
            block.attention.check_state(state, len(tokens))

    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))  # ModuleList forgets what it holds

    def _share(self, x: Tensor, state: Any, key_padding_mask: Tensor | None) -> dict[str, Any]:
        """What is the same in all blocks: the padding, and the rotation at the positions that the first state gives."""
        rotation = self._layers()[0].attention.rotation(x, state=state, key_padding_mask=key_padding_mask)
        return {"key_padding_mask": key_padding_mask, "rotation": rotation}

    def _embed(self, tokens: Tensor) -> Tensor:
        try:
            embedded = self.embedding(tokens)
        except IndexError as error:
            raise ArgumentError(f"tokens: expected values in 0..{self.config.vocab_size - 1}, got others") from error
        return self.embedding_norm(embedded)  # [B, T, d_model]

    def _read(self, x: Tensor) -> Tensor:
        return functional.linear(self.norm(x), self.embedding.weight)  # [B, T, vocab_size]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Unit-variance activations in every layer; what writes to the residual stream starts smaller with depth."""
        nn.init.normal_(self.embedding.weight, std=0.02)  # small logits; what enters the blocks is normalised
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("attention.output", "contract"))
                depth = (2 * self.config.num_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(module.weight, std=depth * module.in_features**-0.5)

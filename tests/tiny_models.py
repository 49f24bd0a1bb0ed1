"""Randomly initialised models of transformers, small enough for tests, whose scores are large enough to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor

VOCABULARY = 61
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"
LAYERS = 2
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_ROTARY = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}
_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
_BERT = {**_SHAPE, "intermediate_size": 48, "max_position_embeddings": 64}

# architecture: what its name begins with, and the arguments of its configuration
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_ROTARY}),
    "qwen2": ("Qwen2", {**_ROTARY}),
    "qwen3": ("Qwen3", {**_ROTARY}),
    "gemma": ("Gemma", {**_ROTARY}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
}

# others, by what their names begin with: they differ in scales, biases, norms, partial rotation, parallel blocks
MORE = [
    "Arcee",
    "Cohere",
    "Ernie4_5",
    "Glm4",
    "GPTNeoX",
    "Granite",
    "OPT",
    "Olmo2",
    "Phi",
    "Phi3",
    "SmolLM3",
]
_PLAIN = {**_SHAPE, "intermediate_size": 48}


def plain_model(prefix: str) -> Any:
    """A language model of an architecture of `MORE`, in evaluation."""
    return make(prefix, "ForCausalLM", **_PLAIN)


def causal_model(name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A language model of an architecture of `CAUSAL`, in evaluation, with other options of its configuration."""
    prefix, arguments = CAUSAL[name]
    suffix = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    return make(prefix, suffix, dtype, **{**arguments, **options})


def encoder(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A BERT, in evaluation."""
    return make("Bert", "Model", dtype, **{**_BERT, **options})


def make(prefix: str, suffix: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> Any:
    """A model by the names of its classes."""
    config = getattr(transformers, f"{prefix}Config")(**{**_SPECIAL, **arguments})
    return getattr(transformers, f"{prefix}{suffix}")(config).to(dtype).eval()


def rotary(**options: Any) -> dict[str, Any]:
    """Arguments for the configuration of another small model with rotary positions."""
    return {**_ROTARY, **options}


def token_ids(batch: int, length: int) -> Tensor:
    """Tokens, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length))


def pad_left(tokens: Tensor, hidden: list[int]) -> tuple[Tensor, Tensor]:
    """The tokens with the first few of each sequence taken for padding, and their attention mask, int64 [B, T]."""
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(hidden)[:, None]
    return tokens * mask, mask.long()


def tokenizer_of(*, special: bool) -> transformers.PreTrainedTokenizerFast:
    """A token for each letter; special: [CLS] before a text and [SEP] after it."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
    made = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, "[UNK]"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if special:
        made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def save_models(folder: Path) -> Path:
    """Write a language model "causal" and an encoder "encoder" with tokenizers, and "text.txt", to a folder."""
    torch.manual_seed(0)
    for name, model in {"causal": causal_model(dtype=torch.float32), "encoder": encoder(torch.float32)}.items():
        model.save_pretrained(folder / name)
        tokenizer_of(special=name == "encoder").save_pretrained(folder / name)
    letters = torch.randint(len(LETTERS), (900,)).tolist()
    (folder / "text.txt").write_text("".join(LETTERS[each] for each in letters), encoding="utf-8")
    return folder

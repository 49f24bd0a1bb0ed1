"""Models of transformers with this attention: our language model.

Importing it makes our language model known to the Auto classes of transformers.
"""

# ruff: noqa: E402  # what is imported below needs transformers, and its absence is one clear sentence

from ..errors import require

require("transformers", "hf", "taylor_attention.hf")

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import TaylorConfig
from .convert import from_checkpoint, to_checkpoint
from .modeling import TaylorForCausalLM
from .states import LanguageModelCache
from .tokenizer import byte_tokenizer

AutoConfig.register(TaylorConfig.model_type, TaylorConfig)
AutoModelForCausalLM.register(TaylorConfig, TaylorForCausalLM)

__all__ = [
    "LanguageModelCache",
    "TaylorConfig",
    "TaylorForCausalLM",
    "byte_tokenizer",
    "from_checkpoint",
    "to_checkpoint",
]

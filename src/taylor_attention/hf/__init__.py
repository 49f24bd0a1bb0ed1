"""Models of transformers with this attention: existing architectures, and our own language model.

Importing it makes the attention function "taylor" and our language model known to transformers.
"""

# ruff: noqa: E402  # what is imported below needs transformers, and its absence is one clear sentence

from ..errors import require

require("transformers", "hf", "taylor_attention.hf")

from transformers import AutoConfig, AutoModelForCausalLM

from . import profiling
from .cache import TaylorCache
from .centres import load_key_centres, save_key_centres, set_key_centres
from .configuration import TaylorConfig
from .convert import from_checkpoint, to_checkpoint
from .distilled import Distilled
from .far_maps import FarMap, load_far_maps, save_far_maps, set_far_maps
from .interface import register
from .modeling import TaylorForCausalLM
from .models import settings_of, use
from .settings import HeadSettings, ModelSettings
from .states import LanguageModelCache
from .tokenizer import byte_tokenizer

register()
AutoConfig.register(TaylorConfig.model_type, TaylorConfig)
AutoModelForCausalLM.register(TaylorConfig, TaylorForCausalLM)

__all__ = [
    "Distilled",
    "FarMap",
    "HeadSettings",
    "LanguageModelCache",
    "ModelSettings",
    "TaylorCache",
    "TaylorConfig",
    "TaylorForCausalLM",
    "byte_tokenizer",
    "from_checkpoint",
    "load_far_maps",
    "load_key_centres",
    "profiling",
    "save_far_maps",
    "save_key_centres",
    "set_far_maps",
    "set_key_centres",
    "settings_of",
    "to_checkpoint",
    "use",
]

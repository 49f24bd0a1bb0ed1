"""Layers: Taylor attention, its softmax twin, and a small language model made of either."""

from .attention import SoftmaxAttention, TaylorAttention
from .cache import KeyValueCache
from .transformer import Block, LanguageModel, ModelConfig

__all__ = ["Block", "KeyValueCache", "LanguageModel", "ModelConfig", "SoftmaxAttention", "TaylorAttention"]

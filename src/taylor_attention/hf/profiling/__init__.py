"""The profiler: what a model of transformers attends to on a text, and what each head would have to keep of it."""

from .effect import effect_steps, embeddings, measure_effect, next_token_loss, token_losses, widest
from .loading import cut, load_model, load_tokenizer, longest, pieces, read_text
from .profiler import profile
from .recommend import Recommendation, recommend, recommend_within
from .statistics import Choice, Head, Profile

__all__ = [
    "Choice",
    "Head",
    "Profile",
    "Recommendation",
    "cut",
    "effect_steps",
    "embeddings",
    "load_model",
    "load_tokenizer",
    "longest",
    "measure_effect",
    "next_token_loss",
    "pieces",
    "profile",
    "read_text",
    "recommend",
    "recommend_within",
    "token_losses",
    "widest",
]

"""Text as bytes: a tokenizer of transformers whose ids are the bytes of UTF-8, as our models are trained on them."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

END, END_ID = "<|end|>", 255
"""What begins, ends and pads texts: a byte that no UTF-8 text contains."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes; every text comes back as it was, and nothing is added to it.

    It is saved as `tokenizer.json`, which transformers reads without this package.
    """
    letters = _letters()
    vocabulary = {letters[byte]: byte for byte in range(END_ID)} | {END: END_ID}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",  # so that what is generated follows the prompt
        clean_up_tokenization_spaces=False,
    )


def _letters() -> list[str]:
    """The letter that stands for each byte in files of byte-level tokenizers: itself where it is one that shows."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]

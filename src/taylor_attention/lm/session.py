"""A session: a text being read and written, which can be put away in a file and taken up again, exactly.

It holds everything that the next byte depends on: the states of the layers, the pending logits and the generator that
the draws come from. So N bytes in one go are the same, bit for bit, as stopping, saving, loading and going on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.storage import read_tensors, write_tensors
from ..core.values import check_finite
from ..errors import LARGEST_INT, StorageError, expect, expect_int, first_line
from ..nn import LanguageModel
from ..nn.checkpoint import fingerprint
from ..nn.states import pack_states, unpack_states
from ..nn.transformer import expect_model
from .generation import BLOCK, advance, prefill

KIND = "session"


class Session:
    """One text under a model: read bytes into it, draw bytes from it, save it, load it.

    Args:
        model: the language model, over bytes (vocab_size 256).
        seed: where the draws start; kept with the session.

    Attributes:
        states: one per layer, each of the model's own kind.
        logits: the pending logits [1, V] in the model's dtype, or None while nothing has been read.
        unshown: bytes drawn but not shown yet, the start of a UTF-8 character (for who prints the text).
    """

    def __init__(self, model: LanguageModel, *, seed: int = 0) -> None:
        expect_model(model)
        size = model.config.vocab_size
        expect(size == 256, "model", "a vocabulary of the 256 bytes", size)
        expect_int("seed", seed, -LARGEST_INT - 1)
        self.model = model
        self.seed = seed
        self.states: list[Any] = model.new_states(1)
        self.logits: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.unshown = b""

    @property
    def tokens(self) -> int:
        """Bytes read and written so far."""
        return int(self.states[0].tokens[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the context takes: constant for Taylor attention, growing for softmax."""
        return sum(state.nbytes for state in self.states)

    def read(self, text: bytes, *, block: int = BLOCK) -> None:
        """Append bytes to the context. Interrupted, it has read whole blocks and stays usable.

        Raises:
            ArgumentError: the text is empty, or no bytes.
        """
        expect(isinstance(text, bytes | bytearray), "text", "bytes", type(text))
        expect(len(text) > 0, "text", "at least one byte", "none")
        expect_int("block", block, 1)
        for start in range(0, len(text), block):
            part = torch.frombuffer(bytearray(text[start : start + block]), dtype=torch.uint8)
            with uninterrupted():
                self.logits = prefill(self.model, self.states, part[None].long(), block=block)

    def step(self, **sampling: Any) -> int:
        """Draw one byte and append it; `sampling` is `temperature`, `top_k`, `top_p` of `generation.sample`.

        Raises:
            ArgumentError: nothing has been read yet, so there is nothing to draw from.
        """
        expect(self.logits is not None, "session", "a text to go on from", "nothing read yet")
        assert self.logits is not None
        with uninterrupted():
            token, self.logits = advance(self.model, self.states, self.logits, generator=self.generator, **sampling)
        return int(token)

    def stream(self, tokens: int | None = None, **sampling: Any) -> Iterator[int]:
        """Draw bytes one after another, without end if `tokens` is not given; see `step`."""
        if tokens is not None:
            expect_int("tokens", tokens, 0)
        for _ in islice(count(), tokens):
            yield self.step(**sampling)

    def save(self, path: str | Path) -> None:
        """Write everything to a file, replacing it atomically.

        Raises:
            StorageError: the file cannot be written, or the session holds what `load` would refuse, as NaN; what stood
                there before still stands.
        """
        tensors = {"generator": self.generator.get_state()}
        if self.logits is not None:
            tensors["logits"] = self.logits
        mark = fingerprint(self.model)
        metadata = {"model": mark, "seed": str(self.seed), "unshown": self.unshown.hex()}
        states, described = pack_states(self.states)
        tensors, metadata = {**tensors, **states}, {**metadata, **described}
        self._restore(path, self.model, mark, tensors, metadata)  # refuses what could not be read again
        write_tensors(path, tensors, kind=KIND, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> Session:
        """Take up a saved session; it goes on exactly where it stopped.

        Raises:
            StorageError: the file is missing, damaged or no session, or it was made with another model.
        """
        return cls._restore(path, model, fingerprint(model), *read_tensors(path, kind=KIND))

    @classmethod
    def _restore(
        cls, path: str | Path, model: LanguageModel, mark: str, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> Session:
        """The session of the model of this fingerprint that the tensors and the text describe, or StorageError."""
        try:
            expect(metadata["model"] == mark, "model", "the one that made the session", "another model")
            session = cls(model, seed=int(metadata["seed"]))
            session.generator.set_state(tensors["generator"])
            session.unshown = bytes.fromhex(metadata["unshown"])
            session.states, session.logits = unpack_states(model, tensors, metadata), tensors.get("logits")
            session._check()
        except KeyError as error:
            raise StorageError(f"{path}: no whole session: it lacks {error}") from error
        except (StorageError, ValueError, TypeError, RuntimeError) as error:  # RuntimeError: PyTorch's on generators
            raise StorageError(f"{path}: no session to go on with: {first_line(error)}") from error
        return session

    def _check(self) -> None:
        """Raise `ValueError` unless the states and the logits are of one and the same text."""
        at = self.states[0].tokens.tolist()
        expect(len(at) == 1, "states", "those of one text", at)
        expect((self.logits is None) == (at == [0]), "logits", "those after the last byte read, if any was", at)
        if self.logits is not None:
            wanted, got = (self.model.embedding.weight.dtype, (1, 256)), (self.logits.dtype, tuple(self.logits.shape))
            expect(got == wanted, "logits", f"{wanted}", got)
            check_finite("logits", self.logits)


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Hold Ctrl-C back until the block ends, so that states, logits and generator always belong to the same byte.

    The block gets a list, which is empty until Ctrl-C has come. Blocks may be nested; outside the main thread, where
    signals do not arrive, nothing is held back.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)
    if came and callable(previous):
        previous(signal.SIGINT, None)

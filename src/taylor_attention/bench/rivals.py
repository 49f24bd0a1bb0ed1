"""What the library is measured against: softmax over all tokens or the latest, the recurrence, anyone's callable.

A callable joins through a factory, which is called with heads, head_dim, value_dim, degree and causal (always True) and
returns `attend(query, key, value, continue_sequence) -> y`, [1, heads, T, d] each. The callable keeps its own state:
with continue_sequence the tokens follow those of the calls before, without it they begin a sequence.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..core.basis import expand, reading_weights
from ..core.cost import cache_size
from ..core.series import EXP
from ..core.state import State
from ..errors import expect
from .limits import FLOAT_BYTES

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Factory = Callable[..., Attend]


class Recurrent:
    """The paper's recurrence as it is written: S += Phi(k) [v, 1]^T for each token, then [N | Z] = (c C Phi(q))^T S.

    One token changes S [1, H, M, E] in place. Of several, each one's own S is formed, for a few tokens at a time so
    that memory stays bounded; where gradients are recorded, such a block is computed again on the way back.
    """

    _BLOCK = 2**22  # elements of the states of a block

    def __init__(self, *, heads: int, head_dim: int, value_dim: int, degree: int, causal: bool) -> None:
        expect(causal, "causal", "True", causal)
        self.degree, self.scale = degree, head_dim**-0.5
        self.weights = reading_weights(head_dim, EXP.coefficients(degree), torch.float32)  # c_p C_p, [M]
        self.state = torch.zeros(1, heads, len(self.weights), value_dim + 1)
        self.block = max(1, self._BLOCK // self.state.numel())

    def begin_after(self, state: State) -> None:
        """Go on from the tokens of a state: its moments are the same numbers."""
        self.state = state.moments.transpose(2, 3).contiguous()  # [1, H, M, E]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, continue_sequence: bool) -> Tensor:
        """Attention of the tokens after those before, or of a new sequence."""
        if not continue_sequence:
            self.state = torch.zeros_like(self.state)
        if query.shape[2] == 1 and not torch.is_grad_enabled():
            return self._attend_one(query, key, value)
        found = []
        for part in zip(*(x.split(self.block, dim=2) for x in (query, key, value)), strict=True):
            if torch.is_grad_enabled():
                y, self.state = checkpoint(self._attend_block, self.state, *part, use_reentrant=False)
            else:
                y, self.state = self._attend_block(self.state, *part)
            found.append(y)
        self.state = self.state.detach()
        return torch.cat(found, dim=2)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi = expand(k, self.degree).transpose(2, 3)  # [1, H, M, 1]
        self.state.flatten(0, 1).baddbmm_(phi.flatten(0, 1), _with_one(v).flatten(0, 1))
        return _divide(self._weigh(q) @ self.state)

    def _attend_block(self, state: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        added = expand(k, self.degree)[..., None] * _with_one(v)[..., None, :]  # [1, H, C, M, E]
        states = state[:, :, None] + added.cumsum(2)
        read = self._weigh(q)[..., None, :] @ states  # [1, H, C, 1, E]
        return _divide(read.squeeze(3)), states[:, :, -1].clone()  # the view would keep the whole block

    def _weigh(self, q: Tensor) -> Tensor:
        return expand(q * self.scale, self.degree) * self.weights  # [1, H, C, M]


def _with_one(value: Tensor) -> Tensor:
    return torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)


def _divide(read: Tensor) -> Tensor:
    return read[..., :-1] / read[..., -1:]


class Memory:
    """Memory that one case leaves to the next: where touching new pages is slow, it takes longer than measuring."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held.nbytes

    def take(self, elements: int) -> Tensor:
        """So many float32, of any value; what was taken before is overwritten."""
        if self._held.numel() < elements:
            self._held = torch.empty(0)  # given back first: both together may be too much
            self._held = torch.empty(elements)
        return self._held[:elements]


class KeyValueCache:
    """The keys and values of a context, preallocated with room for the next tokens; decoded with PyTorch's softmax.

    When the room is full it is used again from its beginning, so that the context stays as long as it was.
    """

    def __init__(self, key: Tensor, value: Tensor, copies: int, room: int, memory: Memory) -> None:
        """A cache that holds key and value, [1, H, p, d] both, so many times over, and `room` more tokens."""
        _, heads, tokens, head_dim = key.shape
        self.context, self.room, self.used = copies * tokens, room, 0
        held = memory.take(self.size(self.context + room, heads, head_dim) // FLOAT_BYTES)
        self.key, self.value = held.view(2, 1, heads, self.context + room, head_dim)
        for kept, x in ((self.key, key), (self.value, value)):
            kept[:, :, : self.context].unflatten(2, (copies, tokens)).copy_(x.unsqueeze(2))

    @staticmethod
    def size(tokens: int, heads: int, head_dim: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return FLOAT_BYTES * cache_size(tokens, head_dim, kv_heads=heads)

    def decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write one token into the cache and attend from it to what is filled: [1, H, 1, d] each."""
        self.used %= self.room
        place = self.context + self.used
        self.key[:, :, place], self.value[:, :, place] = key[:, :, 0], value[:, :, 0]
        self.used += 1
        filled = slice(0, place + 1)
        return scaled_dot_product_attention(query, self.key[:, :, filled], self.value[:, :, filled])


class Ring:
    """The keys and values of the latest tokens; decoded with PyTorch's softmax."""

    def __init__(self, key: Tensor, value: Tensor, window: int) -> None:
        """A ring of `window` tokens after these, [1, H, T, d] both."""
        _, heads, self.tokens, head_dim = key.shape
        self.key, self.value = key.new_empty(2, 1, heads, window, head_dim)
        places = torch.arange(max(0, self.tokens - window), self.tokens)
        self.key[:, :, places % window], self.value[:, :, places % window] = key[:, :, places], value[:, :, places]

    def decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Put one token in the oldest one's place and attend from it to all: [1, H, 1, d] each."""
        window = self.key.shape[2]
        place = self.tokens % window
        self.key[:, :, place], self.value[:, :, place] = key[:, :, 0], value[:, :, 0]
        self.tokens += 1
        filled = slice(0, self.tokens)
        return scaled_dot_product_attention(query, self.key[:, :, filled], self.value[:, :, filled])


def slide(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Softmax over the latest `window` keys of each query by PyTorch's own, [1, H, T, d] each.

    Blocks of `window` queries see their own keys and those of the block before, within a band.
    """
    tokens, place = query.shape[2], torch.arange(window)
    q, k, v = (pad(x[0], (0, 0, 0, -tokens % window)).unflatten(1, (-1, window)) for x in (query, key, value))
    k, v = (torch.cat((pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x), dim=2) for x in (k, v))  # [H, T / window, 2 window, d]
    band = torch.cat((place > place[:, None], place <= place[:, None]), dim=1).repeat(q.shape[1], 1, 1)
    band[0, :, :window] = False  # nothing is before the first block
    # a mask with an axis less would keep PyTorch from its fused kernel
    return scaled_dot_product_attention(q, k, v, attn_mask=band[None]).flatten(1, 2)[None, :, :tokens]


def load_factory(place: str) -> tuple[str, Factory]:
    """A short name and the factory that `module:function` or `path/to/file.py:function` names.

    Raises:
        ArgumentError: there is no such file, module or function.
    """
    source, _, name = place.rpartition(":")
    expect(bool(source and name), "--against", "module:function or path/to/file.py:function", place)
    is_file = source.endswith(".py")
    expect(not is_file or Path(source).is_file(), "--against", "a file that exists", source)
    try:
        module = _load_file(Path(source)) if is_file else _load_module(source)
    except ImportError as error:
        expect(False, "--against", "a module that can be imported", f"{source} ({error})")
    factory: Any = getattr(module, name, None)
    expect(callable(factory), "--against", f"a function in {source}", name)
    return f"{Path(source).name if is_file else source}:{name}", factory


@contextlib.contextmanager
def _searching(folder: Path) -> Iterator[None]:
    """Let imports find what lies in a folder, as they do for a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _load_module(name: str) -> ModuleType:
    with _searching(Path.cwd()):
        return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    with _searching(path.resolve().parent):
        spec.loader.exec_module(module)
    return module

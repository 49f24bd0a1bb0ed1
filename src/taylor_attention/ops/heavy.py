"""Which tokens stay exact for their weight: when a token leaves the window it competes for a few places.

Its priority is the attention that it got while it was in the window: the sum over the queries that saw it there, and
over the query heads that share its key/value head, of its weight among the window's tokens, by softmax. Log decay takes
as much off later as off all others, so priorities can be compared at any time. The choice depends on nothing but the
tokens, so it does not depend on how they are cut into pieces; for gradients it is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.near import Near
from ..core.state import wide_dtype
from . import compiled
from .backends import uses_kernels
from .near import attend_near, attend_near_backward
from .sequence import NEVER, Sequence, with_one


def attention_received(sequence: Sequence) -> Tensor:
    """The attention that each token of ext has got from the queries that had it in their window, [B, Hkv, P + T].

    That is the gradient of sum_t log Z_t by a factor on the key, with Z_t the softmax normaliser of query t's window.
    """
    key, visible, gates = sequence.ext_key, sequence.ext_visible, sequence.ext_gates  # kept by it, gradients and all
    key = sequence.near_part(key)
    totals, none = sequence.totals, (None, None, None, None, None)  # no sinks
    with torch.no_grad():
        query = sequence.near_part(sequence.query)
        silent = ~query.isfinite().all(-1, keepdim=True)  # [B, Hq, T, 1], queries that do not count
        if sequence.visible is not None:
            silent = silent | ~sequence.visible[:, None, :, None]
        query, value = query.masked_fill(silent, 0), key.new_zeros(*key.shape[:3], 1)
        arguments = (query, key, value, None, visible, gates, *none, sequence.window, sequence.backend)
        out, top = attend_near(*arguments)
        grad = torch.zeros_like(out)
        grad[..., 0] = torch.where(out[..., -1] > 0, 1 / out[..., -1], 0)
        grad.masked_fill_(silent, 0)
        found = attend_near_backward(grad, out, top, *arguments)[2][..., 0].to(wide_dtype(key.device))
        if sequence.start is None or sequence.before is None:
            return found
        before = sequence.before.received_in_order(sequence.start.tokens)
        return found + sequence.extend(before, torch.zeros_like(totals), 2)


@dataclass(frozen=True)
class Choice:
    """Who holds the places while `n` tokens leave the window, one after the other.

    Candidates are numbered: first who holds the H places at the start, then the n leaving tokens.

    Attributes:
        leaver: [R, n], the candidate who joins the far part when the n-th token leaves the window; -1: none.
        until: [R, H + n], with which leaving token each candidate loses its place (NEVER: it still has it); of no
            meaning (and not after it came) for those who got none.
        holder: [R, H], the candidates who hold the places at the end.
        priority: [R, H], theirs.
    """

    leaver: Tensor
    until: Tensor
    holder: Tensor
    priority: Tensor

    def unflatten(self, batch: int, heads: int) -> Choice:
        """The same with rows as [batch, heads]."""
        return Choice(*(x.unflatten(0, (batch, heads)) for x in vars(self).values()))


@torch.no_grad()
def choose(priority: Tensor, leaves: Tensor, held: Tensor, backend: str) -> Choice:
    """Give places to the highest priorities; of equals the one who holds it keeps it.

    Args:
        priority: float64 [R, n] of the tokens that leave. leaves: bool [R, n], whether one does.
        held: float64 [R, H] of who holds the places at the start, -inf: free.
    """
    rows, count = priority.shape
    places, held = held.shape[1], held.clone()
    holder = torch.arange(places, device=held.device).where(held > -torch.inf, -1)  # [R, H]
    leaver = holder.new_full((rows, count), -1)
    until = holder.new_zeros(rows, places + count)
    until[:, :places] = torch.where(held > -torch.inf, NEVER, -NEVER)
    if uses_kernels(backend, held.device):
        tensors = (priority.contiguous(), leaves.contiguous(), held, leaver, until, holder)
        compiled.kernels().choose(rows, count, places, NEVER, *map(compiled.address, tensors))
        return Choice(leaver, until, holder, held)
    row = torch.arange(rows, device=held.device)
    for n in range(count):
        lowest, place = held.min(-1)
        enters = leaves[:, n] & (priority[:, n] > lowest)
        loser = torch.where(enters, holder[row, place], places + n)
        leaver[:, n] = torch.where(leaves[:, n], loser, -1)
        out = enters & (loser >= 0)
        until[row[out], loser[out]] = n
        until[:, places + n] = torch.where(enters, NEVER, 0)
        held[row, place] = torch.where(enters, priority[:, n], lowest)
        holder[row, place] = torch.where(enters, places + n, holder[row, place])
    return Choice(leaver, until, holder, held)


@dataclass(frozen=True)
class Contest:
    """Tokens that leave the window, and who holds the places of heavy ones meanwhile; see `choose`.

    Candidates [B, Hkv, H + n, ...]: who holds the places at the start, then the leaving tokens.
    """

    key: Tensor
    columns: Tensor  # [v, 1]
    totals: Tensor
    choice: Choice
    received: Tensor  # attention that each place of ext has got, [B, Hkv, P + T]
    first: int

    def _pick(self, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, [v, 1] and totals of candidates [B, Hkv, m]; zeros where that is -1."""
        at, none = candidates.clamp(min=0), candidates < 0
        key, columns = (
            x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3])).masked_fill(none[..., None], 0)
            for x in (self.key, self.columns)
        )
        return key, columns, self.totals.gather(2, at).masked_fill(none, 0)

    @property
    def leaver(self) -> tuple[Tensor, Tensor, Tensor]:
        """Who joins the far part with each query from `first` on."""
        return self._pick(self.choice.leaver)

    @property
    def holder(self) -> tuple[Tensor, Tensor, Tensor]:
        """Who holds the places at the end."""
        return self._pick(self.choice.holder)

    def held(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Who holds a place for some query in begin..end: as `_pick`, and from and until which query."""
        places, all_until = self.choice.holder.shape[-1], self.choice.until
        place = torch.arange(all_until.shape[-1], device=all_until.device)
        since = torch.where(place < places, -1, self.first + place - places).expand_as(all_until)
        until = torch.where(all_until == NEVER, NEVER, self.first + all_until)
        there = (since < end) & (until > begin) & (until > since)
        most = int(there.sum(-1).max()) if there.numel() else 0
        candidates = there.long().argsort(dim=-1, descending=True, stable=True)[..., :most]
        since = since.masked_fill(~there, NEVER)
        return (*self._pick(candidates), since.gather(-1, candidates), until.gather(-1, candidates))


def find_contest(sequence: Sequence) -> Contest:
    """Who holds the places of heavy tokens while the new tokens come."""
    count, visible, near = sequence.leaving, sequence.ext_visible, sequence.before
    key, totals = sequence.ext_key[:, :, :count], sequence.ext_totals[..., :count]
    columns, leaves = with_one(key, sequence.ext_value[:, :, :count]), torch.ones_like(totals, dtype=torch.bool)
    if visible is not None:
        leaves = visible[:, None, :count].expand_as(leaves)
        key, columns = key.masked_fill(~leaves[..., None], 0), columns.masked_fill(~leaves[..., None], 0)
    if near is None:
        near = Near.zeros(columns.mT, totals.sum(-1), key.shape[3], 0, 0, sequence.heavy)
    received = attention_received(sequence)
    with torch.no_grad():
        priority = (received[..., :count].log() - totals).flatten(0, 1)
        choice = choose(priority, leaves.flatten(0, 1), near.heavy_priority.flatten(0, 1), sequence.backend)
    return Contest(
        torch.cat([near.heavy_key.mT, key], 2),
        torch.cat([near.heavy_value.mT, columns], 2),
        torch.cat([near.heavy_log_decay, totals], 2),
        choice.unflatten(*key.shape[:2]),
        received,
        sequence.first,
    )

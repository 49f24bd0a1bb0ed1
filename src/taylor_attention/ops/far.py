"""The far part of exact and far attention as a problem of the pure method: keys that lag behind the queries.

Query t reads the token that leaves the window when t comes, which stands W places before it, and all before that: with
ext as in `sequence`, causal attention of the new queries to the first places of ext. Sinks are hidden there, and where
a leaving token takes a heavy one's place, that one stands in for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.basis import feature_count
from .heavy import Contest
from .operator import attend, is_recorded
from .sequence import Sequence


@dataclass(frozen=True)
class Far:
    """The far part as a causal problem of its own, for queries from `first` on; see `attend`.

    Where something fades, a key that joins has faded since it came, and heads may have different keys: then [v, 1]
    comes scaled as the value (`weighted`), and the operator's own column of ones is ignored.
    """

    first: int
    weighted: bool
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    gates: Tensor | None
    sums: Tensor | None
    compensation: Tensor | None

    def attend(
        self, coefficients: tuple[float, ...], chunk: int, keep: bool, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N | Z] of the queries from `first` on [B, Hq, F, E], and if kept the moments at the end and compensation."""
        features = feature_count(self.key.shape[3], len(coefficients) - 1)
        sums, compensation = (
            x if x is None or x.shape[3] == features else x[..., :features].contiguous()  # of a lower degree
            for x in (self.sums, self.compensation)
        )
        out, end, dropped, _ = attend(
            self.query,
            self.key,
            self.value,
            self.visible,
            self.gates,
            None,
            sums,
            compensation,
            coefficients,
            True,
            chunk,
            keep,
            backend,
            is_recorded(self.query, self.key, self.value, self.gates, self.sums),
        )
        if self.weighted:
            out = out[..., :-1]
            end, dropped = (x[:, :, :-1].contiguous() for x in (end, dropped)) if keep else (end, dropped)
        return out, end, dropped

    def count(self, backend: str) -> Tensor:
        """How many far keys each query from `first` on sees, faded ones for less: [B, Hq, F]."""
        with torch.no_grad():
            return self._count(backend)

    def _count(self, backend: str) -> Tensor:
        if not self.weighted:
            shown = self.key.new_ones(self.key.shape[0], 1, self.key.shape[2])
            seen = (shown if self.visible is None else self.visible[:, None].to(shown.dtype)).cumsum(-1)
            if self.sums is None:
                return seen.expand(-1, self.query.shape[1], -1)
            return (seen + self.sums[:, :, -1, :1]).repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        one = replace(
            self,
            query=torch.zeros_like(self.query[..., :1]),
            key=torch.zeros_like(self.key[..., :1]),
            value=self.value[..., -1:],
            sums=None if self.sums is None else self.sums[:, :, -2:],
            compensation=None if self.compensation is None else self.compensation[:, :, -2:],
        )
        return one.attend((1.0,), 0, False, backend)[0][..., 0]


def find_far(sequence: Sequence, contest: Contest | None) -> Far | None:
    """The far part; None where no query sees any far key."""
    first, count = sequence.first, sequence.leaving
    if count == 0:
        return None
    start, shown, gates = sequence.start, sequence.ext_visible, sequence.fading
    sums, compensation = (None, None) if start is None else (start.sums, start.compensation)
    query, key = sequence.far_part(sequence.query)[:, :, first:], sequence.far_part(sequence.ext_key)[:, :, :count]
    value = sequence.ext_value[:, :, :count]
    shown = None if shown is None else shown[:, :count]
    if gates is None and contest is None:
        return Far(first, False, query, key, value, shown, None, sums, compensation)
    if contest is not None:
        key, columns, totals = contest.leaver
        key = sequence.far_part(key)
    else:
        columns, totals = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1), sequence.ext_totals[..., :count]
        if shown is not None:
            hidden = ~shown[:, None, :, None]
            key, columns = key.masked_fill(hidden, 0), columns.masked_fill(hidden, 0)
    if gates is not None:
        since = sequence.ext_totals[..., sequence.window : sequence.window + count] - totals
        faded = since.clamp(max=0).exp()  # above 0 only for hidden tokens, moved before those that came earlier
        columns, gates = columns * faded.to(columns.dtype)[..., None], gates[..., first:]
    if sums is not None and compensation is not None:
        sums, compensation = (pad(x, (0, 0, 0, 1)) for x in (sums, compensation))
    return Far(first, True, query, key, columns, None, gates, sums, compensation)

"""Which token of each row a decoder's head reads, and which rank has it.

In a batch of several lengths the last column is not every row's last token: rows may be padded on
the right, and a classifier looks for the last token that is no padding by its id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan


@dataclass(frozen=True, eq=False)
class LastTokens:
    """The last token of each row of a batch.

    Attributes:
        ranks: int64 [B], on a CPU, the rank that answers for the row's last token.
        places: int64 [B], where it is among what that rank answers for: the replicated tokens in
            front, then its shard.
    """

    ranks: Tensor
    places: Tensor

    @classmethod
    def of(cls, tokens: Tensor, plan: Plan) -> LastTokens:
        """From each row's last token, int64 [B], as a column of the whole sequence."""
        columns = tokens.cpu()
        # where the shard after each begins
        starts = torch.tensor(plan.bounds[1:], device="cpu") + plan.copies
        ranks = torch.searchsorted(starts, columns, right=True).clamp(max=plan.world_size - 1)
        shards = torch.tensor(plan.bounds, device="cpu")[ranks]
        replicated = columns < plan.copies  # every rank has these; the owner answers for them
        places = torch.where(replicated, columns, columns - shards)
        return cls(torch.where(replicated, plan.owner, ranks), places)

    @property
    def senders(self) -> set[int]:
        return set(self.ranks.tolist())

    def rows(self, rank: int) -> Tensor:
        """int64, the rows whose last token `rank` has, in order."""
        return (self.ranks == rank).nonzero().flatten()

    def take(self, hidden: Tensor, rank: int) -> Tensor:
        """Of `rank`'s hidden states [B, L, D], those of its rows' last tokens, [rows, 1, D]."""
        rows = self.rows(rank)
        return hidden[rows.to(hidden.device), self.places[rows].to(hidden.device)].unsqueeze(1)

    def put(self, pieces: dict[int, Tensor]) -> Tensor:
        """What `take` took on each rank, in the order of the batch: [B, 1, D]."""
        order = torch.cat([self.rows(rank) for rank in pieces])
        joined = torch.cat(list(pieces.values()))
        return joined[order.argsort().to(joined.device)]

"""Which rows of a generation by Hugging Face's words have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoding import Choose


class Stopping:
    """The rows that have ended, by a criterion or an end token; on the rank that decodes.

    As in transformers a row that a criterion has ended once stays so, whatever the criterion says
    later, and is filled up with padding where end tokens are known.

    Args:
        criteria: (ids [B, t], None) -> bool [B], or one for all rows.
        ends: tokens that end a row.
        pad: stands behind the end of a row; None: the first of `ends`.
    """

    def __init__(
        self, criteria: Sequence[Callable[..., Any]], ends: Sequence[int], pad: int | None
    ) -> None:
        self._criteria, self._ends = list(criteria), list(ends)
        self._fill = None if not self._ends else self._ends[0] if pad is None else pad
        self._ended = torch.zeros((), dtype=torch.bool, device="cpu")

    def filling(self, choose: Choose | None) -> Choose:
        """`choose`, or the likeliest token, but padding in rows that have ended."""

        def filled(ids: Tensor, logits: Tensor) -> Tensor:
            token = logits.argmax(-1) if choose is None else choose(ids, logits)
            if self._fill is None or not bool(self._ended.any()):
                return token
            return token.reshape(len(ids)).masked_fill(self._ended.to(token.device), self._fill)

        return filled

    def stop(self, ids: Tensor) -> bool:
        """Whether every row has ended, the last column of `ids` [B, t] included."""
        ended = self._ended.expand(len(ids))
        for criterion in self._criteria:
            ended = ended | torch.as_tensor(criterion(ids, None)).cpu()
        last = ids[:, -1].cpu()
        ends = torch.tensor(self._ends, dtype=last.dtype, device="cpu")
        self._ended = ended | torch.isin(last, ends)
        return bool(self._ended.all())

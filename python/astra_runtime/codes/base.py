"""The interface of a codec: what crosses the network in place of a shard's tokens.

A codec turns this rank's keys and values (or block inputs) into payload bytes, turns the payloads
of other ranks into what this rank keeps of their tokens, and attends to that. `layer.py` calls it
once a block; everything here is on the hot path and allocates only what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..plan import Plan
from .rotary import Rope


@dataclass(frozen=True)
class Payload:
    """The bytes of one rank's shard.

    Attributes:
        tokens: how many they stand for.
        num_received: how many of them, from the first on, are of use here.
        came: which tokens' bytes are there, bool [B, tokens]; the others' are zeros. None: all.
    """

    view: memoryview
    tokens: int
    num_received: int
    came: Tensor | None = None


@dataclass(frozen=True)
class Strip:
    """Where a payload has something of each token of sequence `row`: `bits` of the first token from
    byte `start` on, then as many of the next."""

    start: int
    bits: int
    row: int


def arrived(
    strips: Sequence[Strip], batch: int, tokens: int, gaps: Sequence[tuple[int, int]]
) -> Tensor:
    """Which tokens of a payload are whole, bool [batch, tokens]: all of whose bits lie outside of
    the missing byte ranges [start, stop)."""
    whole = torch.ones(batch, tokens, dtype=torch.bool)
    holes = [(start, stop) for start, stop in gaps if start < stop]
    for strip in strips:
        for start, stop in holes:
            first = 8 * (start - strip.start) // strip.bits
            last = -(8 * (strip.start - stop) // strip.bits)  # the first one behind it
            whole[strip.row, max(first, 0) : max(last, 0)] = False
    return whole


def seen(payloads: Sequence[Payload], batch: int, visible: Tensor | None) -> Tensor | None:
    """Which tokens heard of attention may see, bool [batch, N]: those that came and that are
    `visible`, no padding. None: all."""
    if all(payload.came is None for payload in payloads):
        return visible
    parts = [
        torch.ones(batch, p.num_received, dtype=torch.bool)
        if p.came is None
        else p.came[:, : p.num_received]
        for p in payloads
    ]
    came = torch.cat(parts, 1)
    return came if visible is None else came.to(visible.device) & visible


class Space(ABC):
    """One choice of what to send.

    Attributes:
        early: what is sent is known from the block's input, before its projections.
    """

    early: ClassVar[bool] = False

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> Space:
        """The space of one forward pass of `rank`: another one where blocks build on each other."""
        return self

    @abstractmethod
    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        """Bytes of a shard of `tokens` tokens; nothing is sent or awaited where there are none."""

    @abstractmethod
    def strips(self, block: int, batch: int, tokens: int) -> list[Strip]:
        """Where each token's bits lie in the payload of `tokens` tokens."""

    @abstractmethod
    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        """Writes the payload of this rank's shard into `out`.

        `what` is the block input [B, T, D] where `early`, else the keys and values of the shard,
        [B, Hkv, T, d] each, the keys rotated by `rope`.
        """

    @abstractmethod
    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> Any:
        """What this rank keeps of the remote tokens, in the order of `payloads`; None: nothing."""

    @abstractmethod
    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of `query` [B, H, M, d] over the kept tokens: (out, lse).

        `rope` and `mask` (bool [B, N]) belong to the remote tokens.
        """

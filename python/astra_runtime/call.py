"""The state of one call: what a rank knows while a pass of the model runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .codes.base import Space
from .codes.rotary import Rope
from .last_tokens import LastTokens
from .missing import Missing
from .plan import Plan
from .transport import Frame, Mesh


@dataclass
class Call:
    """One forward pass of one rank (and the decoding steps after it).

    Attributes:
        tag: names plan and inputs in every frame.
        local_rope, remote_rope: rotary cos and sin of the tokens sent and of those heard of.
        local_mask, remote_mask: bool [B, L] and [B, N], False at padding; None: no padding.
        answer: what the head reads: "last" (last or class token), "all" or "local" tokens.
        last_tokens: where each row's last token is; None: in the last column of every row.
        pooled: the head picks one token of a row itself, and is given that token at every place.
        everywhere: every rank gets the answer, not the owner alone.
        keeps: decoding follows here, from `kept`: what this rank knows of the remote tokens.
        frames: buffers that blocks' codes are packed into, by size.
        deadline: seconds that a block's exchange may take; None: as long as the mesh waits.
        patience: seconds to wait for the answer; None: as long as the mesh waits.
        missing: who was left out, where that is allowed; None: everybody is needed.
    """

    rank: int
    plan: Plan
    space: Space
    mesh: Mesh
    batch: int
    tag: int
    local_rope: Rope = None
    remote_rope: Rope = None
    local_mask: Tensor | None = None
    remote_mask: Tensor | None = None
    answer: str = "last"
    last_tokens: LastTokens | None = None
    pooled: bool = False
    everywhere: bool = True
    keeps: bool = False
    decoding: bool = False
    kept: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)
    frames: dict[int, Frame] = field(default_factory=dict)
    deadline: float | None = None
    patience: float | None = None
    missing: Missing | None = None

    @property
    def sent_slice(self) -> slice:
        """Which of the tokens computed here are sent: not the copies, not the halo."""
        lead = self.plan.num_leading(self.rank)
        return slice(lead, lead + self.plan.num_sent(self.rank))

    @property
    def needed(self) -> set[int]:
        """The ranks without which there is no answer, this one aside: they are never left out."""
        if self.answer == "local":
            return set()
        if self.answer == "all":
            return set(range(self.plan.world_size)) - {self.rank}
        if self.last_tokens is not None:
            return self.last_tokens.senders - {self.rank}
        return {self.plan.owner} - {self.rank}

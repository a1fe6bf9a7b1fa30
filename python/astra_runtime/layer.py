"""ASTRA in one file: a Transformer block on one of N ranks.

Each rank holds the whole model and a slice of the tokens. In every block it sends its own tokens as
codes of a few bits, attends to them in full precision while the bits are in flight, attends to the
other ranks' tokens straight from the codes it received, and merges the two (Mixed-Precision
Attention, arXiv 2505.19342): one softmax over local and remote tokens,

    softmax(q·[K_local, K̂_remote]ᵀ/√d)·[V_local, V̂_remote].

The model itself is unmodified: it calls `before_block`, `attend` and `finish` through the hooks of
`models/base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .gather import gather
from .missing import Missing, receive_codes
from .plan import Plan
from .spaces import Payload, Rope, Space, seen
from .trace import stage
from .transport import Frame, Mesh

NOTHING = (None, None)  # nothing is known of remote tokens


@dataclass
class Call:
    """One forward pass of one rank (and the decoding steps after it).

    Attributes:
        tag: names plan and inputs in every frame.
        local_rope, remote_rope: rotary cos and sin of the tokens sent and of those heard of.
        local_mask, remote_mask: bool [B, L] and [B, N], False at padding; None: no padding.
        answer: what the head reads: "last" (last or class token), "all" or "local" tokens.
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
    everywhere: bool = True
    keeps: bool = False
    decoding: bool = False
    kept: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)
    frames: dict[int, Frame] = field(default_factory=dict)
    deadline: float | None = None
    patience: float | None = None
    missing: Missing | None = None

    @property
    def told(self) -> slice:
        """Which of the tokens computed here are sent: not the copies, not the halo."""
        lead = self.plan.lead(self.rank)
        return slice(lead, lead + self.plan.told(self.rank))

    def embedded(self, hidden: Tensor) -> Tensor:
        """The class token's copy and this rank's shard of all embeddings."""
        return self.plan.local(hidden, self.rank)

    def before_block(self, block: int, hidden: Tensor) -> None:
        """Hidden-state codes leave before the block computes anything."""
        if self.space.early and not self.decoding:
            self.say(block, hidden[:, self.told])

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Mixed-precision attention: [B, H, M, d] over local [B, Hkv, L, d] and remote tokens."""
        if not self.space.early and not self.decoding:
            self.say(block, (key[:, :, self.told], value[:, :, self.told]))
        mask, causal = self.local_mask, self.plan.causal and not self.decoding
        with stage("attend", block):
            out, lse = ak.attention(query, key, value, is_causal=causal, key_mask=mask, scale=scale)
        remote, mask = self.kept.get(block, NOTHING) if self.decoding else self.hear(block)
        if remote is not None:
            rope, mask = self.remote_rope, None if mask is None else mask.to(query.device)
            first = self.plan.copies if causal else 0  # a decoder's first tokens see no others
            query, near, lse = query[:, :, first:], out[:, :, first:], lse[:, :, first:]
            with stage("attend", block):
                far, far_lse = self.space.attend(block, query, remote, rope, mask, scale)
            with stage("merge", block):
                both, _ = ak.merge_state(near, lse, far, far_lse)
                out = torch.cat([out[:, :, :first], both], 2) if first else both
        return out

    def say(self, block: int, what: Any) -> None:
        """Codes of this rank's shard, packed into one frame for each rank that may see it."""
        receivers = self.plan.receivers(self.rank)
        size = self.space.payload_bytes(block, self.batch, self.plan.told(self.rank))
        if receivers and size:
            total = size + (self.missing.width if self.missing else 0)
            frame = self.frames.get(total) or self.frames.setdefault(total, self.mesh.buffer(total))
            with stage("encode", block):
                self.space.encode(block, what, self.local_rope, frame.payload[:size])
            if self.missing:
                self.missing.tell(frame.payload[size:])
            partial = self.missing is not None
            with stage("send", block):
                self.mesh.send(frame, block=block, plan=self.tag, to=receivers, partial=partial)

    def hear(self, block: int) -> tuple[Any, Tensor | None]:
        """This block's codes of every rank whose shard is visible here, and which of their tokens
        attention may see: bool [B, N], None for all. Without any codes: `NOTHING`."""
        sources = self.plan.sources(self.rank)
        if not sources:
            return NOTHING
        told = {n: self.plan.told(n) for n in sources}
        sizes = {n: self.space.payload_bytes(block, self.batch, told[n]) for n in sources}
        views = dict.fromkeys(sources, memoryview(b""))  # what nobody sends, nobody awaits
        came: dict[int, Tensor] = {}
        if any(sizes.values()):
            with stage("wait", block):
                views, came = receive_codes(self, block, sizes)
        payloads = [
            Payload(views[n], told[n], self.plan.heard(self.rank, n), came.get(n)) for n in sources
        ]
        with stage("unpack", block):
            remote = self.space.decode(block, payloads, self.batch, self.remote_rope)
        mask = seen(payloads, self.batch, self.remote_mask)
        heard = remote, mask
        if came and mask is not None and not bool(mask.any()):
            heard = NOTHING  # nobody's codes came
        if self.keeps:
            self.kept[block] = heard
        return heard

    @property
    def needed(self) -> set[int]:
        """The ranks without which there is no answer, this one aside: they are never left out."""
        if self.answer == "local":
            return set()
        whole = self.answer == "all"
        return set(range(self.plan.world_size) if whole else [self.plan.owner]) - {self.rank}

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head needs of the final hidden states, from whichever ranks hold it."""
        return hidden if self.decoding else gather(self, self.plan.own(hidden, self.rank))

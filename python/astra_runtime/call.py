"""The state of one call: what a rank knows while a pass of the model runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from .codes.base import Bytes, Codec
from .codes.verify import Verifier
from .errors import CallEnded, ends_the_call_alone
from .inputs import Views
from .last_tokens import LastTokens
from .missing import Missing
from .plan import Plan
from .transport import Frame, Mesh


@dataclass(frozen=True)
class Sizes:
    """How much a plan has one rank send and receive, derived once for all calls of one shape.

    Attributes:
        sources, receivers: the ranks whose codes this rank receives, and those it sends to.
        num_sent: by sending rank, the tokens of a payload.
        num_received: by source, how many of them are of use here, from the first on.
        payload: of each block, by sending rank, bytes of a payload; 0: nothing is sent.
        num_fine: by sending rank, the tokens of its payload that the next rank has fine codes of.
        fine: of each block, by sending rank, bytes of those.
        num_receivers: by sending rank, how many ranks its payload goes to.
        sent_slice: which of the tokens computed here are sent: not the replicated ones, no halo.
    """

    sources: tuple[int, ...]
    receivers: tuple[int, ...]
    num_sent: Mapping[int, int]
    num_received: Mapping[int, int]
    payload: tuple[Mapping[int, int], ...]
    num_fine: Mapping[int, int]
    fine: tuple[Mapping[int, int], ...]
    num_receivers: Mapping[int, int]
    sent_slice: slice

    @classmethod
    def of(cls, codec: Codec, blocks: int, rank: int, plan: Plan, batch: int) -> Sizes:
        sources, leading = plan.sources(rank), plan.num_leading(rank)
        senders = [n for n in range(plan.world_size) if plan.receivers(n)]
        num_sent = {n: plan.num_sent(n) for n in senders}
        payload = tuple(
            {n: codec.payload_bytes(block, batch, num_sent[n]) for n in senders}
            for block in range(blocks)
        )
        last = {n: plan.fine_tokens(n, codec.fine_tokens) for n in senders}
        num_fine = {n: tokens.stop - tokens.start for n, tokens in last.items()}
        fine = tuple(
            {
                n: codec.fine_bytes(block, batch, count) if coarse[n] else 0
                for n, count in num_fine.items()
            }
            for block, coarse in enumerate(payload)
        )
        return cls(
            sources,
            plan.receivers(rank),
            num_sent,
            {n: plan.num_received(rank, n) for n in sources},
            payload,
            num_fine,
            fine,
            {n: len(plan.receivers(n)) for n in senders},
            slice(leading, leading + plan.num_sent(rank)),
        )

    def bits_per_token_block(self, batch: int, trailer: int = 0) -> float:
        """Payload bits made for remote use, over the tokens they stand for and the blocks.

        Each payload counts once, fine codes too. `trailer`: bytes behind each payload.
        """
        tokens = sum(self.num_sent.values()) * batch
        if not tokens:
            return 0.0
        size = sum(size + trailer for sizes in self.payload for size in sizes.values() if size)
        size += sum(sum(sizes.values()) for sizes in self.fine)
        return 8 * size / (tokens * len(self.payload))

    def bits_per_receiver(self, batch: int) -> float:
        """Payload bits that one receiver gets of a token and block, on average over all pairs of a
        sender and a receiver."""
        times = self.num_receivers
        tokens = sum(count * times[n] for n, count in self.num_sent.items()) * batch
        size = sum(size * times[n] for sizes in self.payload for n, size in sizes.items())
        size += sum(sum(sizes.values()) for sizes in self.fine)
        return 8 * size / (tokens * len(self.payload)) if tokens else 0.0


@dataclass
class CallState:
    """What changes while a call runs.

    Attributes:
        number: of the call, among those of its mesh.
        decoding: the prefill is over; tokens follow one by one.
        remote: by block, what this rank keeps of the remote tokens, and which attention may see.
        frames: buffers that blocks' codes are packed into, by size.
        local: by block, keys and values [B, Hkv, L, d] of the tokens computed here, where
            `keeps_local`.
        codes: by rank and block, payloads where `keeps_codes`, without fine codes.
        compared: the other ranks' pictures have been compared with this rank's.
        ended: why the call has to end at its next block; set by another thread or a handler.
    """

    number: int = 0
    decoding: bool = False
    remote: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)
    frames: dict[int, Frame] = field(default_factory=dict)
    local: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    codes: dict[int, dict[int, bytes]] = field(default_factory=dict)
    compared: bool = False
    ended: str | None = None


class Endable:
    """What runs over a mesh until it is done, or until somebody ends it."""

    mesh: Mesh
    state: CallState

    def end(self, reason: str) -> None:
        """Has this call end at its next block, and a wait that it is in at once; from any thread or
        signal handler."""
        self.state.ended = reason
        self.mesh.interrupt(reason, self.state.number)

    def check_running(self) -> None:
        """Raises CallEnded where somebody has asked this call to end."""
        if self.state.ended is not None:
            raise CallEnded(self.mesh.device_rank, self.state.ended)


@dataclass(frozen=True)
class Call(Endable):
    """One forward pass of one rank (and the decoding steps after it).

    Attributes:
        tag: names plan and inputs in every frame.
        views: this rank's parts of positions, masks and picture.
        answer: what the head reads: "last" (last or class token), "all" or "local" tokens.
        last_tokens: where each row's last token is; None: in the last column of every row.
        pooled: the head picks one token of a row itself, and is given that token at every place.
        everywhere: every rank gets the answer, not the owner alone.
        keeps: decoding follows here, from `state.remote`.
        keeps_local: the local keys and values are kept too, in `state.local`.
        keeps_codes: all payloads are, in `state.codes`, and so have to come to the host.
        between: called before each block of the prefill, with its number.
        deadline: seconds that a block's exchange may take; None: as long as the mesh waits.
        patience: seconds to wait for the answer; None: as long as the mesh waits.
        missing: who was left out, where that is allowed; None: everybody is needed.
        verifier: where this call has to verify that blocks compute what other ranks compute from
            their codes.
    """

    rank: int
    plan: Plan
    codec: Codec
    sizes: Sizes
    mesh: Mesh
    batch: int
    tag: int
    views: Views
    answer: str = "last"
    last_tokens: LastTokens | None = None
    pooled: bool = False
    everywhere: bool = True
    keeps: bool = False
    keeps_local: bool = False
    keeps_codes: bool = False
    between: Callable[[int], None] | None = None
    deadline: float | None = None
    patience: float | None = None
    missing: Missing | None = None
    verifier: Verifier | None = None
    state: CallState = field(default_factory=CallState)

    @cached_property
    def needed(self) -> frozenset[int]:
        """The ranks without which there is no answer, this one aside: they are never left out."""
        if self.answer == "local":
            return frozenset()
        if self.answer == "all":
            return frozenset(range(self.plan.world_size)) - {self.rank}
        owners = {self.plan.owner} if self.last_tokens is None else self.last_tokens.senders
        return frozenset(owners) - {self.rank}

    @cached_property
    def on_device(self) -> bool:
        """Whether this rank's codes and the others' can stay on the model's device."""
        device = self.mesh.device
        if device is None or self.missing is not None or self.keeps_codes:
            return False
        return device == self.codec.payload_device

    def keep_codes(self, source: int, block: int, payload: Bytes) -> None:
        """Takes down the codes of a rank's shard, where they are kept."""
        if self.keeps_codes:
            self.state.codes.setdefault(source, {})[block] = bytes(payload)

    @property
    def has_answer(self) -> bool:
        return self.everywhere or self.answer == "local" or self.rank == self.plan.owner


@contextlib.contextmanager
def ending_after(milliseconds: float, call: Endable) -> Iterator[None]:
    """Ends `call` when so much time has passed."""
    reason = f"it took longer than {milliseconds:g} ms"
    timer = threading.Timer(milliseconds / 1000, call.end, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def ending_together(mesh: Mesh) -> Iterator[None]:
    """An error on this rank ends the call, or the mesh, on every rank, with one cause."""
    try:
        yield
    except BaseException as error:
        if ends_the_call_alone(error):
            mesh.cancel(error)
        else:
            mesh.abort(error)
        raise

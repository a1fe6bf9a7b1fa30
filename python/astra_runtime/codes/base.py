"""The interface of a codec: what crosses the network in place of a shard's tokens.

A codec turns this rank's keys and values (or block inputs) into payload bytes, turns the payloads
of other ranks into what this rank keeps of their tokens, and attends to that. `layer.py` calls it
once a block; what does so is on the hot path and allocates only what it returns. The class itself
knows what a codebook of its kind sends, costs and looks like in a simulation, so that nobody else
compares codecs by name: whoever has a codebook asks `codebook.codec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models import Adapter
from ..plan import Plan
from .fields import CodebookFields
from .rotary import Rope
from .simulated import Quantize, SimulatedCodec

# Of a payload: on the host, or uint8 on a device.
Bytes = memoryview | Tensor
# Waits until a payload is where it was to be written.
Pending = Callable[[], None]


def as_tensor(data: Bytes) -> Tensor:
    """The bytes as uint8, in the same memory."""
    return data if isinstance(data, Tensor) else torch.frombuffer(data, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Payload:
    """The bytes of one rank's shard.

    Attributes:
        tokens: how many they stand for.
        num_received: how many of them, from the first on, are of use here.
        received: which tokens' bytes are there, bool [B, tokens]; the others' are zeros. None: all.
        fine: the fine codes of the last `num_fine` tokens of use here, or nothing.
        fine_received: which of those are there, bool [B, num_fine]. None: all.
    """

    view: Bytes
    tokens: int
    num_received: int
    received: Tensor | None = None
    fine: Bytes | None = None
    num_fine: int = 0
    fine_received: Tensor | None = None


@dataclass(frozen=True)
class TokenBits:
    """Where a payload has something of each token of sequence `row`: `bits` of the first token from
    byte `start` on, then as many of the next."""

    start: int
    bits: int
    row: int


def received_mask(
    layout: Sequence[TokenBits], batch: int, tokens: int, missing: Sequence[tuple[int, int]]
) -> Tensor:
    """Which tokens of a payload are whole, bool [batch, tokens]: all of whose bits lie outside of
    the missing byte ranges [start, stop)."""
    whole = torch.ones(batch, tokens, dtype=torch.bool, device="cpu")
    ranges = [(start, stop) for start, stop in missing if start < stop]
    for place in layout:
        for start, stop in ranges:
            first = 8 * (start - place.start) // place.bits
            last = (8 * (stop - place.start) - 1) // place.bits
            whole[place.row, max(first, 0) : max(last + 1, 0)] = False
    return whole


def visible_tokens(
    payloads: Sequence[Payload], batch: int, visible: Tensor | None
) -> Tensor | None:
    """Which received tokens attention may see, bool [batch, N]: those that arrived and that are
    `visible`, no padding. None: all."""
    if all(payload.received is None for payload in payloads):
        return visible
    parts = [
        torch.ones(batch, p.num_received, dtype=torch.bool, device="cpu")
        if p.received is None
        else p.received[:, : p.num_received]
        for p in payloads
    ]
    received = torch.cat(parts, 1)
    return received if visible is None else received.to(visible.device) & visible


@dataclass(frozen=True)
class CodeCosts:
    """What a codec adds to a block's FLOPs, on average over the blocks.

    Attributes:
        code: of coding one own token, on a rank that others receive from.
        receive: of one remote token received, before attention reads it.
        attended: remote tokens are attended to.
        fine_code, fine_receive: of the fine codes of one token right before a cut.
        sums: additions for one remote token received, of table rows. They wait for memory, so they
            take longer than FLOPs that are products.
        fine_sums: the same for a token with fine codes, of its sender.
    """

    code: float = 0.0
    receive: float = 0.0
    attended: bool = True
    fine_code: float = 0.0
    fine_receive: float = 0.0
    sums: float = 0.0
    fine_sums: float = 0.0


GEOMETRY = ("num_blocks", "num_heads", "num_key_value_heads", "head_dim", "hidden_size")


def geometry(adapter: Adapter) -> dict[str, int]:
    """The sizes of a model that a codebook depends on."""
    return {
        "num_blocks": len(adapter.blocks),
        "num_heads": adapter.num_heads,
        "num_key_value_heads": adapter.num_key_value_heads,
        "head_dim": adapter.head_dim,
        "hidden_size": adapter.hidden_size,
    }


class Codec(ABC):
    """One choice of what to send.

    Attributes:
        key: its name, the field `space` of `astra_config.json`.
        coded: it sends codes of codewords that a fit found for the model.
        sends: it sends something.
        early: what is sent is known from the block's input, before its projections. Calibration
            records block inputs where `early`, else keys and values.
        accumulates: blocks build on each other, so that codes that did not come are missed in later
            blocks, too.
        predicts: where a block's codes did not come, `decode` gives a prediction in their place,
            which attention takes for them.
        needs_token_ids: of the model, so that every rank embeds the tokens of all.
        can_share_heads: one set of codes may stand for all KV heads.
        allots_bits: a fit is given a budget of bits, and finds the groups of each block itself.
        gains_by_variety: calibration text of several kinds serves it well.
        keeps_sessions: tokens are coded from their keys and values, and read again from codes, at
            any time; `tensors` works.
        fine_tokens: how many tokens before a cut have fine codes, for the next rank alone.
        tabled: its tables were made from the model's projections when it was created.
        payload_device: where it can write and read payloads as tensors; None: on the host alone.
    """

    key: ClassVar[str]
    coded: ClassVar[bool] = True
    sends: ClassVar[bool] = True
    early: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    needs_token_ids: ClassVar[bool] = False
    can_share_heads: ClassVar[bool] = False
    allots_bits: ClassVar[bool] = False
    gains_by_variety: ClassVar[bool] = False
    keeps_sessions: ClassVar[bool] = False
    fine_tokens: int = 0
    tabled: bool = False
    payload_device: torch.device | None = None

    # What is known of a codebook without a device. `sizes` are those of `geometry`.

    @classmethod
    @abstractmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        """Bits of a token in one block."""

    @classmethod
    def mean_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int]) -> float:
        """Bits of a token and block, on average over the blocks."""
        return cls.token_bits(codebook, sizes, 0)  # where blocks are alike

    @classmethod
    def coded_width(cls, sizes: Mapping[str, int]) -> int:
        """How many numbers of a token and block the payload stands for."""
        return sizes["hidden_size"] if cls.early else key_value_width(sizes)

    @classmethod
    @abstractmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        """What it adds to the model's own work."""

    @classmethod
    def rounds(cls, codebook: CodebookFields) -> bool:
        """Whether so much is left out of most blocks' reconstructions that attention may round them
        to bf16, where products are quicker so."""
        return False

    @classmethod
    @abstractmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        """Its part of one pass of `train.simulate`; see `SimulatedCodec`."""

    # What a fit and a training ask.

    @classmethod
    def check_model(cls, adapter: Adapter) -> None:
        """Refuses a model that cannot be coded so, with a ValueError."""
        if cls.needs_token_ids and not adapter.token_ids:
            raise ValueError(
                f"space: {cls.key} codes need token ids, from which every rank embeds the others' "
                f"tokens; a model of type {adapter.model.config.model_type!r} has none: "
                "use 'kv' or 'hidden'"
            )

    @classmethod
    def trainable(cls, codebook: CodebookFields) -> bool:
        """Whether a model can be adapted to the codebook: gradients pass what it sends."""
        return True

    @classmethod
    def default_prefix(cls, adapter: Adapter) -> int:
        """Leading tokens of a decoder that every rank computes itself, where nobody says."""
        return 0

    @classmethod
    def shares_heads(cls, groups: int, sizes: Mapping[str, int]) -> bool:
        """Whether so many groups code all heads together, where nobody says."""
        return False

    @classmethod
    def possible_groups(cls, shared: bool, sizes: Mapping[str, int]) -> list[int]:
        """The numbers of groups that the model's channels can be split into."""
        return [g for g in range(1, 257) if sizes["hidden_size"] % g == 0]

    @classmethod
    def check_groups(cls, groups: int, shared: bool, sizes: Mapping[str, int]) -> None:
        """Refuses a number of groups that the model's channels cannot be split into."""
        possible = cls.possible_groups(shared, sizes)
        if groups not in possible:
            raise ValueError(
                f"groups: expected one of {', '.join(map(str, possible))} for space {cls.key!r}"
                f"{' with shared codes' if shared else ''} and this model, got {groups}"
            )

    # What a rank of a call does.

    # Whether parts of what was encoded last are finite, bools on the device, where encoding looked
    # at all of it anyway.
    finite: Tensor | None = None

    @classmethod
    def create(cls, codebook: CodebookFields, adapter: Adapter) -> Codec:
        """The codec of `codebook`, with its tables on the model's device and dtype."""
        return cls(codebook, adapter)  # type: ignore[call-arg]

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> Codec:
        """The codec of one forward pass of `rank`: another one where blocks build on each other."""
        return self

    def check_input(self, block: int, hidden: Tensor) -> None:  # noqa: B027
        """Raises ModelChanged where the input [B, T, D] of a block, of the tokens that are sent, is
        not what other ranks take it for without having received anything."""

    @abstractmethod
    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        """Bytes of a shard of `tokens` tokens; nothing is sent or awaited where there are none."""

    @abstractmethod
    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        """Where each token's bits lie in the payload of `tokens` tokens."""

    def fine_bytes(self, block: int, batch: int, tokens: int) -> int:
        """Bytes of the fine codes of `tokens` tokens, behind the payload for the next rank."""
        return 0

    def fine_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        """Where each token's bits lie in the fine codes of `tokens` tokens."""
        return []

    def codes_are_right(self, block: int, payload: Payload, batch: int) -> Tensor | None:
        """Whether a payload on the device is as any rank packs it: a bool tensor there, which the
        host reads later. None: whatever its bytes are, they are right."""
        return None

    @abstractmethod
    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> Pending | None:
        """Writes the payload of this rank's shard into `out`, and fine codes, if any, behind it.

        On a GPU this only begins: what is returned waits until the bytes are there, and is called
        before the next block is encoded. None: they are there, or they will be for whoever reads
        `out`, a tensor on the device, in the same stream.

        `what` is the block input [B, T, D] where `early`, else the keys and values of the shard,
        [B, Hkv, T, d] each, the keys rotated by `rope`.
        """

    def pass_over(self, block: int, what: Any, rope: Rope) -> None:  # noqa: B027
        """Called in place of `encode`, with the same, where this rank's shard has no payload in a
        block, and has one in others."""

    @abstractmethod
    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> Any:
        """What this rank keeps of the remote tokens, in the order of `payloads`; None: nothing."""

    @abstractmethod
    def attend(
        self, block: int, query: Tensor, remote: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of `query` [B, H, M, d] over the remote tokens that `decode` kept: (out, lse).

        `rope` and `mask` (bool [B, N]) belong to the remote tokens.
        """

    def tensors(self, block: int, remote: Any, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values [B, Hkv, N, d] of what `decode` has kept."""
        raise NotImplementedError(f"{self.key} keeps no sessions")


def key_value_width(sizes: Mapping[str, int]) -> int:
    """Numbers of a token's keys and values in a block: 2·Hkv·d."""
    return 2 * sizes["num_key_value_heads"] * sizes["head_dim"]


def projection_flops(adapter: Adapter) -> float:
    """FLOPs of a token's keys and values from its block input."""
    return 2.0 * adapter.hidden_size * key_value_width(geometry(adapter))

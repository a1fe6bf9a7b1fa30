"""What codecs of packed codes have in common: the nearest codewords of vectors, as bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _direct as direct

from .. import wire
from ..models import Adapter
from ..trace import stage
from .base import Bytes, Codec, Payload, Pending, TokenBits, as_tensor, visible_tokens
from .fields import CodebookFields
from .rotary import Rope
from .search import Search, search_macs
from .staging import ReceivedCodes, Staging, packed_right, stays_packed


class PackedCodes(Codec):
    """`groups` codes a token and block, packed; rows of a batch are byte-aligned."""

    tables: Sequence[Tensor]  # [C, K, w] a block
    searches: Sequence[Search]
    # in which the device of a 16-bit model searches
    half_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        self.groups, self.bits = codebook.groups, codebook.code_bits
        self.codewords, self.device = codebook.codewords, adapter.device
        # None: codes are packed and unpacked on the host
        self.staging = Staging(self.device) if stays_packed(self.device) else None
        self.payload_device = None if self.staging is None else self.device
        tables = codebook.block_tables
        self.tables = [table.to(adapter.device, torch.float32) for table in tables]
        half = self.staging is not None and adapter.dtype.itemsize == 2
        self.vector_dtype = self.half_dtype if half else torch.float32
        self.searches = [Search(table, dtype=self.vector_dtype) for table in self.tables]
        self.rough = codebook.rough_blocks

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return codebook.groups * codebook.code_bits

    @classmethod
    def rounds(cls, codebook: CodebookFields) -> bool:
        return 2 * sum(codebook.rough_blocks) > len(codebook.rough_blocks)

    @classmethod
    def training_vectors(
        cls, recorded: Sequence[Any], groups: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors fp32 [n, C, w] that are coded of one block, and the scales [Hkv, 2] that
        they were multiplied with, if any.

        `recorded` has a block's input [1, T, D], or its keys (not rotated) and values
        [1, Hkv, T, d], of each calibration window.
        """
        inputs = torch.cat([hidden.flatten(0, 1) for hidden in recorded])
        return inputs.unflatten(-1, (groups, -1)), None

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return batch * ak.packed_size(tokens * len(self.tables[block]), self.bits)

    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        groups = len(self.tables[block])
        row = ak.packed_size(tokens * groups, self.bits)
        return [TokenBits(b * row, groups * self.bits, b) for b in range(batch)]

    def write(self, block: int, vectors: Tensor, out: Bytes) -> tuple[Tensor, Pending | None]:
        """Writes the nearest codewords of vectors [B, T, C, w] into `out`, packed.

        Returns the codes, and what waits for the bytes, see `Codec.encode`.
        """
        codes = self.searches[block](vectors)
        with stage("pack", block):
            if self.staging is not None and not isinstance(out, Tensor):
                return codes, self.staging.download(packed_rows(codes, self.bits), out)
            pack_rows(codes, self.bits, out)
        return codes, None

    def write_only(self, block: int, vectors: Tensor, out: Bytes) -> Pending | None:
        """`write` where the sender has no use for its codes: found and packed in one."""
        if self.staging is None:
            return self.write(block, vectors, out)[1]
        packed = self.searches[block].packed(vectors, self.bits)
        with stage("pack", block):
            if not isinstance(out, Tensor):
                return self.staging.download(packed, out)
            out.copy_(packed.view(-1))
        return None

    def read_codewords(
        self, block: int, payloads: Sequence[Payload], batch: int
    ) -> tuple[Tensor, Tensor]:
        """The codes of payloads, [B, N, C], and their codewords, [B, N, C, w]; -1 and zeros where a
        token's codes did not come."""
        codes = self.read(block, payloads, batch)
        codewords = direct.decode(codes, self.tables[block])
        received = visible_tokens(payloads, batch, None)
        if received is None:
            return codes, codewords
        here = received[:, :, None].to(codes.device)
        return codes.masked_fill(~here, -1), codewords * here[..., None]

    def read(self, block: int, payloads: Sequence[Payload], batch: int) -> Tensor:
        """Unpacks and joins payloads: codes [B, N, C]. WireError: not as any rank packs them."""
        if self.staging is not None:
            return self.receive(block, payloads, batch).unpacked()
        groups = len(self.tables[block])
        total = groups * sum(payload.num_received for payload in payloads)
        # room behind each row for the codes of a payload's other tokens, which the next payload's
        # are then written over
        room = groups * max((p.tokens - p.num_received for p in payloads), default=0)
        codes = torch.empty(batch, total + room, dtype=torch.int32, device="cpu")
        for b in range(batch):
            address = codes.data_ptr() + codes.itemsize * b * (total + room)
            for payload in payloads:
                size, count = len(payload.view) // batch, payload.tokens * groups
                part: Any = payload.view[b * size : (b + 1) * size]  # on the host
                wire.read_codes(part, self.bits, self.codewords, (address, count), count)
                address += codes.itemsize * payload.num_received * groups
        return codes[:, :total].view(batch, total // groups, groups).to(self.device)

    def receive(self, block: int, payloads: Sequence[Payload], batch: int) -> ReceivedCodes:
        """Checks payloads and brings them to the device as they are. Those that are there already
        are joined; `codes_are_right` checks them."""
        assert self.staging is not None
        groups = len(self.tables[block])
        rows: list[list[Any]] = [[] for _ in range(batch)]
        for payload in payloads:
            size = len(payload.view) // batch
            for b, row in enumerate(rows):
                part = payload.view[b * size : (b + 1) * size]
                if not isinstance(part, Tensor):
                    wire.check_codes(part, self.bits, self.codewords, payload.tokens * groups)
                row.append(part[: ak.packed_size(payload.num_received * groups, self.bits)])
        counts = tuple(payload.num_received for payload in payloads)
        if any(isinstance(payload.view, Tensor) for payload in payloads):
            data = torch.stack([torch.cat(row) for row in rows])
        else:
            data = self.staging.upload(rows)
        return ReceivedCodes(data, counts, groups, self.bits)

    def codes_are_right(self, block: int, payload: Payload, batch: int) -> Tensor | None:
        rows = as_tensor(payload.view).view(batch, -1)
        count = payload.tokens * len(self.tables[block])
        return packed_right(rows, count, self.bits, self.codewords)


def unpack_rows(view: Bytes, shape: tuple[int, int, int], bits: int, codewords: int) -> Tensor:
    """Codes int32 [B, T, C] of `shape`, whose rows are byte-aligned in `view`, where that is.

    WireError: not as any rank packs them; on a device `packed_right` says so.
    """
    if isinstance(view, Tensor):
        rows = view.view(shape[0], -1)
        count = shape[1] * shape[2]
        return torch.stack([ak.unpack(row, bits, count).view(shape[1:]) for row in rows])
    codes, row = torch.empty(shape, dtype=torch.int32, device="cpu"), len(view) // shape[0]
    for b, out in enumerate(codes):
        count = out.numel()
        part = view[b * row : (b + 1) * row]
        wire.read_codes(part, bits, codewords, (out.data_ptr(), count), count)
    return codes


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [B, T, C] packed, uint8 [B, bytes]."""
    return torch.stack([ak.pack(row, bits) for row in codes])


def pack_rows(codes: Tensor, bits: int, out: Bytes) -> None:
    """Packs codes [B, T, C] into `out`, rows byte-aligned."""
    if isinstance(out, Tensor):
        out.copy_(packed_rows(codes, bits).view(-1))
        return
    row = len(out) // len(codes)
    for b, codes_of_row in enumerate(codes.cpu()):
        ak.pack(codes_of_row, bits, out=out[b * row : (b + 1) * row])


class TableLookup(PackedCodes):
    """Remote keys and values are table rows, [Hkv, S, K, d/S] a block: no projection."""

    keys: list[Tensor]
    values: list[Tensor]

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> Tensor | ReceivedCodes:
        if self.staging is None:
            return self.read(block, payloads, batch)
        codes = self.receive(block, payloads, batch)
        return codes if codes.joined else codes.unpacked()

    def attend(
        self, block: int, query: Tensor, remote: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        packed = isinstance(remote, ReceivedCodes)
        return direct.coded_attention(
            query,
            remote.data if packed else remote,
            self.keys[block],
            self.values[block],
            scale=scale,
            rope=rope,
            code_mask=mask,
            code_bits=remote.bits if packed else None,
            num_tokens=remote.tokens if packed else None,
            rounded=self.rough[block],
        )


def search_flops(codebook: CodebookFields, width: int) -> float:
    """FLOPs of finding the codewords of a token: G searches of K codewords of width/G channels."""
    groups = codebook.groups
    return 2.0 * groups * search_macs(codebook.codewords, width // groups)

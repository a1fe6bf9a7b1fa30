"""Packed codes of a sequence that grows, is forked and is cut: `bits` bits a code, in pages.

A page holds the codes of `PAGE_TOKENS` tokens and is never written again, so a fork shares all
pages, the unfinished last one too. It knows nothing of models, ranks or codebooks.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

import astra_kernels as ak

PAGE_TOKENS = 64  # a page ends at a byte, whatever a token takes


class CodeStore:
    """Codes of one layer's tokens, `groups` a token.

    Args:
        groups: codes a token, 0 for a layer of which nothing is coded.
        bits: of a code, 1 to 16.
        codewords: above every code; None: all codes of so many bits are valid.

    Example:
        >>> store = CodeStore(groups=2, bits=5)
        >>> store.append(torch.tensor([[1, 2], [3, 4], [5, 6]]))
        >>> fork = store.fork()
        >>> fork.truncate(1)
        >>> len(store), fork.codes().tolist()
        (3, [[1, 2]])
    """

    def __init__(self, groups: int, bits: int, codewords: int | None = None) -> None:
        if groups < 0:
            raise ValueError(f"groups: expected at least 0, got {groups}")
        if not 1 <= bits <= 16:
            raise ValueError(f"bits: expected 1 to 16, got {bits}")
        self.groups, self.bits = groups, bits
        self.codewords = 1 << bits if codewords is None else codewords
        self._pages: list[Tensor] = []  # uint8, packed
        self._tokens = 0

    def __len__(self) -> int:
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, those that forks share included."""
        return sum(page.numel() for page in self._pages)

    def append(self, codes: Tensor) -> None:
        """Adds the codes of further tokens, integers [n, groups] on a CPU.

        Raises:
            ValueError: another shape or dtype, or a code that is not below `codewords`.
        """
        if codes.dim() != 2 or codes.shape[1] != self.groups:
            raise ValueError(f"codes: expected shape [n, {self.groups}], got {list(codes.shape)}")
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes: expected integers, got {codes.dtype}")
        if codes.numel():
            least, most = (int(bound) for bound in torch.aminmax(codes))
            if least < 0 or most >= self.codewords:
                got = least if least < 0 else most
                raise ValueError(f"codes: expected 0 to {self.codewords - 1}, got {got}")
        whole = self._tokens // PAGE_TOKENS
        begun = self.codes(whole * PAGE_TOKENS)
        pages = torch.cat([begun, codes.to(torch.int32)]).split(PAGE_TOKENS)
        packed = [ak.pack(page.contiguous(), self.bits) for page in pages if len(page)]
        self._pages[whole:] = packed
        self._tokens += len(codes)

    def append_packed(self, data: bytes | bytearray | memoryview, tokens: int) -> None:
        """The same for codes that `ak.pack` packed in one piece.

        Raises:
            ValueError: another size, or a code that is not below `codewords`.
        """
        count = tokens * self.groups
        size = ak.packed_size(count, self.bits)
        if len(data) != size:
            raise ValueError(f"data: expected {size} bytes of {tokens} tokens, got {len(data)}")
        if not count:
            self.append(torch.zeros(tokens, self.groups, dtype=torch.int32, device="cpu"))
            return
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.append(ak.unpack(flat, self.bits, count).view(tokens, self.groups))

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int32 [stop − start, groups], the codes of these tokens."""
        stop = self._tokens if stop is None else stop
        if not 0 <= start <= stop <= self._tokens:
            raise ValueError(
                f"start, stop: expected 0 <= start <= stop <= {self._tokens}, got {start}, {stop}"
            )
        first, last = start // PAGE_TOKENS, -(-stop // PAGE_TOKENS)
        parts = [self._unpacked(page) for page in range(first, last)]
        empty = torch.zeros(0, self.groups, dtype=torch.int32, device="cpu")
        joined = torch.cat(parts or [empty])
        return joined[start - first * PAGE_TOKENS : stop - first * PAGE_TOKENS]

    def _unpacked(self, page: int) -> Tensor:
        tokens = min(PAGE_TOKENS, self._tokens - page * PAGE_TOKENS)
        if not self.groups:
            return torch.zeros(tokens, 0, dtype=torch.int32, device="cpu")
        # a page that was cut holds more than is valid
        data = self._pages[page][: ak.packed_size(tokens * self.groups, self.bits)].clone()
        behind = tokens * self.groups * self.bits % 8
        if behind:
            data[-1] &= (1 << behind) - 1
        return ak.unpack(data, self.bits, tokens * self.groups).view(tokens, self.groups)

    def packed(self, start: int = 0, stop: int | None = None) -> bytes:
        """The codes of these tokens in one piece, as `append_packed` takes them."""
        codes = self.codes(start, stop)
        return bytes(ak.pack(codes.contiguous(), self.bits).numpy()) if codes.numel() else b""

    def part(self, data: bytes, tokens: int, length: int) -> bytes:
        """The first `length` of `tokens` tokens that were packed in one piece, packed alike."""
        piece = type(self)(self.groups, self.bits, self.codewords)
        piece.append_packed(data, tokens)
        return piece.packed(0, length)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        if not 0 <= length <= self._tokens:
            raise ValueError(f"length: expected 0 to {self._tokens}, got {length}")
        self._tokens = length
        del self._pages[-(-length // PAGE_TOKENS) :]

    def fork(self) -> Self:
        """Another store with the same codes; nothing is copied, and neither sees what the other
        does from now on."""
        other = type(self)(self.groups, self.bits, self.codewords)
        other._pages, other._tokens = list(self._pages), self._tokens
        return other

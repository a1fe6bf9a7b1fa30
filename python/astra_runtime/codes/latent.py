"""The recursion of `predictive.py` in the coordinates of its low-rank predictor.

With P = [D_y; D_e]·U, where D_y reads ŷ of the block before and D_e the embedding, a block's
prediction is p = b + s·U with s = ŷ·D_y + ê·D_e of only r numbers a token. As ŷ itself is
b + s·U + t·S, where t holds the codewords of all groups,

    s' = b·D_y' + s·(U·D_y') + t·(S·D_y') + ê·D_e'           the next block's s
    z  = y·A − (b·A + s·(U·A))                               what a sender codes
    ŷ  = b + s·U + t·S                                       what a receiver attends to

with products of matrices that are made once. A sender needs no p and no ŷ, a receiver one ŷ, and a
step costs r·(r + C·w) multiplications in place of r·E. It is exact algebra: only rounding differs,
and sender and receivers round alike up to what their batch shapes change.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from astra_kernels import _direct as direct

from .predictive import Transform


@dataclass(frozen=True, eq=False)
class LatentCode:
    """One block's code with the products that its recursion needs; fp32, columns in one piece.

    The recursion is the same for sender and receivers, and stays fp32. The way back from codewords
    may be rounded to bf16: codes leave out far more.

    Attributes:
        transform: the block's own parts.
        analysis: [E, C·w], A.
        entry, embedding: [E, r] and [D, r], D_y and D_e; either may have no rows.
        constant, carry, coded: [r], [r', r] and [C'·w', r]: what the block before with its s of r'
            numbers and its codewords contributes to s. None where nothing precedes.
        latent_coordinates, offset_coordinates: [r, C·w] and [C·w], −U·A and −b·A.
        up, synthesis: [r, E] and [C·w, E], U and S.
    """

    transform: Transform
    analysis: Tensor
    entry: Tensor
    embedding: Tensor
    constant: Tensor | None
    carry: Tensor | None
    coded: Tensor | None
    latent_coordinates: Tensor
    offset_coordinates: Tensor
    up: direct.MayRound
    synthesis: direct.MayRound

    @classmethod
    def of(cls, transform: Transform, before: Transform | None) -> LatentCode:
        width = len(transform.offset)
        entry, embedding = transform.down[:width], transform.down[width:]

        def product(left: Tensor, right: Tensor) -> Tensor:
            return (left.double() @ right.double()).float()

        def onward(left: Tensor) -> Tensor:
            """What the predictor reads of a part of ŷ of the block before."""
            return direct.columns_first(product(left, entry))

        has_entry = before is not None and len(entry) > 0
        return cls(
            transform,
            direct.columns_first(transform.analysis),
            entry,
            direct.columns_first(embedding),
            product(before.offset, entry) if before is not None and has_entry else None,
            onward(before.up) if before is not None and has_entry else None,
            onward(before.synthesis) if before is not None and has_entry else None,
            direct.columns_first(product(-transform.up, transform.analysis)),
            product(-transform.offset, transform.analysis),
            direct.may_round(transform.up),
            direct.may_round(transform.synthesis),
        )


FEW_NUMBERS = 2**23  # of tables that are small enough beside any model: 16 MiB
_ROWS: Final[WeakKeyDictionary[Transform, Tensor]] = WeakKeyDictionary()


def sums_rows(transforms: Sequence[Transform], weights: float) -> bool:
    """Whether receivers add up table rows, of a model whose blocks have `weights` weights.

    t·S is a sum of C rows t_k·S_c, one a code, with K·E numbers a group in place of w·E. That takes
    about half of the product's time on a CPU, and no more memory than the model's own blocks in 16
    bits: tables that are larger are not made.
    """
    numbers = sum(t.tables.shape[0] * t.tables.shape[1] * len(t.offset) for t in transforms)
    return numbers <= max(weights, FEW_NUMBERS)


def table_rows(transform: Transform) -> Tensor:
    """bfloat16 [C, K, E]: what each codeword adds to ŷ, which so much is left out of that eight
    bits of each are enough. Made once in a process."""
    if transform not in _ROWS:
        tables, synthesis = transform.tables.cpu(), transform.synthesis.cpu()
        by_group = synthesis.view(len(tables), tables.shape[2], synthesis.shape[1])
        _ROWS[transform] = torch.bmm(tables, by_group).to(torch.bfloat16)
    return _ROWS[transform]


def code_macs(transform: Transform, before: Transform | None, sums: bool) -> tuple[int, int]:
    """Multiplications for a token: of who sends it, and of each rank that receives it.

    `sums`: without those that sums of table rows stand for.
    """
    width, rank = len(transform.offset), len(transform.up)
    coordinates, reads = transform.analysis.shape[1], min(width, len(transform.down))
    step = (len(transform.down) - reads) * rank  # the embedding's part
    if before is not None and len(before.up):
        step += (len(before.up) + len(before.synthesis)) * rank
    else:
        step += reads * rank
    send = (width + rank) * coordinates + transform.tables.numel()
    return step + send, step + width * (rank if sums else rank + coordinates)


def latent_codes(transforms: Sequence[Transform]) -> list[LatentCode]:
    """Of all blocks, in order."""
    return [
        LatentCode.of(transform, transforms[block - 1] if block else None)
        for block, transform in enumerate(transforms)
    ]


class DecoderState:
    """What other ranks know of some tokens, block after block, without codewords that were lost.

    Args:
        codes: one a block.
        first: [B, N, E], keys and values of block 0 where every rank computes them itself; None:
            block 0 is coded as well.
        embedding: ê, [B, N, D]; None without token ids.
        batch, tokens: B and N where both are None.
    """

    def __init__(
        self,
        codes: Sequence[LatentCode],
        first: Tensor | None,
        embedding: Tensor | None,
        batch: int = 1,
        tokens: int = 0,
    ) -> None:
        self.codes, self.first = codes, first
        self.batch, self.tokens = (batch, tokens) if first is None else first.shape[:2]
        self.embedding = None if embedding is None else embedding.flatten(0, 1)
        if first is None:
            self.block = 0  # the one that `latent` is for
            self.latent = codes[0].transform.up.new_zeros(self.batch * self.tokens, self._rank(0))
        else:
            self.block = 1
            flat = first.flatten(0, 1)
            # of a model of one block nothing is ever predicted
            self.latent = self._embedded(1, flat @ codes[1].entry) if len(codes) > 1 else flat

    def _rank(self, block: int) -> int:
        return len(self.codes[block].transform.up)

    def _embedded(self, block: int, latent: Tensor) -> Tensor:
        if self.embedding is None:
            return latent
        embedding = self.codes[block].embedding
        return direct.affine(latent, self.embedding, embedding, in_place=True)

    def advance(self, block: int) -> None:
        """Goes on to `block`; blocks in between that sent nothing are as they were predicted."""
        while self.block < block:
            self.update(self.block, None)

    def coordinates(self, block: int, y: Tensor) -> Tensor:
        """z, [B, N, C, w], of the keys and values y [B, N, E] of `block`."""
        self.advance(block)
        code = self.codes[block]
        z = direct.affine(code.offset_coordinates, y.flatten(0, 1), code.analysis)
        z = direct.affine(z, self.latent, code.latent_coordinates, in_place=True)
        return z.view(*y.shape[:-1], code.transform.codes, -1)

    def estimate(self, block: int, codewords: Tensor | None, tokens: slice = slice(None)) -> Tensor:
        """ŷ of `block`, [B, N, E], from codewords [B, N, C, w]; None: none came.

        `tokens`: of those alone.
        """
        if block == 0 and self.first is not None:
            return self.first[:, tokens]
        self.advance(block)
        code, latent = self.codes[block], self.latent
        if tokens != slice(None):
            latent = latent.view(self.batch, self.tokens, -1)[:, tokens].flatten(0, 1)
            codewords = None if codewords is None else codewords[:, tokens]
        offset = code.transform.offset
        estimate = direct.affine(offset, latent, code.up)
        if codewords is not None and code.transform.codes:
            words = codewords.flatten(2).flatten(0, 1)
            estimate = direct.affine(estimate, words, code.synthesis, in_place=True)
        return estimate.view(self.batch, -1, len(offset))

    def update(self, block: int, codewords: Tensor | None) -> None:
        """Takes the codewords [B, N, C, w] of `block` into what is known; None: none came."""
        if block == 0 and self.first is not None:
            return  # `latent` is the next block's
        self.advance(block)
        self.block = block + 1
        if self.block == len(self.codes):
            return
        code = self.codes[self.block]
        if code.carry is None or code.constant is None or code.coded is None:
            self.latent = self.latent.new_zeros(len(self.latent), self._rank(self.block))
            self.latent = self._embedded(self.block, self.latent)
            return
        latent = direct.affine(code.constant, self.latent, code.carry)
        if codewords is not None and len(code.coded):
            words = codewords.flatten(2).flatten(0, 1)
            latent = direct.affine(latent, words, code.coded, in_place=True)
        self.latent = self._embedded(self.block, latent)

    def fork(self) -> DecoderState:
        """Another one, as it is now."""
        return copy.copy(self)

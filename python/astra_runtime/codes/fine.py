"""Fine codes: more bits for the last tokens before a cut, for the next rank alone.

What a token needs most stands right before it, so what coarse codes lose is lost mostly by the
first queries behind a cut. The tokens there get a second payload, which goes only to the rank
behind the cut: with ŷ of the coarse codes,

    z = (y − ŷ)·A          i_c = argmin_k ‖z_c − t_ck‖²          ŷ + [t_1,i_1 … t_C,i_C]·S

It stays out of the recursion, so that coarse codes can be read without any fine one, every rank
predicts alike, and a fine payload that did not come costs its own tokens alone, in that block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from astra_kernels import _direct as direct

FINE = "fine_"  # in front of a tensor's name in a codebook's file


@dataclass(frozen=True, eq=False)
class FineCode:
    """The fine code of one block; fp32. E = 2·Hkv·d, C codes a token.

    Attributes:
        analysis, synthesis: [E, C·w] and [C·w, E], A and S.
        tables: [C, K, w], the codewords.
    """

    analysis: Tensor
    synthesis: Tensor
    tables: Tensor

    @property
    def codes(self) -> int:
        """Codes a token."""
        return len(self.tables)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiplications for a token, of its sender and of its receiver; ŷ not counted."""
        return self.analysis.numel() + self.tables.numel(), self.synthesis.numel()

    @classmethod
    def zero_codes(cls, width: int, codewords: int) -> FineCode:
        """Of a block of which nothing more is sent; `width` is E."""
        zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
        return cls(
            zeros(width, 0),
            zeros(0, width),
            zeros(0, codewords, 1),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in a codebook's file."""
        return {FINE + name: getattr(self, name) for name in ("analysis", "synthesis", "tables")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FineCode:
        """The inverse of `tensors`. KeyError: one is missing."""
        return cls(*(tensors[FINE + name] for name in ("analysis", "synthesis", "tables")))

    def to(self, device: torch.device | str) -> FineCode:
        moved = (t.to(device) for t in (self.analysis, self.synthesis, self.tables))
        return replace(self, **dict(zip(("analysis", "synthesis", "tables"), moved, strict=True)))

    @cached_property
    def _products(self) -> list[tuple[Tensor, direct.MayRound]]:
        """Zeros [C·w] and A, zeros [E] and S, as `direct.affine` reads them, which may round."""
        both = self.analysis, self.synthesis
        return [(matrix.new_zeros(matrix.shape[1]), direct.may_round(matrix)) for matrix in both]

    def encode(self, missing: Tensor) -> Tensor:
        """Codes int32 [..., C] of y − ŷ, [..., E]."""
        zeros, analysis = self._products[0]
        z = direct.affine(zeros, missing.flatten(0, -2), analysis)
        return direct.encode(z.view(*missing.shape[:-1], *self.tables.shape[::2]), self.tables)

    def decode(self, codes: Tensor) -> Tensor:
        """What codes [..., C], found or checked before, add to ŷ, [..., E]."""
        zeros, synthesis = self._products[1]
        words = direct.decode(codes, self.tables).flatten(-2)
        added = direct.affine(zeros, words.flatten(0, -2), synthesis)
        return added.view(*codes.shape[:-1], len(zeros))

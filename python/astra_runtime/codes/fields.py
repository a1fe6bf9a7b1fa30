"""What a codebook consists of: the fields of `astra_config.json`, and the tensors beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Self

import torch
from torch import Tensor

from .fine import FineCode
from .predictive import Transform

# Of the energy of what is coded, the share that codewords leave out where attention may round them
# to bf16, which leaves out a few millionths.
ROUGH: Final = 0.01
DENSE_DTYPES = ("float32", "float16", "int8")  # on the wire


@dataclass(frozen=True, eq=False)
class CodebookFields:
    """The codewords of every block, or the choice to send dense tensors, or nothing.

    Attributes:
        space: the codec's key, see `registry.py`. "kv": joint keys and values before rotation;
            "hidden": block inputs (the paper); "differential": what a block's input adds to its
            estimate one block earlier, from the token embeddings on; "transform": keys and values
            by predictive transform codes (`predictive.py`); "none": dense keys and values; "drop":
            nothing (the local-only control).
        groups: codes a token and block (C), 0 where there are none. Block 0 of space "differential"
            needs none: every rank embeds the token ids itself. Of space "transform", where blocks
            differ, the most that a block has.
        codewords: codewords of a group (K), 0 where there are none.
        shared: space "kv": one set of codes for all heads instead of codes of each head's own.
        dtype: space "none": "float32", "float16" or "int8" on the wire.
        prefix: attention-sink tokens, a decoder's first, kept exact: every rank computes them
            itself, which costs no bits. The first token is unlike all others: attention that has
            nothing to look at rests on it, and its code would have to be perfect.
        geometry: num_blocks, num_heads, num_key_value_heads, head_dim and hidden_size of the model.
        model: digest of the checkpoint (`Adapter.checkpoint`); the codes serve every form of it.
        tables: fp32 [num_blocks, C, K, w]. w = 2·d·Hkv/C in space "kv", else D/C. In space
            "differential" those of block 0 are zero, and not used.
        scales: fp32 [num_blocks, Hkv, 2], space "kv": what keys and values are multiplied with
            before the nearest codeword is sought. The tables hold scaled codewords.
        transforms: one a block, in space "transform", which has no `tables`.
        basis: fp32 [D, F], space "transform" where there are token ids: coordinates of the
            embedding that the predictors of all blocks read. None: they read the embedding itself.
        fine: one a block, or none at all: what the last `fine_tokens` tokens before a cut are sent
            as beside their codes, to the next rank alone (`fine.py`).
        fine_tokens, fine_codewords: how many tokens at most, see `Plan.fine_tokens`, and codewords
            of a group; 0: no fine codes.
        notes: where the codewords come from, and what `fit` measured; of "left_out" see
            `rough_blocks`.
    """

    space: str
    groups: int = 0
    codewords: int = 0
    shared: bool = False
    dtype: str = "float32"
    prefix: int = 0
    geometry: dict[str, int] = field(default_factory=dict)
    model: str = ""
    tables: Tensor | None = None
    scales: Tensor | None = None
    transforms: tuple[Transform, ...] = ()
    basis: Tensor | None = None
    fine: tuple[FineCode, ...] = ()
    fine_tokens: int = 0
    fine_codewords: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return max(1, (self.codewords - 1).bit_length())

    @property
    def fine_code_bits(self) -> int:
        """Bits of one fine code."""
        return max(1, (self.fine_codewords - 1).bit_length())

    @property
    def fine_bits(self) -> float:
        """Bits of the fine codes of a token right before a cut, on average over the blocks."""
        if not self.fine:
            return 0.0
        return sum(fine.codes for fine in self.fine) * self.fine_code_bits / len(self.fine)

    @property
    def digest(self) -> str:
        """Names the content, see `Codebook`."""
        raise NotImplementedError

    @cached_property
    def rough_blocks(self) -> tuple[bool, ...]:
        """Of each block whether its codewords leave out at least `ROUGH`, so that attention may
        round them. A fit notes what they leave out; codewords of which nobody has said it, or that
        were changed since, may be exact."""
        count, note = len(self.block_tables), self.notes.get("left_out")
        note = note if isinstance(note, dict) else {}
        shares: Any = note.get("shares")
        if not (isinstance(shares, list) and len(shares) == count):
            return (False,) * count
        if note.get("digest") != self.digest:
            return (False,) * count
        return tuple(isinstance(share, float) and share >= ROUGH for share in shares)

    def with_left_out(self, shares: Sequence[float]) -> Self:
        """The same with a note of the share of each block's energy that its codewords leave out."""
        left_out = {"digest": self.digest, "shares": [float(f"{share:.2g}") for share in shares]}
        return replace(self, notes=self.notes | {"left_out": left_out})

    @property
    def block_tables(self) -> list[Tensor]:
        """The codewords of each block, [C, K, w]; C is 0 of a block of which nothing is sent."""
        if self.tables is not None:
            return list(self.tables)
        return [transform.tables for transform in self.transforms]

    def with_tables(self, tables: list[Tensor]) -> Self:
        """The same with other codewords, one a block, of the same shapes."""
        if self.tables is not None:
            return replace(self, tables=torch.stack(tables))
        pairs = zip(self.transforms, tables, strict=True)
        return replace(self, transforms=tuple(replace(t, tables=table) for t, table in pairs))

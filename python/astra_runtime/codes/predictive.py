"""Predictive transform codes of keys and values: one scheme from 10 to 1,500 bits a token.

Write y for a token's keys (before rotation) and values in one block, all heads side by side, and ŷ
for what the other ranks know of them. Block by block, sender and receivers compute alike

    p = b + [ŷ of the block before, ê]·P          what ŷ is expected to be; costs no bits
    z = (y − p)·A                                 few coordinates, those that matter
    i_c = argmin_k ‖z_c − t_ck‖²                  sent: one code for each of C groups of coordinates
    ŷ = p + [t_1,i_1 … t_C,i_C]·S                 what the receivers attend to

ê is the token's embedding over its root mean square, which every rank has from the token ids, in a
few coordinates that the predictors of all blocks share; for the same reason ŷ of block 0 is exact,
and free. As the sender predicts from ŷ, not from y, what one
block's codes miss the next block's codes make good.

The engine never computes p, and a sender not even ŷ: `latent.py` runs the same recursion in the
predictor's own r coordinates, for less.

P is low-rank, and A turns the error of the prediction into the principal axes of what it costs: an
error δ of a token's keys and values costs about ½·δᵀFδ nats, F the Fisher information of the
model's output (`train/sensitivity.py`; KVQuant, arXiv 2401.18079, and CQ, arXiv
2405.03917, weigh scalars and channel groups by its diagonal). The number of groups of a block
follows from reverse water-filling (Cover & Thomas, ch. 10) over all blocks at once, so that bits go
where they buy most: a block may get none, or ten times the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import astra_kernels as ak

NAMES_IN_FILES = {
    "down": "squeeze",
    "up": "spread",
    "offset": "offset",
    "analysis": "analysis",
    "synthesis": "synthesis",
    "tables": "tables",
}


@dataclass(frozen=True, eq=False)
class Transform:
    """The code of one block; fp32. E = 2·Hkv·d, F features, C codes a token.

    Attributes:
        down, up: [F, r] and [r, E], the low-rank factors of P = down·up.
        offset: [E], b.
        analysis, synthesis: [E, C·w] and [C·w, E], A and S. A group of fewer than w coordinates has
            zeros in the rest.
        tables: [C, K, w], the codewords.
    """

    down: Tensor
    up: Tensor
    offset: Tensor
    analysis: Tensor
    synthesis: Tensor
    tables: Tensor

    @property
    def codes(self) -> int:
        """Codes a token."""
        return len(self.tables)

    @classmethod
    def zero_codes(cls, width: int, codewords: int) -> Transform:
        """A block of which nothing is sent, and nothing predicted; `width` is E."""
        zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
        return cls(
            zeros(0, 0),
            zeros(0, width),
            zeros(width),
            zeros(width, 0),
            zeros(0, width),
            zeros(0, codewords, 1),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in a codebook's file."""
        return {file: getattr(self, name) for name, file in NAMES_IN_FILES.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Transform:
        """The inverse of `tensors`. KeyError: one is missing."""
        return cls(**{name: tensors[file] for name, file in NAMES_IN_FILES.items()})

    def to(self, device: torch.device | str) -> Transform:
        return replace(self, **{name: getattr(self, name).to(device) for name in NAMES_IN_FILES})

    def predict(self, features: Tensor) -> Tensor:
        """p, [..., E], of features [..., F]."""
        return self.offset + (features @ self.down) @ self.up

    def coordinates(self, missing: Tensor) -> Tensor:
        """z, [..., C, w], of y − p, [..., E]."""
        return (missing @ self.analysis).unflatten(-1, (self.codes, self.tables.shape[-1]))

    def synthesize(self, codewords: Tensor) -> Tensor:
        """What codewords [..., C, w] add to the prediction, [..., E]."""
        return codewords.flatten(-2) @ self.synthesis


def rms_normalized(embedding: Tensor) -> Tensor:
    """Embeddings [..., D] over their root mean square."""
    x = embedding.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


def embedding_features(embedding: Tensor, basis: Tensor | None) -> Tensor:
    """ê, [..., F], of embeddings [..., D]: in the shared basis [D, F], or, None, all D numbers."""
    normalized = rms_normalized(embedding)
    return normalized if basis is None else normalized @ basis


def nearest_codewords(transform: Transform, missing: Tensor) -> Tensor:
    """The codewords [..., C, w] nearest to the coordinates of y − p, [..., E]."""
    codes = ak.encode(transform.coordinates(missing), transform.tables)
    return ak.decode(codes, transform.tables)

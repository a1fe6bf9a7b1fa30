"""A codec in a simulation of all ranks at once: the keys and values that other ranks see.

`train.simulate` runs N ranks as one forward pass of the model. What it needs of a codec is, block
by block, the keys and values that the codes of all tokens sent stand for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..models import Adapter
from .fields import CodebookFields
from .rotary import Rope

# A block and vectors [B, S, C, w] to their codewords, and to the same with noise while training.
Quantize = Callable[[int, Tensor], tuple[Tensor, Tensor]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SentTokens:
    """What a block computes of the S tokens that are sent.

    Attributes:
        hidden: [B, S, D], the block's inputs.
        key, value: [B, Hkv, S, d] each; the keys are rotated by `rope`.
        near: bool [N receiving, S], whose fine codes each rank gets; None: there are none.
    """

    hidden: Tensor
    key: Tensor
    value: Tensor
    rope: Rope
    near: Tensor | None = None


class SimulatedCodec(ABC):
    """Of one pass: where blocks build on each other, it holds what receivers know so far.

    Args:
        quantize: finds nearest codewords; their gradient is that of the vectors.
        receivers: N where frames may be lost, so that each rank's knowledge is its own; else 1.
    """

    def __init__(
        self, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> None:
        self.codebook, self.adapter = codebook, adapter
        self.quantize, self.receivers = quantize, receivers

    @abstractmethod
    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        """Keys (rotated) and values [B, Hkv, S, d] of the tokens sent, as other ranks see them.

        `received`, bool [N receiving, S], says whose codes of this block arrive; None: all do.
        Returns one pair for all receivers, or one for each where losses have made them differ.
        """

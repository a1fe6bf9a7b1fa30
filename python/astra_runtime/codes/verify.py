"""Whether a block computes what the other ranks compute from its codes.

With codes of block inputs a receiver projects keys and values itself, by the modules that the
model's family names; with differential codes it also embeds the tokens itself. A hook or a patch
elsewhere, in front of an attention module, say, would have this rank compute something else than
the others think, and no frame would show it. So an engine's first call compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ModelChanged
from ..models import Adapter
from .base import Codec
from .rotary import Rope, rotate

# Of the largest value: what products of other shapes may round differently.
_ROUNDING, _ROUNDING_OF_16_BITS = 1e-3, 0.05


class Verifier:
    """Looks at the blocks of one call, whose codes are of block inputs.

    Args:
        codec: of that call.
        sent: the tokens that are sent, of those computed here. rope: their angles.
    """

    def __init__(self, adapter: Adapter, codec: Codec, sent: slice, rope: Rope) -> None:
        self.adapter, self.codec, self.sent, self.rope = adapter, codec, sent, rope
        self._input: Tensor | None = None

    def begin(self, block: int, hidden: Tensor) -> None:
        """Is shown the input [B, L, D] of a block. Raises ModelChanged where other ranks take it
        for something else."""
        self.codec.check_input(block, hidden[:, self.sent])
        self._input = hidden

    def check(self, block: int, key: Tensor, value: Tensor) -> None:
        """Is shown the keys, rotated, and values [B, Hkv, L, d] that attention gets. Raises
        ModelChanged where they are no projections of the block's input."""
        hidden, self._input = self._input, None
        if hidden is not None and self.sent.stop > self.sent.start:
            check_projection(self.adapter, block, hidden, (key, value), self.sent, self.rope)


def check_embedding(hidden: Tensor, embedded: Tensor) -> None:
    """Raises ModelChanged unless block 0's input [B, N, D] is what every rank embeds."""
    if not _alike(hidden, embedded):
        raise ModelChanged(
            "the input of block 0 is not what the model's embeddings give, by a hook or a patch "
            "behind them, so other ranks would embed this rank's tokens otherwise; use a codebook "
            "of space 'kv'"
        )


def check_projection(
    adapter: Adapter,
    block: int,
    hidden: Tensor,
    tensors: tuple[Tensor, Tensor],
    sent: slice,
    rope: Rope,
) -> None:
    """Raises ModelChanged unless a block's keys and values are projections of its input.

    Args:
        hidden: [B, L, D], the block's input.
        tensors: keys, rotated, and values [B, Hkv, L, d], as attention was given them.
        sent: the tokens to compare. rope: their angles.
    """
    key, value = (tensor[:, :, sent] for tensor in tensors)
    other_key, other_value = (tensor[:, :, sent] for tensor in adapter.project(block, hidden))
    if _alike(key, rotate(other_key, rope)) and _alike(value, other_value):
        return
    raise ModelChanged(
        f"the attention of block {block} ({type(adapter.attentions[block]).__name__}) makes other "
        "keys and values of the block's input than its norm and projections do, by a hook or a "
        "patch, so other ranks would compute them otherwise; use a codebook of space 'kv'"
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding alone; what is not finite is met where it is sent."""
    if not one.numel() or one.shape != other.shape:
        return one.shape == other.shape
    wide = one.dtype in (torch.float32, torch.float64)
    bound = (_ROUNDING if wide else _ROUNDING_OF_16_BITS) * one.float().abs().amax()
    different = (one.float() - other.float()).abs() > bound
    return not bool((different & one.isfinite()).any())

"""Several sequences that one rank decodes together: the weights are read once a step for all.

A sequence's tokens differ in what they attend to, and in nothing else, so a step is one pass of the
model over one token of each, with an attention of its own for every row: dense over the tokens
computed here, and from codes over the others. No cache of the model's is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from ..models import Adapter
from ..prefill import Prefix
from ..trace import stage

GROWTH = 128  # tokens that keys and values grow by


class Cache:
    """Keys and values of one sequence's tokens on this rank, and what is known of the others.

    Attributes:
        position: of the next token: how many have been read, here and elsewhere.
        length: tokens whose keys and values are here.
        logits: fp32 [V] after the last token read; None: nothing was read yet.
        prefix: what is known of the tokens that other ranks have computed; None: there are none.
    """

    def __init__(self, num_blocks: int, prefix: Prefix | None = None) -> None:
        self._keys: list[Tensor | None] = [None] * num_blocks
        self._values: list[Tensor | None] = [None] * num_blocks
        self.position = self.length = 0
        self.logits: Tensor | None = None
        self.prefix: Prefix | None = None
        if prefix is not None:
            self._keys = [prefix.local[block][0] for block in range(num_blocks)]
            self._values = [prefix.local[block][1] for block in range(num_blocks)]
            self.length = prefix.local[0][0].shape[2]
            self.position, self.logits = prefix.tokens, prefix.logits
            self.prefix = replace(prefix, local={})

    def copy(self) -> Cache:
        """Another sequence with the same beginning; each copies keys and values when it grows."""
        other = Cache(len(self._keys))
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            theirs[:] = [None if kept is None else kept[:, :, : self.length] for kept in mine]
            mine[:] = theirs
        other.position, other.length = self.position, self.length
        other.logits, other.prefix = self.logits, self.prefix
        return other

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [1, Hkv, L, d] of a block, these ones behind those of before.

        They count from `advance` on: a pass that fails leaves the sequence as it was.
        """
        stop = self.length + key.shape[2]
        whole = []
        for kept, new in ((self._keys, key), (self._values, value)):
            room = kept[block]
            if room is None or room.shape[2] < stop:
                room = kept[block] = self._grown(room, new, stop)
            room[:, :, self.length : stop] = new
            whole.append(room[:, :, :stop])
        return whole[0], whole[1]

    def _grown(self, kept: Tensor | None, like: Tensor, stop: int) -> Tensor:
        room = -(-stop // GROWTH) * GROWTH
        grown = like.new_empty((1, like.shape[1], room, like.shape[3]))
        if kept is not None:
            grown[:, :, : self.length] = kept[:, :, : self.length]
        return grown

    def advance(self, tokens: int, logits: Tensor) -> None:
        """`tokens` more have been read, `logits` follow the last one."""
        self.length += tokens
        self.position += tokens
        self.logits = logits

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, H, M, d] over this rank's own tokens, the M new ones among them, and the others'."""
        keys, values = self.append(block, key, value)
        with stage("attend", block):
            local, lse = ak.attention(query, keys, values, is_causal=True, scale=scale)
        prefix = self.prefix
        remote, mask = (None, None) if prefix is None else prefix.remote.get(block, (None, None))
        if remote is None or prefix is None:
            return local
        with stage("attend", block):
            out, far = prefix.codec.attend(block, query, remote, prefix.remote_rope, mask, scale)
        return ak.merge_state(local, lse, out, far)[0]


class _Rows:
    """The listener of one step: row i of the batch belongs to sequence i."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        """Nothing leaves this rank while it decodes."""

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows = [
            cache.attend(block, query[i : i + 1], key[i : i + 1], value[i : i + 1], scale)
            for i, cache in enumerate(self.caches)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden[:, -1:]


def read(model: Any, adapter: Adapter, caches: Sequence[Cache], ids: Tensor) -> None:
    """Reads `ids` int64 [B, M]: M more tokens of each of B sequences, in one pass of the model.

    Each sequence then has the logits after its last token, and is M tokens longer.
    """
    starts = torch.tensor([cache.position for cache in caches], device=ids.device)
    positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
    with adapter.listening(_Rows(caches)), stage("compute"):
        output = model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True)
    for cache, logits in zip(caches, output.logits[:, -1].float(), strict=True):
        cache.advance(ids.shape[1], logits)

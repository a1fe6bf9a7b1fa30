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
from ..sessions.cache import KeyValues
from ..trace import stage


class Cache:
    """Keys and values of one sequence's tokens on this rank, and what is known of the others.

    Args:
        known: keys and values of the tokens so far.
        position: how many tokens these are, here and elsewhere.
        logits: fp32 [V] after the last of them; None: nothing was read yet.
        prefix: what is known of the tokens that other ranks have computed and that `known` lacks;
            None: there are none.

    Attributes:
        position, logits: as above, of now.
    """

    def __init__(
        self,
        known: KeyValues,
        position: int = 0,
        logits: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self._known, self.position, self.logits = known, position, logits
        self._prefix = prefix

    @classmethod
    def of(cls, prefix: Prefix) -> Cache:
        """Goes on behind a prompt that all ranks have read."""
        known = KeyValues(len(prefix.local))
        for block, pair in prefix.local.items():
            known.append(block, *pair)
        return cls(known, prefix.tokens, prefix.logits, replace(prefix, local={}))

    def fork(self) -> Cache:
        """Another sequence with the same beginning; nothing is copied."""
        return Cache(self._known.fork(), self.position, self.logits, self._prefix)

    def advance(self, tokens: int, logits: Tensor) -> None:
        """`tokens` more have been read, `logits` follow the last one."""
        self.position += tokens
        self.logits = logits

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, H, M, d] over this rank's own tokens, the M new ones among them, and the others'."""
        self._known.append(block, key, value)
        with stage("attend", block):
            known = self._known.tensors(block)
            local, lse = ak.attention(query, *known, is_causal=True, scale=scale)
        prefix = self._prefix
        if prefix is None:
            return local
        remote, mask = prefix.remote.get(block, (None, None))
        if remote is None:
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

"""Several sequences that one rank reads together: the weights are read once a step for all.

A sequence's tokens differ in what they attend to, and in nothing else, so a step is one pass of the
model over the next tokens of each, one of an answer or a piece of a prompt. Each has an attention
of its own: dense over the tokens computed here, and from codes over the others. No cache of the
model's is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

import astra_kernels as ak

from ..engine_parts import EngineParts
from ..prefill import Prefix
from ..sessions.cache import KeyValues
from ..sessions.passes import Between, read_tokens
from ..trace import stage


class Cache:
    """Keys and values of one sequence's tokens on this rank, and what is known of the others.

    Args:
        known: keys and values of the tokens so far.
        length: how many tokens these are, here and elsewhere.
        logits: fp32 [V] after the last of them; None: nothing was read yet.
        prefix: what is known of the tokens that other ranks have computed and that `known` lacks;
            None: there are none.

    Attributes:
        length, logits: as above, of now.
    """

    def __init__(
        self,
        known: KeyValues,
        length: int = 0,
        logits: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self._known, self.length, self.logits = known, length, logits
        self._prefix = prefix

    @classmethod
    def of(cls, prefix: Prefix) -> Cache:
        """Goes on behind a prompt that all ranks have read."""
        known = KeyValues(len(prefix.local))
        for block, pair in prefix.local.items():
            known.append(block, *pair)
        return cls(known, prefix.tokens, prefix.logits, replace(prefix, local={}))

    def known(self) -> KeyValues:
        """Keys and values of the tokens so far; the cache goes on by itself."""
        return self._known.fork()

    def fork(self) -> Cache:
        """Another sequence with the same beginning; nothing is copied."""
        return Cache(self._known.fork(), self.length, self.logits, self._prefix)

    def advance(self, tokens: int, logits: Tensor) -> None:
        """`tokens` more have been read, `logits` follow the last one."""
        self.length += tokens
        self.logits = logits

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """[1, H, M, d] over this rank's own tokens, the M new ones among them, and the others'."""
        state, prefix = self._known.attend(block, query, key, value, scale), self._prefix
        if prefix is None:
            return state
        remote, mask = prefix.remote.get(block, (None, None))
        if remote is None:
            return state
        with stage("attend", block):
            far = prefix.codec.attend(block, query, remote, prefix.remote_rope, mask, scale)
        return ak.merge_state(*state, *far)


def read(
    engine: EngineParts,
    caches: Sequence[Cache],
    new: Sequence[Tensor],
    between: Between | None = None,
) -> None:
    """Reads the next tokens of each sequence, int64 [1, M] of any M, in one pass of the model.

    Each sequence then has the logits after its last token, and is M tokens longer.

    between: called before each block, with its number; other sequences may be read in it.
    """
    rows = read_tokens(engine, caches, new, between)
    for cache, ids, logits in zip(caches, new, rows, strict=True):
        cache.advance(ids.shape[1], logits)

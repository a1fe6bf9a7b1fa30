"""What one rank knows of a session's tokens, and what it knows that the other ranks know."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..codes.store import CodeStore
from .cache import KeyValues

Interval = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) whose codes some ranks lack.

    Attributes:
        source: the rank that computed them, and codes them.
        known: the ranks that have their codes, or, with dense exchange, keys and values.
    """

    start: int
    stop: int
    source: int
    known: frozenset[int]


@dataclass(frozen=True)
class Fine:
    """Fine codes of tokens [start, stop), by block."""

    start: int
    stop: int
    payloads: list[bytes]


@dataclass(eq=False)
class SessionState:
    """Everything but `cache`, `store`, `pieces` and `scores` is the same on every rank.

    Attributes:
        ids: int64 [1, T], all tokens.
        prefix: tokens at the beginning that every rank computes itself and nobody codes.
        read: how many tokens some rank has keys and values of. The last token that was generated
            is in `ids` before it is read.
        owner: the rank that computed the last token, and answers by default.
        fresh: `owner` has the logits behind token `read` − 1.
        exact: by rank, the tokens that it computed itself.
        pending: what some rank has neither computed nor received yet, in order.
        cache: keys and values of the first tokens, exact or rebuilt from codes.
        store: a block's codes of the tokens from `prefix` on, up to the first pending one; None:
            with dense exchange there are none.
        pieces: payloads of pending tokens that this rank has, by (start, stop).
        scores: fp32 [1, V], on the owner, where `fresh`.
        fine: fine codes of the last tokens, for ranks that did not compute them; None: there are
            none.
        held: keys and values of tokens [start, stop) that are exact here and not in `cache` yet.
        is_lean: what codes stand for is rebuilt only when it is wanted, as memory was freed.
        answer: what this rank is continuing the session with, a `decoder.Answer`.
    """

    cache: KeyValues
    store: list[CodeStore] | None
    world_size: int
    prefix: int
    owner: int
    ids: Tensor
    read: int = 0
    fresh: bool = False
    exact: list[list[Interval]] = field(default_factory=list)
    pending: list[Span] = field(default_factory=list)
    pieces: dict[Interval, list[bytes]] = field(default_factory=dict)
    scores: Tensor | None = None
    fine: Fine | None = None
    held: list[tuple[int, int, list[tuple[Tensor, Tensor]]]] = field(default_factory=list)
    is_lean: bool = False
    answer: Any = None

    def __post_init__(self) -> None:
        self.exact = self.exact or [[] for _ in range(self.world_size)]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def coded(self) -> int:
        """Tokens, from the first on, whose codes every rank has."""
        return self.pending[0].start if self.pending else self.read

    def num_exact(self, rank: int, stop: int | None = None) -> int:
        """How many tokens before `stop` this rank has computed itself."""
        stop = self.read if stop is None else stop
        return sum(max(0, min(b, stop) - a) for a, b in self.exact[rank])

    def num_fine(self, rank: int) -> int:
        """Of how many tokens that it has not computed itself `rank` has fine codes."""
        if self.fine is None:
            return 0
        start, stop = self.fine.start, self.fine.stop
        return stop - start - (self.num_exact(rank, stop) - self.num_exact(rank, start))

    def add_exact(self, rank: int, start: int, stop: int) -> None:
        """`rank` has computed these tokens, and forgets what it had from `start` on."""
        if start >= stop:
            return
        kept = cut_intervals(self.exact[rank], start)
        if kept and kept[-1][1] == start:
            start = kept.pop()[0]
        self.exact[rank] = [*kept, (start, stop)]

    def add_computed(self, start: int, stop: int, source: int) -> None:
        """`source` alone has computed these tokens, up to the last one."""
        self.add_exact(source, start, stop)
        first = max(self.read, min(self.prefix, stop))
        if first < stop:
            self.pending.append(Span(first, stop, source, frozenset([source])))
        self.advance(stop, source)

    def advance(self, stop: int, owner: int) -> None:
        """`stop` tokens are read by now, the last of them by `owner`."""
        for rank in range(self.world_size):  # who has not computed these yet does when it has to
            self.add_sinks(rank, min(self.prefix, stop))
        self.read, self.owner = stop, owner

    def add_sinks(self, rank: int, stop: int) -> None:
        if self.num_exact(rank, stop) < stop:
            later = [(a, b) for a, b in self.exact[rank] if b > stop]
            self.exact[rank] = [(0, stop), *((max(a, stop), b) for a, b in later)]

    def add_answer(self, tokens: Sequence[int], rank: int) -> None:
        """`rank` has generated `tokens`, and read all but the last of them."""
        if not tokens:
            return
        start = self.read if self.fresh else min(self.read, self.tokens - 1)
        self.add_unread(tokens)
        self.add_computed(start, self.tokens - 1, rank)
        self.answer = None

    def settle(self) -> None:
        """Forgets an answer that was begun and not finished."""
        self.answer = None
        self.cache.truncate(self.read)

    def add_unread(self, tokens: Sequence[int]) -> None:
        """Tokens of which no rank has keys and values."""
        if tokens:
            new = torch.tensor([list(tokens)], dtype=torch.int64, device=self.ids.device)
            self.ids = torch.cat([self.ids, new], 1)
            self.fresh, self.scores = False, None

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens. The rank that has the last of them exact owns it."""
        self.ids = self.ids[:, :length]
        if length < self.read:
            self.read, self.fresh, self.scores = length, False, None
        self.exact = [cut_intervals(intervals, length) for intervals in self.exact]
        self.cache.truncate(length)
        for store in self.store or ():
            store.truncate(min(len(store), max(0, length - self.prefix)))
        self.held = [
            (a, min(b, length), [(k[:, :, : length - a], v[:, :, : length - a]) for k, v in pairs])
            for a, b, pairs in self.held
            if a < length
        ]
        if self.fine is not None and length < self.fine.stop:
            self.fine = None
        self._cut_pending(length)
        holders = [n for n, held in enumerate(self.exact) if held and held[-1][1] == self.read]
        if holders and self.owner not in holders:
            self.owner = holders[-1]

    def _cut_pending(self, length: int) -> None:
        spans, pieces = self.pending, self.pieces
        self.pending, self.pieces = [], {}
        for span in spans:
            payloads, stop = pieces.get((span.start, span.stop)), min(span.stop, length)
            if span.start >= stop:
                continue
            self.pending.append(replace(span, stop=stop))
            if payloads is None or self.store is None:
                continue
            old, new = span.stop - span.start, stop - span.start
            pairs = zip(self.store, payloads, strict=True)
            self.pieces[span.start, stop] = [store.part(data, old, new) for store, data in pairs]

    def release(self, rank: int, keep_exact: bool) -> None:
        """Drops what can be rebuilt from codes; without `keep_exact`, all that codes stand for."""
        if self.store is None:
            return
        self.is_lean = True
        sinks = min(self.prefix, self.read)
        if not keep_exact:
            self.exact = [cut_intervals(held, sinks) for held in self.exact]
        old, held = self.cache, [(a, b) for a, b in self.exact[rank] if b <= self.cache.length]
        pieces = [(a, b, old.slices([(a, b)])) for a, b in held]
        # what was not in the cache yet is exact still
        later = [piece for piece in self.held if piece[0] >= old.length] if keep_exact else []
        self.cache, self.held = type(old)(old.blocks), [*pieces, *later]
        if pieces and pieces[0][0] == 0:
            for block, (key, value) in enumerate(pieces[0][2]):
                self.cache.append(block, key, value)
            del self.held[0]

    def fork(self) -> Self:
        other = copy.copy(self)
        other.cache = self.cache.fork()
        other.store = None if self.store is None else [store.fork() for store in self.store]
        other.exact = [list(intervals) for intervals in self.exact]
        other.pending, other.pieces = list(self.pending), dict(self.pieces)
        other.held = list(self.held)
        return other


def cut_intervals(intervals: Sequence[Interval], stop: int) -> list[Interval]:
    """What of them lies before `stop`."""
    return [(a, min(b, stop)) for a, b in intervals if a < stop]

"""Prompts that stay, so that another one with the same beginning costs the rest alone.

A kept prompt is a session. Which one a prompt goes on from, and which are forgotten, the leader
says in its jobs, so that all ranks do the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..engine import Engine
from ..sessions.cache import KeyValues
from ..sessions.codes import complete, most_lacking, synchronize
from ..sessions.session import Session
from ..sessions.several import MOST_SHARED
from .batch import Cache

LEAST_SHARED = 16  # tokens: fewer are read again


class Kept:
    """The sessions of one rank, by the number of the prompt that made them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sessions: dict[int, Session] = {}
        self._held: dict[int, KeyValues] = {}  # of prompts that this rank has read by itself

    @property
    def possible(self) -> bool:
        """Whether this engine keeps sessions at all."""
        return self._engine.codebook.codec.keeps_sessions and self._engine.on_missing == "raise"

    def forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._sessions.pop(number, None)
            self._held.pop(number, None)

    def hold(self, number: int, known: KeyValues) -> None:
        """Keys and values of a prompt that this rank alone has read, until the leader knows of it
        and says what becomes of them."""
        if self.possible:
            self._held[number] = known

    def keep(
        self, number: int, ids: Sequence[int], owner: int, known: KeyValues | None = None
    ) -> None:
        """Keeps a prompt that `owner` has read by itself, and what it has answered with it.

        The other ranks get its codes when something that they are to do needs them.

        known: on the owner, its keys and values where the prompt that is held lacks some.
        """
        # in the middle of a pass, perhaps: `Engine.session` would wait for its end
        session = Session(self._engine, self._engine._new_state())
        self._sessions[number] = session
        held = self._held.pop(number, None)
        if held is None or held.length < len(ids):
            held = known
        self._add(session, ids, owner, held)

    def grow(
        self, number: int, ids: Sequence[int], owner: int, known: KeyValues | None = None
    ) -> None:
        """A kept prompt goes on with what `owner` has answered; `known` on the owner: keys and
        values of both."""
        self._add(self._sessions[number], ids, owner, known)

    def _add(
        self, session: Session, ids: Sequence[int], owner: int, known: KeyValues | None
    ) -> None:
        state = session._state
        start = state.tokens
        state.add_unread(ids)
        if self._engine.rank == owner:
            assert known is not None, "the owner has computed them"
            known.truncate(state.tokens)
            assert known.length == state.tokens, (known.length, state.tokens)
            state.cache = known
        state.add_computed(start, state.tokens, owner)

    def read(
        self,
        number: int,
        ids: Sequence[int],
        owner: int,
        base: tuple[int, int] | None,
        between: Callable[[int], None],
        within_ms: float | None,
        beside: Sequence[float] = (),
    ) -> Cache | None:
        """Has all ranks read a prompt and keeps it; collective. On its owner: how to go on.

        base: the number of a prompt whose first tokens are this one's, and how many; None: none is.
        beside: by rank, what it computes meanwhile, in tokens of this prompt: it reads fewer of it.
        """
        engine = self._engine
        session, shared = engine.session(), 0
        if base is not None:
            session, shared = self._sessions[base[0]].fork(), base[1]
            session.truncate(shared)
        new = torch.tensor([list(ids[shared:])]).to(engine.adapter.device)
        session._append(new, owner, number, within_ms, between, beside)
        self._sessions[number] = session
        state = session._state
        if engine.rank != owner:
            return None
        assert state.scores is not None, "the owner has read the last token"
        return Cache(state.cache.fork(), state.tokens, state.scores[0])

    def share(self, number: int, ranks: Collection[int]) -> None:
        """`ranks` get what they need to go on with a prompt that all ranks have read; collective.

        Every rank receives the codes that it lacks, as far as the prompt's owner did not wait for
        it.
        """
        engine, session = self._engine, self._sessions[number]
        with session._call(number, None, "share") as (running, work):
            synchronize(engine, work, running)
            if engine.rank in ranks:
                complete(engine, work)

    def may_be_shared(self, number: int) -> bool:
        """Whether what other ranks lack of a prompt is little enough to be sent in one piece."""
        return most_lacking(self._engine, self._sessions[number]._state) <= MOST_SHARED

    def shared(self, number: int) -> Cache:
        """How this rank goes on with a prompt that was shared with it."""
        state = self._sessions[number]._state
        return Cache(state.cache.fork(), state.tokens)

    def num_coded(self, number: int, rank: int) -> int:
        """Of how many tokens of a prompt `rank` has codes alone."""
        state = self._sessions[number]._state
        return state.read - state.num_exact(rank) if self._engine.codebook.coded else 0


class Prompts:
    """What the leader knows of the prompts that the ranks keep, and has to tell them of these.

    The longest unused goes first.

    Args:
        room: how many tokens are kept.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._prompts: OrderedDict[int, tuple[tuple[int, ...], int]] = OrderedDict()
        self._tokens = 0
        self._keep: list[tuple[int, int, list[int]]] = []  # number, owner, ids
        self._grow: list[tuple[int, int, list[int]]] = []
        self._forget: list[int] = []

    def find(self, ids: Sequence[int]) -> tuple[int, int, int] | None:
        """The prompt with the longest common beginning, how long that is, and who owns it.

        The last token is always read anew, since what follows it is not kept.
        """
        best: tuple[int, int, int] | None = None
        for number, (kept, owner) in self._prompts.items():
            shared = min(_common(kept, ids), len(ids) - 1)
            if shared >= LEAST_SHARED and (best is None or shared > best[1]):
                best = number, shared, owner
        if best is not None:
            self._prompts.move_to_end(best[0])
        return best

    def add(self, number: int, ids: Sequence[int], owner: int) -> list[int]:
        """All ranks have read a prompt and keep it; which others are to be forgotten for it, or
        this one itself."""
        self._prompts[number] = tuple(ids), owner
        self._tokens += len(ids)
        return self._evict()

    def add_alone(self, number: int, ids: Sequence[int], owner: int) -> list[int]:
        """One rank has read a prompt by itself, and the ranks have to be told that it is kept."""
        self._forget = [other for other in self._forget if other != number]
        self._keep.append((number, owner, list(ids)))
        return self.add(number, ids, owner)

    def extend(self, number: int, ids: Sequence[int]) -> list[int] | None:
        """A kept prompt goes on with its answer; which are to be forgotten for that, itself
        perhaps. None: it is not kept."""
        if number not in self._prompts:
            return None
        kept, owner = self._prompts[number]
        self._prompts[number] = (*kept, *ids), owner
        self._prompts.move_to_end(number)
        self._tokens += len(ids)
        self._grow.append((number, owner, list(ids)))
        return self._evict()

    def forget(self, number: int) -> None:
        """What a rank has of a prompt that is not kept is of no use."""
        self._forget.append(number)

    def lose(self, number: int) -> None:
        """A prompt may not be the same on all ranks any more, and is not used again."""
        kept, _ = self._prompts.pop(number, ((), 0))
        self._tokens -= len(kept)
        self._forget.append(number)

    def changes(self) -> dict[str, Any]:
        """What the ranks have to be told since the last time, as jobs carry it."""
        changes = {"keep": self._keep, "grow": self._grow, "forget": self._forget}
        self._keep, self._grow, self._forget = [], [], []
        return changes

    def _evict(self) -> list[int]:
        """Makes room. The ranks have to forget what goes, and not to keep it first."""
        gone = []
        while self._tokens > self.room and self._prompts:
            oldest, (kept, _) = self._prompts.popitem(last=False)
            self._tokens -= len(kept)
            gone.append(oldest)
        self._forget += gone
        self._keep = [kept for kept in self._keep if kept[0] not in gone]
        self._grow = [grown for grown in self._grow if grown[0] not in gone]
        return gone


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)

"""A session: one sequence that stays on all ranks, so that only its new tokens cost anything."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..call import CallState
from ..control import Control
from ..decoding import Choose
from ..errors import WireError
from ..inputs import check_bound, check_function, check_inputs, check_integer, check_request
from .base import EngineParts, Running
from .codes import complete, session_tag, synchronize
from .cut import cut
from .decoder import Asked, Decoder
from .passes import Between, prefill
from .state import SessionState

_SIZE = struct.Struct("<Q")
_ENDED = -1  # stands for the next token of a session that has ended


@dataclass(frozen=True)
class AnswerFacts:
    """How the last answer of a session came about.

    Attributes:
        rank: who computed it.
        cached_tokens: of the tokens before it, those that were there before the last `append`.
        coded_tokens: those of which this rank had codes alone.
    """

    rank: int
    cached_tokens: int
    coded_tokens: int


class Session:
    """One sequence of tokens on all ranks; made by `Engine.session`.

    Every rank knows the ids, and has of each token the keys and values, where it computed them
    itself, or the codes of a rank that did. `append` computes the new tokens alone, cut over the
    ranks; what then is not needed for the first token (codes for ranks that come earlier in the
    sequence) is sent when an answer ends, or before whatever else needs it.

    All methods are collective: every rank calls them, in one order, with the same arguments. What
    they refuse ends nothing. A call that ends with an error leaves the session as it was on the
    ranks that raise it. A rank that was done before may be ahead then: `truncate(n)` on all ranks,
    n tokens that they all have, makes them equal again; without it the next call is a WireError.

    Attributes:
        answered: of the last answer, None before any.

    Example:
        session = engine.session()
        session.append(document_ids)  # int64 [1, T]
        first = session.generate(max_new_tokens=40)
        session.append(question_ids)  # costs these tokens alone
        second = session.generate(max_new_tokens=40)
    """

    answered: AnswerFacts | None = None

    def __init__(self, engine: EngineParts, state: SessionState) -> None:
        self._engine, self._state = engine, state
        self._cached = 0

    def __len__(self) -> int:
        return self._state.tokens

    @property
    def ids(self) -> Tensor:
        """int64 [1, T], all tokens so far."""
        return self._state.ids.clone()

    @property
    def owner(self) -> int:
        """The rank that computed the last token, and answers by default."""
        return self._state.owner

    def append(
        self,
        ids: Tensor,
        *,
        rank: int | None = None,
        request: int | None = None,
        within_ms: float | None = None,
        between: Between | None = None,
    ) -> None:
        """Reads further tokens; what was read before costs nothing.

        A long input is cut over all ranks, a short one over fewer, even one: what costs less.

        Args:
            ids: integers [1, T], at least one.
            rank: who computes the last of them, and answers by default; None: the rank that
                computed the last one so far, at first the last rank.
            request, within_ms: as of a call of the engine.
            between: called on every rank with each block's number, before the block where the rank
                computes a shard; it may let a `Decoder` step.

        Raises:
            TypeError, ValueError: ids that the model does not have, more than fit its limit.
        """
        engine, state = self._engine, self._state
        ids = _check_ids(engine, ids, state.tokens)
        owner = state.owner if rank is None else _check_rank(engine, rank)
        check_function("between", between)
        cached = state.tokens
        with self._call(request, within_ms, "append", ids) as (running, work):
            work.ids = torch.cat([work.ids, ids], 1)
            tokens, past = work.tokens - work.read, work.read
            shares = cut(engine, past, tokens, owner)
            # whoever computes a shard needs all of the past
            known = {work.owner} if work.pending else set(range(work.world_size))
            if not known.issuperset(shares.members):
                synchronize(engine, work, running)
            if engine.rank in shares.members:
                complete(engine, work)
            tag = session_tag(work, request, "append", shares)
            prefill(engine, work, running, shares, tag, between)
        self._cached = cached

    def generate(
        self,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        choose: Choose | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        request: int | None = None,
        within_ms: float | None = None,
        rank: int | None = None,
    ) -> Tensor:
        """Continues the session; the new tokens become part of it.

        Args:
            rank: who decodes; None: `owner`. Ranks may answer differently, as each has other
                tokens at full precision.
            max_new_tokens, eos_token_id, choose, on_token, request, within_ms: as of
                `Engine.generate`; `on_token` gets int64 [1].

        Returns:
            int64 [1, all tokens], on every rank.
        """
        ranks = None if rank is None else [rank]
        options: dict[str, Any] = {"eos_token_id": eos_token_id, "choose": [choose]}
        options |= {"request": request, "within_ms": within_ms, "ranks": ranks}
        check_function("on_token", on_token)

        def hear(tokens: Tensor) -> None:
            if on_token is not None:
                on_token(tokens.clone())

        return generate_together([self], max_new_tokens, on_tokens=hear, **options)[0]

    def finish(self, *, request: int | None = None, within_ms: float | None = None) -> Tensor:
        """After an answer that `owner` gave by a `Decoder`: every rank hears of it.

        The owner sends the new tokens, and every rank what others have not heard of so far.
        Returns int64 [1, all tokens].
        """
        engine = self._engine
        with self._call(request, within_ms, "finish") as (running, work):
            tag = session_tag(work, request, "finish")
            answer = self._state.answer
            tokens = [] if answer is None else answer.tokens
            if engine.rank == work.owner:
                _send_tokens(engine, tokens, tag)
            else:
                tokens = _receive_tokens(engine, work, tag)
            self._remember(work.owner)
            work.answer = None
            work.add_answer(tokens, work.owner)
            synchronize(engine, work, running)
        return self.ids

    def fork(self) -> Self:
        """Another session with the same tokens, which goes on by itself. Nothing is copied."""
        engine = self._engine
        with engine._turn():
            state = self._state.fork()
            state.answer = None
            state.serial = engine.num_sessions = engine.num_sessions + 1
        other = type(self)(engine, state)
        other._cached = self._cached
        return other

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        length = check_integer("length", length, 0, self._state.tokens)
        with self._engine._turn():
            self._state.truncate(length)

    @contextlib.contextmanager
    def _call(
        self, request: int | None, within_ms: float | None, *what: object
    ) -> Iterator[tuple[Running, SessionState]]:
        """One call of the mesh, on a fork of the session's state that is kept if it succeeds."""
        with one_call(self._engine, request, within_ms) as running:
            work = self._state.fork()
            yield running, work
        self._state = work

    def _remember(self, rank: int) -> None:
        state = self._state
        coded = state.read - state.num_exact(rank)
        self.answered = AnswerFacts(rank, self._cached, coded)


@contextlib.contextmanager
def one_call(
    engine: EngineParts, request: int | None, within_ms: float | None
) -> Iterator[Running]:
    """A collective call that ends on all ranks alike."""
    request, within_ms = check_request(request), check_bound(within_ms)
    with torch.no_grad(), engine._turn():
        running = Running(engine.mesh, CallState())
        with engine._ending_together(running, request, within_ms):
            yield running


def generate_together(
    sessions: Sequence[Session],
    max_new_tokens: int = 20,
    *,
    ranks: Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    choose: Sequence[Choose | None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    request: int | None = None,
    within_ms: float | None = None,
) -> list[Tensor]:
    """Continues several sessions of one engine at the same time, each on a rank; collective.

    Args:
        sessions: different ones, such as forks of one prefix.
        ranks: who decodes each; None: each session's owner. A rank's own are one batch.
        choose: one for each session, see `Engine.generate`; None: the likeliest token.
        on_tokens: called on every rank at each step with int64 [sessions]; −1 for those that have
            ended.
        max_new_tokens, eos_token_id, request, within_ms: as of `Engine.generate`.

    Returns:
        int64 [1, all tokens] of each session.

    Example:
        forks = [session.fork() for _ in range(mesh.world_size)]
        answers = generate_together(forks, ranks=range(mesh.world_size), choose=samplers)
    """
    engine, places, asked = _check_together(
        sessions, max_new_tokens, ranks, eos_token_id, choose, on_tokens
    )
    with one_call(engine, request, within_ms) as running:
        works = [session._state.fork() for session in sessions]
        for work, place in zip(works, places, strict=True):
            _move(engine, work, place, running)
        tokens = _decode_together(engine, works, places, asked, on_tokens, request, running)
        for session, work, place, new in zip(sessions, works, places, tokens, strict=True):
            session._remember(place)
            work.add_answer(new, place)
            synchronize(engine, work, running)
    for session, work in zip(sessions, works, strict=True):
        session._state = work
    return [session.ids for session in sessions]


def _check_together(
    sessions: Sequence[Session],
    max_new_tokens: Any,
    ranks: Any,
    eos_token_id: Any,
    choose: Any,
    on_tokens: Any,
) -> tuple[EngineParts, list[int], list[Asked]]:
    if not sessions or len({id(session) for session in sessions}) < len(sessions):
        raise ValueError(f"sessions: expected at least one, all different, got {len(sessions)}")
    engine = sessions[0]._engine
    if any(session._engine is not engine for session in sessions):
        raise ValueError("sessions: expected those of one engine, got several engines'")
    check_function("on_tokens", on_tokens)
    owners = [session.owner for session in sessions]
    places = owners if ranks is None else [_check_rank(engine, rank) for rank in ranks]
    choices = [None] * len(sessions) if choose is None else list(choose)
    for name, given in (("ranks", places), ("choose", choices)):
        if len(given) != len(sessions):
            raise ValueError(f"{name}: expected {len(sessions)}, one a session, got {len(given)}")
    asked = [Asked.of(engine, max_new_tokens, eos_token_id, choice) for choice in choices]
    for session, options in zip(sessions, asked, strict=True):
        options.check_room(len(session), _limit(engine))
    return engine, places, asked


def _move(engine: EngineParts, work: SessionState, rank: int, running: Running) -> None:
    """`rank` gets all that it needs to go on with the session; the others do what that takes."""
    if rank != work.owner:
        if work.pending:
            synchronize(engine, work, running)
        work.fresh, work.scores = False, None
    if engine.rank == rank:
        complete(engine, work)


def _decode_together(
    engine: EngineParts,
    works: Sequence[SessionState],
    places: Sequence[int],
    asked: Sequence[Asked],
    on_tokens: Callable[[Tensor], None] | None,
    request: int | None,
    running: Running,
) -> list[list[int]]:
    """Step by step, every rank hears every session's next token; the tokens of each."""
    rank, mesh = engine.rank, engine.mesh
    limits = [(each.max_new_tokens, each.ends) for each in asked]
    tag = _joint_tag(works, request, limits, places)
    mine = {n: asked[n] for n, place in enumerate(places) if place == rank}
    decoder = Decoder(engine)
    answers = {n: decoder.join(works[n], options) for n, options in mine.items()}
    tokens: list[list[int]] = [[] for _ in works]
    going = set(range(len(works)))
    while going:
        running.check_running()
        mesh.check_cancelled()
        decoder.step()
        step = _exchange_step(engine, places, going, answers, tag)
        for n in sorted(going):
            tokens[n].append(step[n])
            ended = step[n] in asked[n].ends or len(tokens[n]) >= asked[n].max_new_tokens
            going -= {n} if ended else set()
        if on_tokens is not None:
            on_tokens(torch.tensor(step, device=works[0].ids.device))
    return tokens


def _joint_tag(works: Sequence[SessionState], *what: object) -> int:
    return session_tag(works[0], *what, [session_tag(work) for work in works[1:]])


def _exchange_step(
    engine: EngineParts,
    places: Sequence[int],
    going: set[int],
    answers: dict[int, Any],
    tag: int,
) -> list[int]:
    """The next token of each session that goes on, from whoever decodes it."""
    rank, mesh = engine.rank, engine.mesh
    by_rank = {n: [s for s in sorted(going) if places[s] == n] for n in set(places)}
    step = [_ENDED] * len(places)
    own = by_rank.get(rank, [])
    for n in own:
        if answers[n].error is not None:
            raise answers[n].error
        step[n] = answers[n].tokens[-1]
    others = [n for n in range(mesh.world_size) if n != rank]
    if own and others:
        data = struct.pack(f"<{len(own)}q", *(step[n] for n in own))
        mesh.send(data, block=Control.TOKEN, plan=tag, to=others)
    sizes = {n: 8 * len(theirs) for n, theirs in by_rank.items() if n != rank and theirs}
    views = mesh.receive(sizes, block=Control.TOKEN, plan=tag) if sizes else {}
    for n, view in views.items():
        values = struct.unpack(f"<{len(by_rank[n])}q", view)
        for session, token in zip(by_rank[n], values, strict=True):
            step[session] = _valid(engine, token, n)
    return step


def _valid(engine: EngineParts, token: int, rank: int) -> int:
    vocabulary = int(engine.adapter.model.config.vocab_size)
    if not 0 <= token < vocabulary:
        raise WireError("token", f"0 to {vocabulary - 1}", token, rank)
    return token


def _send_tokens(engine: EngineParts, tokens: Sequence[int], tag: int) -> None:
    mesh = engine.mesh
    others = [n for n in range(mesh.world_size) if n != mesh.rank]
    if others:
        mesh.send(_SIZE.pack(len(tokens)), block=Control.ANSWER_SIZE, plan=tag, to=others)
        data = struct.pack(f"<{len(tokens)}q", *tokens)
        mesh.send(data, block=Control.ANSWER, plan=tag, to=others)


def _receive_tokens(engine: EngineParts, state: SessionState, tag: int) -> list[int]:
    mesh, owner = engine.mesh, state.owner
    view = mesh.receive({owner: _SIZE.size}, block=Control.ANSWER_SIZE, plan=tag)[owner]
    count, room = _SIZE.unpack(view)[0], _limit(engine) + 1 - state.tokens
    if count > room:
        raise WireError("number of new tokens", f"at most {room}", count, owner)
    view = mesh.receive({owner: 8 * count}, block=Control.ANSWER, plan=tag)[owner]
    return [_valid(engine, token, owner) for token in struct.unpack(f"<{count}q", view)]


def _limit(engine: EngineParts) -> int:
    return int(engine.adapter.model.config.max_position_embeddings)


def _check_rank(engine: EngineParts, rank: Any) -> int:
    return check_integer("rank", rank, 0, engine.mesh.world_size - 1)


def _check_ids(engine: EngineParts, ids: Any, past: int) -> Tensor:
    """Further tokens, as int64 [1, T]."""
    given = check_inputs(engine.adapter, {"input_ids": ids})["input_ids"]
    if given.shape[0] != 1:
        raise ValueError(f"ids: expected shape [1, T], got {list(given.shape)}")
    limit = _limit(engine)
    if past + given.shape[1] > limit:
        raise ValueError(
            f"ids: expected at most {limit - past} tokens behind {past}, as the model's limit is "
            f"{limit}, got {given.shape[1]}"
        )
    return given.long()

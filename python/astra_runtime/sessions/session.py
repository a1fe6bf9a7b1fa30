"""A session: one sequence that stays on all ranks, so that only its new tokens cost anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..call import CallState
from ..decoding import Choose, guarded
from ..engine_parts import EngineParts
from ..files import check_path, write_private
from ..inputs import check_bound, check_choice, check_function, check_integer, check_request
from ..turns import without_gradients
from .answers import decode_together, joint_tag, moved, receive_tokens, send_tokens, token_limit
from .checks import check_ids, check_rank, check_tokens, listed
from .codes import complete, confirm, make_ready, session_tag, synchronize
from .cut import cut
from .decoder import Asked
from .files import packed
from .passes import Between, prefill
from .running import Running
from .state import SessionState


@dataclass(frozen=True)
class AnswerFacts:
    """How the last answer of a session came about.

    Attributes:
        rank: who computed it.
        cached_tokens: of the tokens before it, those that were there before the last `append`.
        coded_tokens: those of which this rank had codes alone.
        fine_tokens: those of them, at the end, whose fine codes it had; 0 where the codebook has
            none, or the tokens that had some were cut off.
    """

    rank: int
    cached_tokens: int
    coded_tokens: int
    fine_tokens: int = 0


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
        self._append(ids, rank, request, within_ms, between)

    def _append(
        self,
        ids: Tensor,
        rank: int | None,
        request: int | None,
        within_ms: float | None,
        between: Between | None,
        beside: Sequence[float] = (),
    ) -> None:
        """`append`; `beside`: by rank, what it computes meanwhile, as of `cut`."""
        engine, state = self._engine, self._state
        engine._check_model()
        ids = check_ids(engine, ids, state.tokens)
        owner = state.owner if rank is None else check_rank(engine, rank)
        check_function("between", between)
        between = guarded("between", between, engine.rank)
        cached = state.tokens
        with self._call(request, within_ms, "append") as (running, work):
            work.ids = torch.cat([work.ids, ids], 1)
            tokens, past = work.tokens - work.read, work.read
            shares = cut(engine, past, tokens, owner, beside)
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
        deliver = guarded("on_token", on_token, self._engine.rank)

        def on_tokens(tokens: Tensor) -> None:
            if deliver is not None:
                deliver(tokens.clone())

        return generate_together([self], max_new_tokens, on_tokens=on_tokens, **options)[0]

    def finish(
        self,
        tokens: Sequence[int] | None = None,
        *,
        request: int | None = None,
        within_ms: float | None = None,
    ) -> Tensor:
        """After an answer that `owner` gave by a `Decoder`: every rank gets it.

        The owner sends the new tokens, and every rank what others lack so far.

        Args:
            tokens: on the owner, where it has decoded in another way: the new tokens. They are read
                with what is appended next, as nothing else is known of them.

        Returns:
            int64 [1, all tokens].
        """
        engine, foreign = self._engine, tokens
        if foreign is not None:
            foreign = check_tokens(engine, foreign, self._state.tokens)
        with self._call(request, within_ms, "finish") as (running, work):
            tag = session_tag(work, request, "finish")
            answer, read = self._state.answer, foreign is None
            new = foreign if foreign is not None else [] if answer is None else answer.tokens
            if engine.rank == work.owner:
                send_tokens(engine, new, read, tag)
            else:
                new, read = receive_tokens(engine, work, tag)
            self._remember(work, work.owner)
            work.answer = None
            if read:
                work.add_answer(new, work.owner)
            else:
                work.add_unread(new)
            synchronize(engine, work, running)
        return self.ids

    def fork(self) -> Self:
        """Another session with the same tokens, which goes on by itself. Nothing is copied."""
        engine = self._engine
        with engine._turn():
            state = self._state.fork()
            state.settle()
        other = type(self)(engine, state)
        other._cached = self._cached
        return other

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        length = check_integer("length", length, 0, self._state.tokens)
        with self._engine._turn():
            self._state.settle()
            self._state.truncate(length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to one file on rank 0's machine: whole, or not at all.

        It holds ids, codes (with dense exchange keys and values), and up to 64 last tokens exactly
        where rank 0 computed them; only its owner may read it. Rank 0 alone raises OSError.
        """
        check_path("path", path)
        with self._call(None, None, "save") as (running, work):
            synchronize(self._engine, work, running)
            if self._engine.rank == 0:
                complete(self._engine, work)
        if self._engine.rank == 0:
            write_private(path, packed(self._engine, self._state))

    def release(self, keep: Literal["exact", "codes"]) -> None:
        """Frees memory; what is freed is rebuilt from codes when it is wanted again.

        Args:
            keep: "exact": a rank's own tokens stay as it computed them, only those rebuilt from
                codes go. "codes": these go too, and answers rest on codes from then on. With dense
                exchange nothing is rebuilt, and nothing freed.
        """
        check_choice("keep", keep, ("exact", "codes"))
        with self._call(None, None, "release", keep) as (running, work):
            synchronize(self._engine, work, running)
            work.release(self._engine.rank, keep == "exact")

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """On the owner: of each block, keys (rotated) and values [1, Hkv, T, d] of all tokens read.

        They are views, valid until the session changes. For decoders other than `Decoder`.
        """
        engine, state = self._engine, self._state
        if engine.rank != state.owner:
            raise ValueError(f"session: expected rank {state.owner}, its owner, got {engine.rank}")
        with without_gradients():
            complete(engine, state)
        blocks = range(len(engine.adapter.blocks))
        return [state.cache.tensors(block, 0, state.read) for block in blocks]

    @property
    def logits(self) -> Tensor | None:
        """On the owner, after `append`: fp32 [1, V], behind the last token. Else None."""
        scores = self._state.scores
        return None if scores is None else scores.clone()

    @property
    def nbytes(self) -> int:
        """Bytes that the session takes on a rank at most, the same on every rank."""
        engine, state = self._engine, self._state
        adapter = engine.adapter
        width = 2 * adapter.num_key_value_heads * adapter.head_dim * adapter.dtype.itemsize
        codes = sum(engine.codec.payload_bytes(n, 1, 8) for n in range(len(adapter.blocks))) / 8
        coded = 0 if state.store is None else codes
        return int(state.tokens * (8 + len(adapter.blocks) * width + coded))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a session is one rank's part of all ranks' session, and cannot be copied or pickled: "
            "fork() gives another one, save() a file"
        )

    @contextlib.contextmanager
    def _call(
        self, request: int | None, within_ms: float | None, *what: object
    ) -> Iterator[tuple[Running, SessionState]]:
        """One call of the mesh, on a fork of the session's state that is kept if it succeeds."""
        with one_call(self._engine, request, within_ms) as running:
            work = self._state.fork()
            if what != ("finish",):
                work.settle()
            yield running, work
            confirm(self._engine, running, session_tag(work, *what))
            if what == ("finish",):
                make_ready(self._engine, work)
        self._state = work

    def _remember(self, state: SessionState, rank: int) -> None:
        coded = 0 if state.store is None else state.read - state.num_exact(rank)
        self.answered = AnswerFacts(rank, self._cached, coded, state.num_fine(rank))


@contextlib.contextmanager
def one_call(
    engine: EngineParts, request: int | None, within_ms: float | None
) -> Iterator[Running]:
    """A collective call that ends on all ranks alike."""
    request, within_ms = check_request(request), check_bound(within_ms)
    with without_gradients(), engine._turn():
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
            ended. What it raises ends this call with CallEnded, on every rank.
        max_new_tokens, eos_token_id, request, within_ms: as of `Engine.generate`.

    Returns:
        int64 [1, all tokens] of each session.

    Example:
        forks = [session.fork() for _ in range(mesh.world_size)]
        answers = generate_together(forks, ranks=range(mesh.world_size), choose=samplers)
    """
    sessions = listed("sessions", sessions)
    engine, places, asked = _check_together(
        sessions, max_new_tokens, ranks, eos_token_id, choose, on_tokens
    )
    with one_call(engine, request, within_ms) as running:
        works = moved(engine, [session._state for session in sessions], places, running)
        deliver = guarded("on_tokens", on_tokens, engine.rank)
        tokens = decode_together(engine, works, places, asked, deliver, request, running)
        for session, work, place, new in zip(sessions, works, places, tokens, strict=True):
            session._remember(work, place)
            work.add_answer(new, place)
            synchronize(engine, work, running)
        confirm(engine, running, joint_tag(works, request))
        if len(works) == 1:
            make_ready(engine, works[0])
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
    if not all(isinstance(session, Session) for session in sessions):
        raise TypeError(f"sessions: expected sessions, got {sessions!r:.60}")
    if not sessions or len({id(session) for session in sessions}) < len(sessions):
        raise ValueError(f"sessions: expected at least one, all different, got {len(sessions)}")
    engine = sessions[0]._engine
    if any(session._engine is not engine for session in sessions):
        raise ValueError("sessions: expected those of one engine, got several engines'")
    engine._check_model()
    check_function("on_tokens", on_tokens)
    owners = [session.owner for session in sessions]
    places = owners
    if ranks is not None:
        places = [check_rank(engine, rank) for rank in listed("ranks", ranks)]
    choices = [None] * len(sessions) if choose is None else listed("choose", choose)
    for name, given in (("ranks", places), ("choose", choices)):
        if len(given) != len(sessions):
            raise ValueError(f"{name}: expected {len(sessions)}, one a session, got {len(given)}")
    asked = [Asked.of(engine, max_new_tokens, eos_token_id, choice) for choice in choices]
    for session, options in zip(sessions, asked, strict=True):
        options.check_room(len(session), token_limit(engine))
    return engine, places, asked

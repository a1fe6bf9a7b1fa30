"""What crosses the mesh while sessions are answered: next tokens, or all of them at the end."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..control import Control
from ..engine_parts import EngineParts
from ..errors import WireError, anew
from ..models import vocabulary_of
from .codes import complete, session_tag, synchronize
from .decoder import Asked, Decoder
from .running import Running
from .state import SessionState

_SIZE = struct.Struct("<Q?")  # number of tokens, and whether all but the last were read
_ENDED = -1  # stands for the next token of a session that has ended


def moved(
    engine: EngineParts,
    states: Sequence[SessionState],
    places: Sequence[int],
    running: Running,
) -> list[SessionState]:
    """Forks of `states`; each rank in `places` gets all that it needs to go on with its own.

    The others do what that takes. Sessions that begin alike, such as forks of one prefix, receive
    the codes that they lack once, and a rank rebuilds what these stand for once.
    """
    alike: dict[tuple[int, str], SessionState] = {}
    keys = [(session_tag(state), str(state.exact)) for state in states]
    for key, state, place in zip(keys, states, places, strict=True):
        if key not in alike:
            alike[key] = state.fork()
            alike[key].settle()
        if place != state.owner and alike[key].pending:
            synchronize(engine, alike[key], running)
    works = []
    for key, place in zip(keys, places, strict=True):
        if engine.rank == place:
            complete(engine, alike[key])
        work = alike[key].fork()
        if place != work.owner:
            work.fresh, work.scores = False, None
        works.append(work)
    return works


def decode_together(
    engine: EngineParts,
    works: Sequence[SessionState],
    places: Sequence[int],
    asked: Sequence[Asked],
    on_tokens: Callable[[Tensor], None] | None,
    request: int | None,
    running: Running,
) -> list[list[int]]:
    """Step by step, every rank gets every session's next token; the tokens of each."""
    rank, mesh = engine.rank, engine.mesh
    limits = [(each.max_new_tokens, each.ends) for each in asked]
    tag = joint_tag(works, request, limits, places)
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


def joint_tag(works: Sequence[SessionState], *what: object) -> int:
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
            raise anew(answers[n].error)
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
    vocabulary = vocabulary_of(engine.adapter.model)
    if not 0 <= token < vocabulary:
        raise WireError("token", f"0 to {vocabulary - 1}", token, rank)
    return token


def send_tokens(engine: EngineParts, tokens: Sequence[int], read: bool, tag: int) -> None:
    mesh = engine.mesh
    others = [n for n in range(mesh.world_size) if n != mesh.rank]
    if others:
        mesh.send(_SIZE.pack(len(tokens), read), block=Control.ANSWER_SIZE, plan=tag, to=others)
        data = struct.pack(f"<{len(tokens)}q", *tokens)
        mesh.send(data, block=Control.ANSWER, plan=tag, to=others)


def receive_tokens(engine: EngineParts, state: SessionState, tag: int) -> tuple[list[int], bool]:
    mesh, owner = engine.mesh, state.owner
    view = mesh.receive({owner: _SIZE.size}, block=Control.ANSWER_SIZE, plan=tag)[owner]
    (count, read), room = _SIZE.unpack(view), token_limit(engine) + 1 - state.tokens
    if count > room:
        raise WireError("number of new tokens", f"at most {room}", count, owner)
    view = mesh.receive({owner: 8 * count}, block=Control.ANSWER, plan=tag)[owner]
    tokens = [_valid(engine, token, owner) for token in struct.unpack(f"<{count}q", view)]
    return tokens, read


def token_limit(engine: EngineParts) -> int:
    return int(engine.adapter.model.config.max_position_embeddings)

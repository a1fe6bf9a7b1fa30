"""A session for ranks that have lost it, from one that has it."""

from __future__ import annotations

import json
from typing import Any

from ..control import Control
from ..engine_parts import EngineParts
from ..errors import SessionRefused
from ..transport import peers_of
from .codes import complete
from .files import broadcast, packed, restored, tail_start
from .state import Fine, SessionState


def share(
    engine: EngineParts, state: SessionState | None, new: SessionState, source: int, tag: int
) -> SessionState:
    """`state`, or `new` filled from what `source` has; the same ledger on all ranks."""
    having = _who_says_yes(engine, state is not None, tag)
    if source not in having:
        raise SessionRefused(engine.rank, f"rank {source} has no session to share")
    if state is not None and state.pending:
        state.truncate(state.coded)
    data = None
    if engine.rank == source:
        assert state is not None
        complete(engine, state)
        ledger = json.dumps(
            {"exact": state.exact, "owner": state.owner, "fine": _fine_to_json(state.fine)}
        )
        data = packed(engine, state, {"ledger": ledger})
    data = broadcast(engine, data, source, tag)
    try:
        facts = restored(engine, new, data)
    except ValueError as error:
        raise SessionRefused(engine.rank, f"the session of rank {source}: {error}") from error
    if state is not None and not (state.read == new.read and state.ids.equal(new.ids)):
        raise SessionRefused(engine.rank, f"its session is another one than that of rank {source}")
    _who_says_yes(engine, True, tag)  # nobody goes on where another rank refuses
    ledger = json.loads(facts["ledger"])
    result = new if state is None else state
    result.exact = [[(a, b) for a, b in held] for held in ledger["exact"]]
    result.owner, result.fine = ledger["owner"], _fine_from_json(ledger["fine"])
    start = tail_start(result, source)
    lost = set(range(result.world_size)) - having
    for rank in sorted(lost):
        result.exact[rank] = []
        result.add_sinks(rank, min(result.prefix, result.read))
        result.add_exact(rank, 0 if result.store is None else start, result.read)
    if result.owner in lost:
        result.owner = source
        result.fresh, result.scores = False, None
    return result


def _fine_to_json(fine: Fine | None) -> list[Any] | None:
    """`fine` as JSON has it, for `_fine_from_json`; these codes are in no file of a session."""
    if fine is None:
        return None
    return [fine.start, fine.stop, [payload.hex() for payload in fine.payloads]]


def _fine_from_json(data: list[Any] | None) -> Fine | None:
    if data is None:
        return None
    start, stop, payloads = data
    return Fine(start, stop, [bytes.fromhex(payload) for payload in payloads])


def _who_says_yes(engine: EngineParts, yes: bool, tag: int) -> set[int]:
    """The ranks that say yes, when all have said something."""
    mesh, peers = engine.mesh, peers_of(engine.mesh)
    if peers:
        mesh.send(bytes([yes]), block=Control.SESSION_SIZE, plan=tag, to=peers)
    views = mesh.receive(dict.fromkeys(peers, 1), block=Control.SESSION_SIZE, plan=tag)
    return {rank for rank, view in views.items() if view[0]} | ({engine.rank} if yes else set())

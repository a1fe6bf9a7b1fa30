"""Codes of a session's tokens: made from keys and values, exchanged, and read again."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import wire
from ..codes.base import Payload
from ..codes.packed import PackedCodes
from ..control import Control
from ..engine_parts import EngineParts
from ..errors import NotFinite
from ..inputs import all_finite
from ..trace import stage
from ..transport import peers_of
from .passes import read_tokens, whole
from .running import Running
from .state import Fine, SessionState, Span


def synchronize(engine: EngineParts, state: SessionState, running: Running) -> None:
    """Every rank receives the codes that it lacks; collective.

    What a rank has not coded yet, it codes from its keys and values.
    """
    rank, tag = engine.rank, session_tag(state)
    for span in state.pending:
        lacking = len(span.known) < state.world_size or state.store is not None
        if span.source == rank and lacking and (span.start, span.stop) not in state.pieces:
            fine = _num_fine(engine, state, span)
            state.pieces[span.start, span.stop] = encode(engine, state, span.start, span.stop, fine)
    for peer in range(state.world_size):
        parts = [state.pieces[s.start, s.stop] for s in _lacking(state, peer, rank)]
        data = b"".join(part for payloads in parts for part in payloads)
        if data and peer != rank:
            with stage("send"):
                engine.mesh.send(data, block=Control.CODES, plan=tag, to=[peer])
    _receive(engine, state, running, tag)
    _file(engine, state)


def _lacking(state: SessionState, peer: int, source: int) -> list[Span]:
    return [s for s in state.pending if s.source == source and peer not in s.known]


def most_lacking(engine: EngineParts, state: SessionState) -> int:
    """Bytes that `synchronize` would send to the rank that lacks most, the same on every rank."""
    sizes = {span: sum(map(sum, _span_sizes(engine, state, span))) for span in state.pending}
    return max(
        sum(size for span, size in sizes.items() if rank not in span.known)
        for rank in range(state.world_size)
    )


def _num_fine(engine: EngineParts, state: SessionState, span: Span) -> int:
    """How many of the span's last tokens get fine codes: of those at the session's end, which
    nobody but their source has."""
    if span.stop < state.read or len(span.known) > 1:
        return 0
    last = whole(span.stop - span.start).fine_tokens(0, engine.codec.fine_tokens)
    return last.stop - last.start


def _sizes(engine: EngineParts, tokens: int, num_fine: int) -> list[tuple[int, int]]:
    """Bytes of a payload and of the fine codes behind it, by block."""
    codec, sizes = engine.codec, []
    for block in range(len(engine.adapter.blocks)):
        size = codec.payload_bytes(block, 1, tokens)
        sizes.append((size, codec.fine_bytes(block, 1, num_fine) if size else 0))
    return sizes


def _span_sizes(engine: EngineParts, state: SessionState, span: Span) -> list[tuple[int, int]]:
    return _sizes(engine, span.stop - span.start, _num_fine(engine, state, span))


def _receive(engine: EngineParts, state: SessionState, running: Running, tag: int) -> None:
    rank = engine.rank
    awaited = {source: _lacking(state, rank, source) for source in range(state.world_size)}
    sizes = {
        n: sum(sum(map(sum, _span_sizes(engine, state, span))) for span in spans)
        for n, spans in awaited.items()
        if n != rank
    }
    sizes = {n: size for n, size in sizes.items() if size}
    running.check_running()
    engine.mesh.check_cancelled()
    if not sizes:
        return
    with stage("wait"):
        views = engine.mesh.receive(sizes, block=Control.CODES, plan=tag)
    for source, view in views.items():
        start = 0
        for span in awaited[source]:
            payloads = []
            for size in map(sum, _span_sizes(engine, state, span)):
                payloads.append(bytes(view[start : start + size]))
                start += size
            state.pieces[span.start, span.stop] = payloads


def _file(engine: EngineParts, state: SessionState) -> None:
    """Puts what is pending in its place, the codes or, with dense exchange, keys and values."""
    for span in state.pending:
        payloads = state.pieces.get((span.start, span.stop))
        if state.store is None:
            if payloads is not None and span.source != engine.rank:
                fill = decode(engine, state.ids, span.start, span.stop, payloads)
                _append(state, span.start, fill)
            continue
        sizes = _span_sizes(engine, state, span)
        payloads = payloads or [b""] * len(sizes)  # of blocks without any codes nothing came
        for block, (store, payload) in enumerate(zip(state.store, payloads, strict=True)):
            coarse = payload[: sizes[block][0]]
            _check(engine, block, coarse, span.stop - span.start)
            store.append_packed(coarse, span.stop - span.start)
        if count := _num_fine(engine, state, span):
            fine = [payload[size:] for payload, (size, _) in zip(payloads, sizes, strict=True)]
            state.fine = Fine(span.stop - count, span.stop, fine)
    state.pending, state.pieces = [], {}


def _check(engine: EngineParts, block: int, payload: bytes, tokens: int) -> None:
    """Raises WireError where another rank's codes are none."""
    codec = engine.codec
    assert isinstance(codec, PackedCodes)
    count = tokens * len(codec.tables[block])
    wire.check_codes(payload, codec.bits, codec.codewords, count)


def _append(state: SessionState, start: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Keys and values of tokens from `start` on, of which the cache may hold the first."""
    held = state.cache.length - start
    assert held >= 0, f"keys and values end before token {start}"
    for block, (key, value) in enumerate(pairs):
        state.cache.append(block, key[:, :, held:], value[:, :, held:])


def encode(
    engine: EngineParts, state: SessionState, start: int, stop: int, num_fine: int = 0
) -> list[bytes]:
    """Payloads of tokens that this rank has computed, one a block; behind each the fine codes of
    the last `num_fine` of them, all that the codec makes fine, or none."""
    adapter, tokens = engine.adapter, stop - start
    inputs = _window(state.ids, start, stop)
    codec, rope = engine.codec.begin(inputs, whole(tokens), 0), adapter.rope(inputs["position_ids"])
    payloads = []
    for block, sizes in enumerate(_sizes(engine, tokens, num_fine)):
        key, value = state.cache.tensors(block, start, stop)
        if not bool(all_finite(key, value)):
            raise NotFinite(engine.rank, f"its tokens hold NaN or infinity in block {block}")
        out = bytearray(sum(sizes))
        if out:
            with stage("encode", block):
                pending = codec.encode(block, (key, value), rope, memoryview(out))
                if pending is not None:
                    pending()
        payloads.append(bytes(out))
    return payloads


def decode(
    engine: EngineParts,
    ids: Tensor,
    start: int,
    stop: int,
    payloads: Sequence[bytes],
    fine: Fine | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys (rotated) and values of tokens, by block, that these payloads stand for; `fine` refines
    the last of them."""
    adapter, tokens = engine.adapter, stop - start
    inputs = _window(ids, start, stop)
    codec, rope = engine.codec.begin(inputs, whole(tokens), 1), adapter.rope(inputs["position_ids"])
    pairs = []
    for block, data in enumerate(payloads):
        payload = Payload(memoryview(bytearray(data)), tokens, tokens)
        if fine is not None and fine.payloads[block]:
            more = memoryview(bytearray(fine.payloads[block]))
            payload = replace(payload, fine=more, num_fine=fine.stop - fine.start)
        with stage("unpack", block):
            remote = codec.decode(block, [payload], 1, rope)
            pairs.append(codec.tensors(block, remote, rope))
    return pairs


def _window(ids: Tensor, start: int, stop: int) -> dict[str, Any]:
    positions = torch.arange(start, stop, device=ids.device)[None]
    return {"input_ids": ids[:, start:stop], "position_ids": positions}


def complete(engine: EngineParts, state: SessionState) -> None:
    """This rank gets keys and values of all tokens whose codes it has, and of the sinks."""
    sinks = min(state.prefix, state.read)
    if state.cache.length < sinks:
        read_tokens(engine, [state.cache], [state.ids[:, state.cache.length : sinks]])
    while state.store is not None and state.cache.length < state.coded:
        start, stop = state.cache.length, state.coded
        ahead = [piece for piece in state.held if piece[1] > start]
        if ahead and ahead[0][0] <= start:
            _append(state, ahead[0][0], ahead[0][2])
            continue
        fine = state.fine if state.fine is not None and start < state.fine.stop else None
        ends = [stop, *(piece[0] for piece in ahead), *([] if fine is None else [fine.stop])]
        stop = min(ends)
        if fine is not None and stop <= fine.start:
            fine = None  # these tokens come before
        # fine codes are read whole, also where some of their tokens are there already or exact
        first, last = (start, stop) if fine is None else (min(start, fine.start), fine.stop)
        payloads = [
            store.packed(first - state.prefix, last - state.prefix) for store in state.store
        ]
        pairs = decode(engine, state.ids, first, last, payloads, fine)
        count = stop - first
        _append(state, first, [(key[:, :, :count], value[:, :, :count]) for key, value in pairs])
    state.held = [piece for piece in state.held if piece[1] > state.cache.length]


def make_ready(engine: EngineParts, state: SessionState) -> None:
    """After an answer: a rank that did not give it gets keys and values of all tokens, too, while
    nobody waits for it, so that the next question can be asked of it as well.

    Not where memory was asked for: then what is freed is rebuilt when it is wanted.
    """
    if engine.rank != state.owner and not state.is_lean:
        complete(engine, state)


def confirm(engine: EngineParts, running: Running, tag: int) -> None:
    """Every rank has done its part of the call, under the same tag; collective.

    Ranks that only send would otherwise keep a result that another rank then refuses.
    """
    running.check_running()
    mesh, peers = engine.mesh, peers_of(engine.mesh)
    if not peers:
        return
    mesh.send(b"\1", block=Control.DONE, plan=tag, to=peers)
    with stage("wait"):
        mesh.receive(dict.fromkeys(peers, 1), block=Control.DONE, plan=tag)


def session_tag(state: SessionState, *what: object) -> int:
    """32 bits that name the session's tokens, who has read them, and `what` is done."""
    pending = [(s.start, s.stop, s.source, sorted(s.known)) for s in state.pending]
    named = (state.read, state.owner, state.fresh, pending, what)
    ids = state.ids.cpu().contiguous().numpy().tobytes()
    return zlib.crc32(ids, zlib.crc32(repr(named).encode()))

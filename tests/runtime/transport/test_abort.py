"""One rank fails, and all say so: the same cause, at once, whoever noticed it first."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from astra_runtime import Engine, wire
from astra_runtime.errors import (
    AstraError,
    DeadlineExceeded,
    HandshakeRefused,
    InvalidChoice,
    PeerLost,
    WireError,
)
from astra_runtime.transport import Mesh, abort, local_mesh
from astra_runtime.wire import FIELDS_SIZE, HEADER_SIZE

from ..models import inputs_for, tiny
from ..ranks import MAKERS, PLAN, as_ranks, send_blocks, together
from .test_tcp import frame_bytes, raw_peer

TCP = [name for name in ("tcp", "tls", "paced") if name in MAKERS]
CAUSES: list[AstraError] = [
    PeerLost(3, 7, "it closed the connection"),
    PeerLost(1, None, ""),
    DeadlineExceeded(2, 5, 0.25, (2, 3)),
    WireError("sequence", 4, 5, 1),
    WireError("code", "below 32", 40),
    HandshakeRefused("rank 1 has codebook ab, rank 0 has cd"),
]


def abort_bytes(error: BaseException, sequence: int, source: int = 0, block: int = 4) -> bytes:
    return bytes(abort.abort_frame(error, sequence=sequence, source=source, block=block))


@pytest.mark.parametrize("error", CAUSES, ids=lambda e: type(e).__name__)
def test_errors_survive_the_wire(error: AstraError) -> None:
    data = abort_bytes(error, 9)
    assert len(data) == HEADER_SIZE + FIELDS_SIZE
    assert abort.is_abort(data, 0)
    assert not abort.is_abort(data, 1)
    found = abort.decode_error(data[HEADER_SIZE:], 0, 1)
    assert type(found) is type(error)
    assert str(found) == str(error if error.args[1:2] != (None,) else PeerLost(1, 1, ""))


def test_other_errors_are_the_loss_of_their_rank() -> None:
    data = abort_bytes(ValueError("no\x1b[31m " + 5000 * "ä"), 0, source=2)
    found = abort.decode_error(data[HEADER_SIZE:], 2, None)
    assert isinstance(found, PeerLost)
    assert (found.rank, found.block) == (2, 4)
    assert found.detail.startswith("ValueError: no")
    assert found.detail.isprintable()
    assert str(abort.decode_error(abort_bytes(KeyboardInterrupt(), 0)[HEADER_SIZE:], 0, None)) == (
        "rank 0 was lost at block 4: KeyboardInterrupt"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"error": "PeerLost"},
        {"error": "Nonsense", "rank": "1"},
        {"error": "PeerLost", "rank": "x"},
    ],
)
def test_an_abort_that_says_nothing_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(WireError, match="rank 3 sent a wrong abort"):
        abort.decode_error(wire.encode_fields(fields), 3, None)


@pytest.mark.parametrize("piece", [1, 15, 16, 17, 1000, 5000])
@pytest.mark.parametrize("size", [0, 8, 4000])
def test_an_abort_is_read_in_place_of_a_frame(piece: int, size: int) -> None:
    """Whatever was expected, and in whatever pieces it comes."""
    data = abort_bytes(DeadlineExceeded(2, 5, 0.25), 0)
    with raw_peer() as (mesh, peer):

        def talk() -> None:
            for start in range(0, len(data), piece):
                peer.sendall(data[start : start + piece])
            peer.close()

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(DeadlineExceeded, match="rank 2 sent nothing within 0.25 s at block 5"):
            mesh.receive({0: size}, block=0, plan=PLAN)
        thread.join()


@pytest.mark.parametrize("early", [b"", frame_bytes(b"early", 0, 9, 2)])
def test_an_abort_is_found_behind_frames_that_came_early(early: bytes) -> None:
    with raw_peer(world_size=3) as (mesh, peers):
        peers[1].sendall(early + abort_bytes(PeerLost(0, 3, "gone"), 1, source=2))
        peers[1].shutdown(socket.SHUT_WR)
        with pytest.raises(PeerLost, match="rank 0 was lost at block 3: gone"):
            mesh.receive({0: 8}, block=4, plan=PLAN)


def test_half_an_abort_is_a_lost_peer() -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(abort_bytes(PeerLost(2, 3), 0)[:1000])
        peer.close()
        with pytest.raises(PeerLost, match="rank 0 was lost at block 1: it closed"):
            mesh.receive({0: 8}, block=1, plan=PLAN)


PROMPT = 20.0  # seconds: less than any deadline here, and enough for a busy machine


def cut(mesh: Any) -> None:
    """What the kernel does for a process that was killed."""
    for peer in getattr(mesh, "_mesh", mesh)._peers.values():
        peer.sock.shutdown(socket.SHUT_RDWR)


def causes(make: Callable[..., list[Mesh]], fault: Callable[[Mesh], None], block: int = 3) -> Any:
    """What three ranks say, and when, after rank 1 of four has met `fault` at `block`."""
    when = [0.0]

    def work(mesh: Mesh) -> Any:
        others = [n for n in range(4) if n != mesh.rank]
        try:
            for number in range(100):
                if mesh.rank == 1 and number == block:
                    when[0] = time.monotonic()
                    fault(mesh)
                mesh.send(b"x" * 200, block=number, plan=PLAN, to=others)
                mesh.receive(dict.fromkeys(others, 200), block=number, plan=PLAN)
        except AstraError as error:
            seconds = time.monotonic()
            mesh.abort(error)
            return error, seconds
        raise AssertionError("no rank failed")

    meshes = make(4, timeout=2 * PROMPT)
    found = together([lambda mesh=mesh: work(mesh) for mesh in meshes], errors_too=True)
    for mesh in meshes:
        mesh.close()
    return [(found[n][0], found[n][1] - when[0]) for n in (0, 2, 3)]


@pytest.mark.parametrize("maker", TCP)
def test_every_survivor_names_the_rank_that_was_cut_off(maker: str) -> None:
    for _ in range(5):
        for error, seconds in causes(MAKERS[maker], cut):
            assert isinstance(error, PeerLost)
            assert error.rank == 1
            assert seconds < PROMPT


@pytest.mark.parametrize("maker", TCP)
def test_an_error_of_one_s_own_is_told_to_all(maker: str) -> None:
    def fail(mesh: Mesh) -> None:
        mesh.abort(ZeroDivisionError("by zero"))

    for error, seconds in causes(MAKERS[maker], fail):
        assert str(error) == "rank 1 was lost at block 2: ZeroDivisionError: by zero"
        assert seconds < PROMPT


def test_every_rank_names_the_one_that_stopped() -> None:
    sent, over = (threading.Barrier(count, timeout=60) for count in (3, 4))

    def work(mesh: Mesh) -> Any:
        others = [n for n in range(4) if n != mesh.rank]
        with mesh:
            if mesh.rank == 2:
                over.wait()
                return None
            mesh.send(b"x", block=0, plan=PLAN, to=others)
            sent.wait()
            with pytest.raises(DeadlineExceeded) as caught:
                mesh.receive(dict.fromkeys(others, 1), block=0, plan=PLAN, timeout=0.4)
            mesh.abort(caught.value)
            over.wait()
            return caught.value

    calls = [lambda mesh=mesh: work(mesh) for mesh in local_mesh(4)]
    found = together(calls, errors_too=True)
    assert [(e.rank, e.block, e.seconds) for e in found if e] == 3 * [(2, 0, 0.4)]


def test_saying_why_never_takes_long() -> None:
    """One peer is gone, one does not read and has a full buffer."""
    with raw_peer(world_size=3, timeout=60) as (mesh, peers):
        mesh.send(bytes(30 << 20), block=0, plan=PLAN, to=[0])
        peers[1].close()
        start = time.monotonic()
        mesh.abort(ValueError("x"))
        assert time.monotonic() - start < 30  # 0.2 on a free machine; every other wait is 60
        mesh.abort(ValueError("again"))
        with pytest.raises(AstraError, match="the mesh is closed"):
            mesh.receive({0: 1}, block=0, plan=PLAN)


def test_sending_to_a_rank_that_aborted_gives_its_cause() -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(abort_bytes(PeerLost(3, 2, "killed"), 0))
        mesh.send(b"unread by the peer", block=0, plan=PLAN, to=[0])
        time.sleep(0.05)
        peer.close()  # with unread bytes: a reset
        with pytest.raises(PeerLost, match="rank 3 was lost at block 2: killed"):
            send_blocks(mesh, b"x", to=0)


def test_a_failing_model_fails_on_every_rank() -> None:
    """Rank 1's second block raises; with blocks of others on their way."""
    inputs = inputs_for("bert", 12)
    models = [tiny("bert") for _ in range(3)]
    models[1].encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)

    def work(mesh: Mesh) -> str:
        with Engine(models[mesh.rank], None, mesh) as engine:
            kind = ZeroDivisionError if mesh.rank == 1 else PeerLost
            with pytest.raises(kind) as caught:
                engine(**inputs)
            return str(caught.value)

    found = as_ranks(local_mesh(3), work)
    assert found[0] == found[2] == "rank 1 was lost at block 0: ZeroDivisionError: division by zero"


def test_a_deadline_by_block_sees_who_stopped() -> None:
    """Of several ranks that are late the first is named, so here it is whoever stopped."""
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    noticed = threading.Barrier(3, timeout=60)

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh, deadline_ms=250) as engine:
            if mesh.rank == 0:
                noticed.wait()  # it leaves when both others have their error, not before
                return None
            start = time.monotonic()
            with pytest.raises(DeadlineExceeded) as caught:
                engine(**inputs)
            seconds = time.monotonic() - start
            noticed.wait()
            return caught.value, seconds

    _, (first, waited), (last, waited_too) = as_ranks(local_mesh(3, timeout=2 * PROMPT), work)
    assert (first.rank, first.block) == (last.rank, last.block) == (0, 0)
    assert first.seconds == last.seconds == 0.25
    # whoever began later may have heard of it from the other
    assert 0.24 < max(waited, waited_too) < PROMPT


def test_a_choice_that_fails_ends_its_call_everywhere_and_nothing_else() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)

    def choose(ids: Any, scores: Any) -> Any:
        raise RuntimeError("no choice")

    def work(mesh: Mesh) -> str:
        with Engine(model, None, mesh) as engine:
            with pytest.raises(InvalidChoice) as caught:
                engine.generate(inputs["input_ids"], max_new_tokens=3, choose=choose)
            again = engine.generate(inputs["input_ids"], max_new_tokens=1)  # the mesh stays
            assert again.shape[-1] == 13
            return str(caught.value)

    words = "rank 1 ended the call: choose raised RuntimeError: no choice"
    assert as_ranks(local_mesh(2), work) == [words] * 2


def test_arguments_that_are_refused_end_nothing() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            with pytest.raises(ValueError, match="logits: expected"):
                engine(**inputs, logits="some")
            return engine(**inputs).logits

    one, two = as_ranks(local_mesh(2), work)
    assert torch.equal(one, two)

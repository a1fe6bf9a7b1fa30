"""What a TCP mesh makes of peers that die, leave, stall or forge; nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_runtime import errors, wire
from astra_runtime.transport import Mesh, local_mesh
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import Frame

from ..ranks import (
    PLAN,
    all_to_all,
    as_ranks,
    open_files,
    paced_mesh,
    send_blocks,
    together,
)


@contextlib.contextmanager
def raw_peer(*, timeout: float = 30.0, world_size: int = 2) -> Iterator[tuple[TcpMesh, Any]]:
    """Rank 1's mesh, and the bare sockets at which its peers would be (rank 0, 2, 3 ...)."""
    sockets, peers = {}, []
    for rank in [r for r in range(world_size) if r != 1]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            peers.append(socket.create_connection(server.getsockname()))
            sockets[rank], _ = server.accept()
            prepare(sockets[rank])
    mesh = TcpMesh(1, world_size, sockets, timeout=timeout)
    try:
        yield mesh, peers[0] if world_size == 2 else peers
    finally:
        for peer in peers:
            peer.close()
        mesh.close()


def frame_bytes(payload: bytes, sequence: int, block: int, source: int = 0) -> bytes:
    return bytes(Frame.of(payload).stamp(sequence, PLAN, block, source))


def test_a_wait_that_gets_more_time() -> None:
    """As often as it is given; what arrives meanwhile counts."""
    with raw_peer(timeout=0.01) as (mesh, peer):
        asked: list[tuple[tuple[int, ...], float]] = []

        def more_time(ranks: tuple[int, ...], waited: float) -> float:
            asked.append((ranks, waited))
            if len(asked) == 2:
                peer.sendall(frame_bytes(b"late", 0, 1))
            return 0.01 if len(asked) < 2 else 60.0

        mesh.more_time = more_time
        assert bytes(mesh.receive({0: 4}, block=1, plan=PLAN)[0]) == b"late"
        assert asked == [((0,), 0.01), ((0,), 0.02)]
        mesh.more_time = lambda ranks, waited: 0.0
        assert mesh.receive({0: 4}, block=2, plan=PLAN, partial=True) == {}
        with pytest.raises(errors.DeadlineExceeded):
            mesh.receive({0: 4}, block=3, plan=PLAN)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", [0, 7, 16, 20])
def test_a_peer_that_dies_within_a_frame_is_lost(end: Callable[[Any], None], sent: int) -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(frame_bytes(b"12345678", 0, 0)[:sent])
        end(peer)
        with pytest.raises(errors.PeerLost) as caught:
            mesh.receive({0: 8}, block=0, plan=PLAN)
        assert (caught.value.rank, caught.value.block) == (0, 0)


def test_a_peer_dies_during_the_wait() -> None:
    with raw_peer() as (mesh, peer):
        threading.Timer(0.1, peer.close).start()
        with pytest.raises(errors.PeerLost, match="rank 0 was lost at block 4"):
            mesh.receive({0: 8}, block=4, plan=PLAN)


@pytest.mark.parametrize("backlog", [b"", frame_bytes(b"early", 0, 9, 2)])
def test_a_dead_peer_is_noticed_although_another_is_awaited(backlog: bytes) -> None:
    with raw_peer(world_size=3) as (mesh, peers):
        peers[1].sendall(backlog)
        peers[1].close()
        with pytest.raises(errors.PeerLost, match="rank 2 was lost at block 4"):
            mesh.receive({0: 8}, block=4, plan=PLAN)


def test_a_peer_that_said_bye_is_not_lost_until_its_data_is_needed() -> None:
    with raw_peer(world_size=3) as (mesh, peers):
        peers[1].sendall(frame_bytes(b"early", 0, 1, 2) + bytes(wire.bye(1, 2)))
        peers[1].close()
        threading.Timer(0.1, peers[0].sendall, [frame_bytes(b"late", 0, 0)]).start()
        assert bytes(mesh.receive({0: 4}, block=0, plan=PLAN)[0]) == b"late"
        assert bytes(mesh.receive({2: 5}, block=1, plan=PLAN)[2]) == b"early"
        with pytest.raises(errors.PeerLost, match="rank 2 was lost at block 2: it had finished"):
            mesh.receive({2: 5}, block=2, plan=PLAN)


def test_a_bye_that_was_read_early_is_no_loss() -> None:
    """Looking for a CANCEL takes bytes from the connection; the peer's last ones may be among
    them."""
    ranks = local_mesh(3)
    ranks[0].close()
    deadline = time.monotonic() + 30
    while not ranks[1]._peers[0].unread and time.monotonic() < deadline:  # type: ignore[attr-defined]
        ranks[1].check_cancelled()
    late = {"block": 0, "plan": PLAN, "to": [1]}
    threading.Timer(0.2, ranks[2].send, [b"abc"], late).start()
    assert bytes(ranks[1].receive({2: 3}, block=0, plan=PLAN)[2]) == b"abc"
    for mesh in ranks[1:]:
        mesh.close()


def test_close_delivers_everything_and_says_bye() -> None:
    size = 12 << 20
    meshes = local_mesh(2)

    def leave() -> None:
        meshes[0].send(bytes(size), block=0, plan=PLAN, to=[1])
        meshes[0].close()

    def read() -> None:
        meshes[1].send(b"never read", block=0, plan=PLAN, to=[0])
        time.sleep(0.1)
        assert len(meshes[1].receive({0: size}, block=0, plan=PLAN)[0]) == size
        with pytest.raises(errors.PeerLost, match="said BYE"):
            meshes[1].receive({0: 1}, block=1, plan=PLAN)
        meshes[1].close()

    together([leave, read])


@pytest.mark.parametrize("fault", ["another plan", "another call", "late", "gone"])
def test_an_error_is_gone_once_it_was_handled(fault: str) -> None:
    """Without the collector: nothing that it passed through holds it."""
    here, there = local_mesh(2)
    if fault == "another call":
        there.begin()
    if fault.startswith("another"):
        there.send(b"abc", block=0, plan=PLAN + 1, to=[0])
    elif fault == "gone":
        there.close()

    def failing() -> Callable[[], object]:
        try:
            here.receive({1: 3}, block=0, plan=PLAN, timeout=0.01 if fault == "late" else None)
        except errors.AstraError as error:
            return weakref.ref(error)
        raise AssertionError("nothing was wrong")

    gc.disable()
    try:
        assert failing()() is None
    finally:
        gc.enable()
        here.close()
        there.close()


def test_a_rank_that_fails_looks_lost() -> None:
    meshes = local_mesh(2)
    with pytest.raises(ZeroDivisionError), meshes[0]:
        raise ZeroDivisionError
    with meshes[1], pytest.raises(errors.PeerLost, match="rank 0 was lost at block 0: Zero"):
        meshes[1].receive({0: 1}, block=0, plan=PLAN)


def test_sending_to_a_lost_peer_says_so() -> None:
    with raw_peer() as (mesh, peer):
        reset(peer)
        with pytest.raises(errors.PeerLost, match="rank 0 was lost at block"):
            send_blocks(mesh, b"x", to=0)


def test_one_byte_at_a_time_meets_the_deadline() -> None:
    with raw_peer(timeout=0.4) as (mesh, peer):
        stop = threading.Event()

        def trickle() -> None:
            for byte in frame_bytes(bytes(300), 0, 0):
                if stop.wait(0.2):  # a minute for all of them
                    return
                peer.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            mesh.receive({0: 300}, block=0, plan=PLAN)
        assert time.monotonic() - start < 15
        stop.set()
        thread.join()


def test_a_peer_that_never_reads_meets_the_deadline() -> None:
    with raw_peer(timeout=0.3) as (mesh, _peer), pytest.raises(errors.DeadlineExceeded):
        send_blocks(mesh, bytes(16 << 20), to=0)


@pytest.mark.parametrize(
    ("sequence", "source", "words"),
    [(1, 0, "sequence: expected 0, got 1"), (0, 2, "source: expected 0, got 2")],
)
def test_replay_and_forged_source_are_refused(sequence: int, source: int, words: str) -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(frame_bytes(b"1234", sequence, 0, source))
        with pytest.raises(errors.WireError, match=words):
            mesh.receive({0: 4}, block=0, plan=PLAN)


def test_a_repeated_frame_is_refused() -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(2 * frame_bytes(b"1234", 0, 0))
        mesh.receive({0: 4}, block=0, plan=PLAN)
        with pytest.raises(errors.WireError, match="sequence: expected 1, got 0"):
            mesh.receive({0: 4}, block=0, plan=PLAN)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 15), flip=st.integers(1, 255))
def test_mutated_headers_through_a_socket(position: int, flip: int) -> None:
    data = bytearray(frame_bytes(b"12345678", 0, 2))
    data[position] ^= flip
    with raw_peer() as (mesh, peer):
        peer.sendall(data)
        with pytest.raises(errors.WireError):
            mesh.receive({0: 8}, block=2, plan=PLAN)


def test_steady_state_keeps_memory_flat() -> None:
    def work(mesh: Mesh) -> int:
        other, frame = 1 - mesh.rank, mesh.buffer(4096)

        def exchange(blocks: int) -> None:
            for block in range(blocks):
                mesh.send(frame, block=block, plan=PLAN, to=[other])
                mesh.receive({other: 4096}, block=block, plan=PLAN)

        exchange(200)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        exchange(500)
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        grown = as_ranks(local_mesh(2), work)
    finally:
        tracemalloc.stop()
    assert max(grown) < 16_384


def test_threads_and_descriptors_are_given_back() -> None:
    threads, files = set(threading.enumerate()), open_files()
    for maker, world_size in ((local_mesh, 4), (paced_mesh, 3)):
        meshes = maker(world_size)
        opened = open_files() - files
        assert len(opened) > len(meshes)
        as_ranks(meshes, lambda mesh: all_to_all(mesh, 3, 100))
        assert not open_files() & opened
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)  # a link's thread has been told to end, and is not waited for
        assert not thread.is_alive()

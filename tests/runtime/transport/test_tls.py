"""Exchanges inside mutual TLS, and what is made of forged, replayed and cut records."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from astra_runtime import errors, wire
from astra_runtime.transport import Link, Mesh, connect
from astra_runtime.transport.credentials import Keys
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.stream import TlsStream
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import Frame

from ..ranks import PLAN, all_to_all, as_ranks, dial, free_ports, key_folder, tls_mesh, together

pytest.importorskip("cryptography")


def test_a_world_of_four() -> None:
    meshes = tls_mesh(4)
    assert all(isinstance(mesh, TcpMesh) and mesh.encrypted for mesh in meshes)
    handshake = meshes[1].stats
    assert min(handshake.bytes_sent_total, handshake.bytes_received_total) > 3 * 500
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 4, 70_001))


def test_one_thread_sends_while_another_reads() -> None:
    meshes = tls_mesh(2, link=Link(5000, 0.1))  # a link sends from a thread of its own
    assert all(mesh.encrypted for mesh in meshes)
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 6, 4 << 20))


def test_nothing_readable_crosses_the_wire() -> None:
    """A relay between two ranks sees neither the payload nor the header that it knows."""
    peers, keys = free_ports(2), key_folder()
    host, port = free_ports(1)[0].split(":")
    marker, seen = b"tokens that nobody may read", bytearray()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65_536):
                seen.extend(part)
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

    def relay(server: socket.socket) -> None:
        near, _ = server.accept()
        far = dial(peers[0])
        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join()
        near.close()
        far.close()

    def work(mesh: Mesh) -> None:
        mesh.send(marker, block=0, plan=PLAN, to=[1 - mesh.rank])
        assert bytes(mesh.receive({1 - mesh.rank: len(marker)}, block=0, plan=PLAN)[1 - mesh.rank])

    with socket.create_server((host, int(port))) as server:
        thread = threading.Thread(target=relay, args=(server,))
        thread.start()
        meshes = together(
            [
                lambda: connect(0, 2, peers, keys=keys),
                lambda: connect(1, 2, [f"{host}:{port}", peers[1]], keys=keys),
            ]
        )
        as_ranks(meshes, work)
        thread.join()
    assert len(seen) > 2000
    assert marker not in seen
    assert wire.MAGIC not in seen


@contextlib.contextmanager
def pair(timeout: float = 30.0) -> Iterator[tuple[TcpMesh, TlsStream]]:
    """Rank 1's mesh, and rank 0's end of the connection, whose socket the test may abuse."""
    ours = Keys(key_folder())
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for sock in (near, far):
        prepare(sock)
    attacker = TlsStream(near, ours.contexts(0).dialing, accepting=False)
    stream = TlsStream(far, ours.contexts(1).accepting, accepting=True)
    while not (attacker.handshake() & stream.handshake()):
        pass
    stream.trust()
    mesh = TcpMesh(1, 2, {0: stream}, timeout=timeout)
    try:
        yield mesh, attacker
    finally:
        near.close()
        mesh.close()


def sealed(stream: TlsStream, payload: bytes, sequence: int = 0, block: int = 0) -> bytearray:
    frame = Frame.of(payload).stamp(sequence, PLAN, block, 0)
    return bytearray(b"".join(stream.seal(frame)))


def test_a_sealed_frame_is_read() -> None:
    with pair() as (mesh, peer):
        peer.sock.sendall(sealed(peer, b"12345678"))
        assert bytes(mesh.receive({0: 8}, block=0, plan=PLAN)[0]) == b"12345678"


@pytest.mark.parametrize("seed", range(30))
def test_mutated_records_are_never_accepted(seed: int) -> None:
    draw = random.Random(seed)
    with pair() as (mesh, peer):
        data = sealed(peer, b"12345678")
        for _ in range(draw.choice([1, 1, 2, 5])):
            data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        peer.sock.sendall(data)
        peer.sock.close()
        with pytest.raises((errors.WireError, errors.PeerLost)):
            mesh.receive({0: 8}, block=0, plan=PLAN)


def test_a_forged_record_is_named() -> None:
    with pair() as (mesh, peer):
        data = sealed(peer, b"12345678")
        data[-1] ^= 1
        peer.sock.sendall(data)
        with pytest.raises(errors.WireError, match="rank 0 sent a wrong TLS record") as caught:
            mesh.receive({0: 8}, block=0, plan=PLAN)
        assert (caught.value.field, caught.value.rank) == ("TLS record", 0)


def test_replayed_and_left_out_records_are_refused() -> None:
    with pair() as (mesh, peer):
        data = sealed(peer, b"12345678")
        peer.sock.sendall(data + data)
        mesh.receive({0: 8}, block=0, plan=PLAN)
        with pytest.raises(errors.WireError, match="TLS record"):
            mesh.receive({0: 8}, block=0, plan=PLAN)
    with pair() as (mesh, peer):
        sealed(peer, b"12345678")  # lost on the way
        peer.sock.sendall(sealed(peer, b"12345678", 1, 1))
        with pytest.raises(errors.WireError, match="TLS record"):
            mesh.receive({0: 8}, block=0, plan=PLAN)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ((b"12345678", 1, 0), "sequence: expected 0, got 1"),
        ((b"12345678", 0, 1), "block: expected 0, got 1"),
        ((b"123456789", 0, 0), "length: expected 8, got 9"),
    ],
)
def test_a_peer_with_keys_still_has_to_send_the_right_frame(
    frame: tuple[bytes, int, int], words: str
) -> None:
    with pair() as (mesh, peer):
        peer.sock.sendall(sealed(peer, *frame))
        with pytest.raises(errors.WireError, match=words):
            mesh.receive({0: 8}, block=0, plan=PLAN)


@pytest.mark.parametrize("cut", [0, 3, 5, 30, -1])
def test_an_end_without_bye_is_a_loss(cut: int) -> None:
    with pair() as (mesh, peer):
        peer.sock.sendall(sealed(peer, b"12345678")[: cut or None] if cut else b"")
        peer.sock.close()
        with pytest.raises(errors.PeerLost, match="rank 0 was lost at block 0"):
            mesh.receive({0: 8}, block=0, plan=PLAN)


def test_one_byte_at_a_time_meets_the_deadline() -> None:
    with pair(timeout=0.4) as (mesh, peer):
        data, stop = sealed(peer, bytes(100)), threading.Event()

        def trickle() -> None:
            for byte in data:
                if stop.wait(0.2):
                    return
                peer.sock.send(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(errors.DeadlineExceeded):
            mesh.receive({0: 100}, block=0, plan=PLAN)
        stop.set()
        thread.join()


def test_what_a_look_for_cancel_has_read_of_a_large_frame_is_not_lost() -> None:
    """TLS has the rest of the frame in memory then, of which no event of the socket tells."""
    data = bytes(range(256)) * 160  # 40 KiB
    sent = threading.Event()

    def work(mesh: Mesh) -> None:
        mesh.begin()
        if mesh.rank == 0:
            mesh.send(data, block=0, plan=PLAN, to=[1])
            mesh.flush()
            sent.set()
            mesh.receive({1: 1}, block=1, plan=PLAN, timeout=60)
            return
        assert isinstance(mesh, TcpMesh)
        mesh.may_yield = False  # as where ranks outnumber cores: it waits for an event at once
        peer = mesh.connections[0]
        assert sent.wait(60)
        before = peer.stream.received
        mesh.check_cancelled()
        assert peer.stream.received - before > len(data)
        assert 0 < len(peer.unread) < len(data)
        assert bytes(mesh.receive({0: len(data)}, block=0, plan=PLAN, timeout=30)[0]) == data
        mesh.send(b"1", block=1, plan=PLAN, to=[0])

    as_ranks(tls_mesh(2), work)


@pytest.mark.parametrize("proper", [True, False], ids=["bye", "lost"])
def test_early_frames_and_the_end_while_another_is_awaited(proper: bool) -> None:
    """The end of rank 2 is seen while rank 0 is awaited; what it sent before stays readable."""
    meshes = tls_mesh(3)
    early = bytes(range(256)) * 400  # more than one record
    meshes[2].send(early, block=1, plan=PLAN, to=[1])
    meshes[2].send(b"tail", block=2, plan=PLAN, to=[1])

    def leave() -> None:
        if proper:
            meshes[2].close()
        else:
            meshes[2].__exit__(ValueError, None, None)

    leave()
    timer = threading.Timer(0.3, meshes[0].send, [b"late"], {"block": 0, "plan": PLAN, "to": [1]})
    timer.start()
    try:
        if proper:
            assert bytes(meshes[1].receive({0: 4}, block=0, plan=PLAN)[0]) == b"late"
            assert bytes(meshes[1].receive({2: len(early)}, block=1, plan=PLAN)[2]) == early
            assert bytes(meshes[1].receive({2: 4}, block=2, plan=PLAN)[2]) == b"tail"
            with pytest.raises(errors.PeerLost, match="had finished and said BYE"):
                meshes[1].receive({2: 4}, block=3, plan=PLAN)
        else:
            with pytest.raises(errors.PeerLost, match="rank 2 was lost at block 2: ValueError"):
                meshes[1].receive({0: 4}, block=0, plan=PLAN)
    finally:
        timer.join()
        for mesh in meshes:
            mesh.close()

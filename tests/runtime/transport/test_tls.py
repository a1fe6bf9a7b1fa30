"""Mutual TLS: who gets in, who is refused with which words on both sides, what a stranger costs."""

from __future__ import annotations

import contextlib
import datetime
import logging
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import astra_runtime.transport.certificates as keys_module
from astra_runtime import errors, wire
from astra_runtime.transport import Link, Mesh, connect, credentials, pending
from astra_runtime.transport.acceptor import LOGGED_REFUSALS, MAX_PENDING
from astra_runtime.transport.certificates import make_keys
from astra_runtime.transport.credentials import Keys
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.stream import UNTRUSTED_BYTES, TlsStream
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import Frame, Hello

from ..ranks import (
    PLAN,
    all_to_all,
    as_ranks,
    environment,
    free_ports,
    key_folder,
    open_files,
    tls_mesh,
    together,
)

pytest.importorskip("cryptography")

Peers = list[str]


def dial(address: str) -> socket.socket:
    host, port = address.split(":")
    for _ in range(500):
        try:
            return socket.create_connection((host, int(port)), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(4096):
            data += part
    return data


# --- exchanges


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


# --- refusals, told on both sides


def variant(tmp_path: Path, certificate: Path, authority: Path) -> Path:
    """One rank's folder that trusts another authority than the one that signed it."""
    folder = tmp_path / "variant"
    shutil.copytree(certificate, folder)
    shutil.copy(authority / "authority.pem", folder / "authority.pem")
    return folder


def expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Keys of rank 1 that ended years ago, and keys of rank 0 that would trust them otherwise."""

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2020, 1, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        patch.setattr(
            keys_module, "datetime", SimpleNamespace(**vars(datetime) | {"datetime": Past})
        )
        make_keys(tmp_path / "old", 2)
    old, trusting = tmp_path / "old" / "rank-1", tmp_path / "trusting"
    shutil.copytree(key_folder() / "rank-0", trusting)
    with open(trusting / "authority.pem", "a") as file:
        file.write((old / "authority.pem").read_text())
    shutil.copy(key_folder() / "authority.pem", old / "authority.pem")
    return trusting, old


def refuse_then_admit(
    keys: Path | None,
    caller: Callable[[Peers], Any],
    good: Path | None,
    caplog: pytest.LogCaptureFixture,
    **options: Any,
) -> tuple[str, Any]:
    """What rank 0 logged of a caller, and what that caller met; then the right rank 1 joins."""
    peers = free_ports(2)
    result: list[Any] = []

    def attempt() -> Mesh:
        try:
            result.append(caller(peers))
        except errors.AstraError as error:
            result.append(error)
        return connect(1, 2, peers, keys=good)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=keys, **options), attempt])
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))
    return caplog.text, result[0]


def as_rank_1(keys: Path | None, **options: Any) -> Callable[[Peers], Any]:
    return lambda peers: connect(1, 2, peers, keys=keys, **options)


def test_another_authority_is_refused_by_the_dialer(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = key_folder(), key_folder("theirs")
    said, met = refuse_then_admit(ours, as_rank_1(theirs), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "has a certificate of another authority" in met.reason
    assert "refused this rank's certificate: unknown authority" in said


def test_another_authority_is_refused_by_the_acceptor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = key_folder()
    forged = variant(tmp_path, key_folder("theirs") / "rank-1", ours)
    said, met = refuse_then_admit(ours, as_rank_1(forged), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate: unknown authority" in met.reason
    assert "has a certificate of another authority" in said


def test_a_certificate_that_signs_for_itself_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, alone = key_folder(), tmp_path / "alone"
    shutil.copytree(ours / "rank-1", alone)
    shutil.copy(key_folder("theirs") / "authority.pem", alone / "certificate.pem")
    shutil.copy(key_folder("theirs") / "authority.key", alone / "key.pem")
    said, met = refuse_then_admit(ours, as_rank_1(alone), ours, caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate" in met.reason
    assert "certificate" in said


def test_an_expired_certificate_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trusting, old = expired(tmp_path, monkeypatch)
    monkeypatch.setattr(credentials, "_check_dates", lambda *_: None)  # as by a clock that is off
    said, met = refuse_then_admit(trusting, as_rank_1(old), key_folder(), caplog)
    assert isinstance(met, errors.HandshakeRefused)
    assert "refused this rank's certificate: it has expired" in met.reason
    assert "certificate has expired" in said


def test_the_certificate_of_another_rank_is_refused_by_the_acceptor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = key_folder()
    said, met = refuse_then_admit(ours, as_rank_1(ours / "rank-2"), ours, caplog)
    reason = "the certificate of rank 2 was shown for rank 1"
    assert isinstance(met, errors.HandshakeRefused)
    assert reason in met.reason
    assert reason in said


@pytest.mark.parametrize("rank", [0, 2])
def test_another_rank_may_not_stand_in(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever holds one rank's keys can be no other rank, not even with the right HELLO."""
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        context = Keys(ours / f"rank-{rank}").contexts(rank).dialing
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0).encode())
            return read_all(tls)

    said, reply = refuse_then_admit(ours, caller, ours, caplog)
    reason = f"the certificate of rank {rank} was shown for rank 1"
    assert reason in said
    assert reply[wire.HELLO_SIZE :].decode() == reason


def test_the_certificate_of_another_rank_is_refused_by_the_dialer() -> None:
    ours, peers = key_folder(), free_ports(2)
    results = together(
        [
            lambda: connect(0, 2, peers, keys=ours / "rank-3", connect_timeout=6),
            lambda: connect(1, 2, peers, keys=ours, connect_timeout=30),
        ],
        errors_too=True,
    )
    assert isinstance(results[1], errors.HandshakeRefused)
    # the acceptor waits on, since anybody could have called, and tells it at its deadline
    assert isinstance(results[0], errors.PeersRefused)
    assert isinstance(results[0], errors.HandshakeRefused)
    assert isinstance(results[0], errors.ConnectFailed)
    assert results[0].missing == (1,)
    for result in results:
        assert "the certificate of rank 3 was shown for rank 0" in result.reason


def test_a_certificate_bound_to_another_address_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bound = make_keys(tmp_path / "bound", 2, hosts=["127.0.0.1", "127.0.0.1"]).folder

    def caller(peers: Peers) -> Mesh:
        elsewhere = peers[0].replace("127.0.0.1", "127.0.0.2")
        return connect(1, 2, [elsewhere, peers[1]], keys=bound)

    said, met = refuse_then_admit(bound, caller, bound, caplog, host="0.0.0.0")
    reason = "the certificate of rank 0 is not for the address 127.0.0.2"
    assert isinstance(met, errors.HandshakeRefused)
    assert reason in met.reason
    assert reason in said


def test_a_caller_without_a_certificate_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0).encode())
            try:
                return repr(tls.recv(100))
            except ssl.SSLError as error:
                return str(error.reason)

    said, met = refuse_then_admit(ours, caller, ours, caplog)
    assert met == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    assert "showed no certificate" in said


def test_older_tls_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError) as caught, dial(peers[0]) as sock:
            context.wrap_socket(sock)
        return str(caught.value.reason)

    said, met = refuse_then_admit(ours, caller, ours, caplog)
    assert met == "TLSV1_ALERT_PROTOCOL_VERSION"
    assert "speaks another version of TLS than 1.3" in said


def test_plaintext_to_a_tls_port(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()
    said, met = refuse_then_admit(ours, as_rank_1(None), ours, caplog)
    reason = "plaintext came, and rank 0 accepts TLS only"
    assert isinstance(met, errors.HandshakeRefused)
    assert reason in met.reason
    assert reason in said


def test_tls_to_a_plaintext_port(caplog: pytest.LogCaptureFixture) -> None:
    said, met = refuse_then_admit(None, as_rank_1(key_folder()), None, caplog)
    reason = "TLS came, and rank 0 has no keys"
    assert isinstance(met, errors.HandshakeRefused)
    assert reason in met.reason
    assert reason in said


def test_strangers_learn_nothing_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(2, 1, 0).encode())
            return read_all(sock)

    _, reply = refuse_then_admit(ours, caller, ours, caplog)
    hello, size = wire.decode_hello(reply[: wire.HELLO_SIZE])
    assert (hello.world_size, hello.rank, hello.run) == (0, wire.NOBODY, wire.NO_RUN)
    assert len(reply) == wire.HELLO_SIZE + size


def test_a_downgrade_to_plaintext_is_refused() -> None:
    """Somebody in between who admits the dialer in plaintext gets no frame of it."""
    address, own = free_ports(2)
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:

        def impostor() -> bytes:
            link, _ = server.accept()
            with link:
                assert link.recv(1) == b"\x16"
                link.sendall(Hello(2, 0, 1).encode())
                return read_all(link)

        refused, _ = together(
            [lambda: connect(1, 2, [address, own], keys=key_folder()), impostor], errors_too=True
        )
    assert isinstance(refused, errors.HandshakeRefused)
    assert "it answered in plaintext, and rank 1 has keys" in refused.reason


@pytest.mark.parametrize(
    ("answer", "keys", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "does not speak ASTRA"),
        (b"\x15\x03\x03\x00\x02\x02\x46", False, "speaks TLS, and rank 1 has no keys"),
    ],
    ids=["http", "tls"],
)
def test_dialed_strangers_are_refused(answer: bytes, keys: bool, words: str) -> None:
    address, own = free_ports(2)
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:

        def stranger() -> None:
            link, _ = server.accept()
            with link:
                link.sendall(answer)
                read_all(link)

        dialer = lambda: connect(1, 2, [address, own], keys=key_folder() if keys else None)  # noqa: E731
        refused, _ = together([dialer, stranger], errors_too=True)
    assert isinstance(refused, errors.HandshakeRefused)
    assert words in refused.reason


def test_another_world_ends_both_sides() -> None:
    ours, peers = key_folder(), free_ports(3)
    results = together(
        [lambda: connect(0, 2, peers[:2], keys=ours), lambda: connect(1, 3, peers, keys=ours)],
        errors_too=True,
    )
    for result in results:
        assert isinstance(result, errors.HandshakeRefused)
        assert "rank 1 has world size 3, rank 0 has 2" in result.reason


def test_another_version_ends_both_sides() -> None:
    ours, peers = key_folder(), free_ports(2)

    def newer() -> bytes:
        context = Keys(ours).contexts(1).dialing
        with context.wrap_socket(dial(peers[0])) as tls:
            tls.sendall(Hello(2, 1, 0, version=7).encode())
            return read_all(tls)

    refused, reply = together([lambda: connect(0, 2, peers, keys=ours), newer], errors_too=True)
    reason = "protocol version 7 came, this rank speaks 2"
    assert isinstance(refused, errors.HandshakeRefused)
    assert reason in refused.reason
    assert reply[wire.HELLO_SIZE :].decode() == reason


def test_strangers_cannot_end_a_run_by_claiming_another_version(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = key_folder()

    def caller(peers: Peers) -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(9, 1, 0, version=7).encode())
            return read_all(sock)

    said, reply = refuse_then_admit(ours, caller, ours, caplog)
    assert "plaintext came" in said
    assert b"plaintext came" in reply


def test_a_duplicate_rank_is_refused() -> None:
    ours, peers = key_folder(), free_ports(3)
    elsewhere = [peers[0], free_ports(1)[0], peers[2]]

    def two_of_one_rank() -> Any:
        context = Keys(ours).contexts(1).dialing
        with context.wrap_socket(dial(peers[0])) as first:
            first.sendall(Hello(3, 1, 0).encode())
            assert len(first.recv(wire.HELLO_SIZE)) == wire.HELLO_SIZE
            return connect(1, 3, elsewhere, keys=ours)

    left, refused = together(
        [lambda: connect(0, 3, peers, keys=ours), two_of_one_rank], errors_too=True
    )
    assert isinstance(refused, errors.HandshakeRefused)
    assert "rank 1 has joined already: two processes claim it" in refused.reason
    assert isinstance(left, errors.PeerLost)  # the first of them left without BYE


@pytest.mark.parametrize("fact", ["model", "codebook", "plan"])
def test_other_facts_are_refused_on_both_sides(fact: str) -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"model": "a", "codebook": "b", "plan": "c"} | {fact: str(mesh.rank)})

    for result in as_ranks(tls_mesh(2), work, errors_too=True):
        assert isinstance(result, errors.HandshakeRefused)
        assert fact in result.reason


# --- forgeries on an open connection


@contextlib.contextmanager
def pair(timeout: float = 5.0) -> Iterator[tuple[TcpMesh, TlsStream]]:
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

    def work(mesh: Mesh) -> None:
        mesh.begin()
        if mesh.rank == 0:
            mesh.send(data, block=0, plan=PLAN, to=[1])
            mesh.receive({1: 1}, block=1, plan=PLAN, timeout=20)
            return
        assert isinstance(mesh, TcpMesh)
        mesh.may_yield = False  # as where ranks outnumber cores: it waits for an event at once
        peer, until = mesh.connections[0], time.monotonic() + 20
        while peer.stats.bytes_received_total < len(data) and time.monotonic() < until:
            mesh.check_cancelled()
            peer.stats.bytes_received_total = peer.stream.received
        assert 0 < len(peer.unread) < len(data)
        assert bytes(mesh.receive({0: len(data)}, block=0, plan=PLAN, timeout=5)[0]) == data
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


# --- strangers at the door


def test_a_stranger_may_send_so_many_bytes_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    """A first message that claims 64 KiB: TLS would collect it, this rank does not."""
    ours = key_folder()
    part = 16_000
    hello = b"\x01\x00\xff\xff" + bytes(65_535)
    records = b"".join(
        b"\x16\x03\x01" + len(hello[at : at + part]).to_bytes(2, "big") + hello[at : at + part]
        for at in range(0, len(hello), part)
    )

    def caller(peers: Peers) -> bool:
        with dial(peers[0]) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(records)
            read_all(sock)
            return True

    said, _ = refuse_then_admit(ours, caller, ours, caplog)
    assert f"sent {UNTRUSTED_BYTES} bytes and no HELLO" in said


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"], ids=["silent", "begins-tls"])
def test_a_silent_caller_is_dropped_after_its_time(
    first: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 0.5)
    ours = key_folder()

    peers = free_ports(2)

    def silent_then_good() -> Mesh:
        with dial(peers[0]) as sock:
            sock.sendall(first)
            start = time.monotonic()
            read_all(sock)
            assert time.monotonic() - start > 0.4
        monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 5.0)
        return connect(1, 2, peers, keys=ours)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=ours), silent_then_good])
    assert "sent no HELLO within" in caplog.text
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 1, 10))


STRANGERS = """
import errno, os, select, socket, sys, time
host, port, silent, garbage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
while True:
    try:
        socket.create_connection((host, port)).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.01)
print("go", flush=True)
held = []
for number in range(silent + garbage):
    sock = socket.socket()
    sock.connect((host, port))
    sock.setblocking(False)
    if number % 2 and garbage:
        try:
            sock.send((b"\\x16" if number % 4 == 1 else b"") + os.urandom(200))
        except OSError:
            pass  # dropped already
    held.append(sock)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["go", "open"], ids=["meanwhile", "before"])
def test_two_thousand_strangers_do_not_delay_peers(
    when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 silent connections and 1,000 of garbage, some of it like TLS; ranks join beside them.

    On a free machine that takes well below a second. The bound here is what waiting for any
    stranger's time to end would exceed, so that a busy machine does not fail the test.
    """
    monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 50.0)
    ours, peers = key_folder(), free_ports(2)
    host, port = peers[0].split(":")
    took: list[float] = []
    descriptors: list[int] = []

    def good_peer() -> Mesh:
        command = [sys.executable, "-c", STRANGERS, host, port, "1000", "1000"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while process.stdout.readline().strip() != when:
                pass
            start = time.monotonic()
            mesh = connect(1, 2, peers, keys=ours)
            took.append(time.monotonic() - start)
            descriptors.append(len(open_files() - before))
        finally:
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()
        return mesh

    before = open_files()
    with caplog.at_level(logging.DEBUG, "astra_runtime.transport"):
        meshes = together([lambda: connect(0, 2, peers, keys=ours), good_peer])
    assert took[0] < 40
    assert descriptors[0] < MAX_PENDING + 20
    if when == "open":
        assert "too many connections without a HELLO" in caplog.text
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) <= LOGGED_REFUSALS + 1  # a flood of callers is no flood of lines
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))

"""Exchanges over every transport, and what happens when a peer is wrong, late, silent or dead."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_runtime import errors, wire
from astra_runtime.transport import Link, Mesh, connect, local_mesh, peers_of
from astra_runtime.transport.tcp import TcpMesh, prepare
from astra_runtime.wire import Frame, Hello

PLAN = 0x1234


def gloo_mesh(world_size: int, *, timeout: float = 30.0) -> list[Mesh]:
    """All ranks of a gloo mesh in this process: process groups of their own, over one store."""
    import torch.distributed as dist

    from astra_runtime.transport.distributed import DistributedMesh

    store = dist.HashStore()

    def join(rank: int) -> Mesh:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=20)
        group = dist.ProcessGroupGloo(dist.PrefixStore("a", store), rank, world_size, options)
        return DistributedMesh(group, timeout=timeout)

    return together([lambda rank=rank: join(rank) for rank in range(world_size)])


def paced_mesh(world_size: int, *, timeout: float = 30.0) -> list[Mesh]:
    return local_mesh(world_size, timeout=timeout, link=Link(2000, 0.1))


MAKERS = {"tcp": local_mesh, "gloo": gloo_mesh, "paced": paced_mesh}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., list[Mesh]]:
    return MAKERS[request.param]


def together(calls: list[Callable[[], Any]], *, errors_too: bool = False) -> list[Any]:
    """Runs the calls at the same time, one thread each; results, or exceptions, in order."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    if not errors_too:
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return results


def as_ranks(meshes: list[Mesh], work: Callable[[Mesh], Any], **options: bool) -> list[Any]:
    def run(mesh: Mesh) -> Any:
        with mesh:
            return work(mesh)

    return together([lambda mesh=mesh: run(mesh) for mesh in meshes], **options)


def pattern(rank: int, block: int, size: int) -> bytes:
    return bytes((rank * 31 + block * 7 + position) % 251 for position in range(min(size, 500)))


def fill(frame: Frame, rank: int, block: int) -> None:
    head = pattern(rank, block, frame.size)
    frame.payload[: len(head)] = head


def all_to_all(mesh: Mesh, blocks: int, size: int) -> None:
    frame, others = mesh.buffer(size), peers_of(mesh)
    for block in range(blocks):
        fill(frame, mesh.rank, block)
        mesh.send(frame, block=block, plan=PLAN, to=others)
        views = mesh.receive(dict.fromkeys(others, size), block=block, plan=PLAN)
        for rank in others:
            assert len(views[rank]) == size
            assert bytes(views[rank][:500]) == pattern(rank, block, size)


# --- exchanges, over every transport


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 320, 70_001])
def test_all_to_all(make: Callable[..., list[Mesh]], world_size: int, size: int) -> None:
    as_ranks(make(world_size), lambda mesh: all_to_all(mesh, 6, size))


def test_causal_ranks_receive_from_lower_ranks_only(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        for block in range(5):
            later = list(range(mesh.rank + 1, mesh.world_size))
            payload = pattern(mesh.rank, block, 10 + mesh.rank)
            mesh.send(payload, block=block, plan=PLAN, to=later)
            sizes = {rank: 10 + rank for rank in range(mesh.rank)}
            views = mesh.receive(sizes, block=block, plan=PLAN)
            for rank in range(mesh.rank):
                assert bytes(views[rank]) == pattern(rank, block, 10 + rank)

    as_ranks(make(4), work)


def test_backlog_of_a_rank_that_runs_ahead(make: Callable[..., list[Mesh]]) -> None:
    ahead = threading.Event()

    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            for block in range(100):
                mesh.send(pattern(0, block, 500) * 64, block=block, plan=PLAN, to=[1])
            ahead.set()
        else:
            assert ahead.wait(30)
            for block in range(100):
                view = mesh.receive({0: 32_000}, block=block, plan=PLAN)[0]
                assert bytes(view) == pattern(0, block, 500) * 64

    as_ranks(make(2), work)


def test_large_frames_in_both_directions_at_once(make: Callable[..., list[Mesh]]) -> None:
    as_ranks(make(2), lambda mesh: all_to_all(mesh, 3, 16 << 20))


def test_a_view_survives_the_next_block_and_control_messages(
    make: Callable[..., list[Mesh]],
) -> None:
    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        held = {}
        for block in (0, 1, 0xFF00):
            mesh.send(pattern(mesh.rank, block, 99), block=block, plan=PLAN, to=[other])
            held[block] = mesh.receive({other: 99}, block=block, plan=PLAN)[other]
        for block, view in held.items():
            assert bytes(view) == pattern(other, block, 99)

    as_ranks(make(2), work)


def test_send_leaves_the_buffer_free(make: Callable[..., list[Mesh]]) -> None:
    size = 8 << 20

    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        frame = mesh.buffer(size)
        for block in range(2):
            fill(frame, mesh.rank, block)
            frame.payload[-1] = block + 1
            mesh.send(frame, block=block, plan=PLAN, to=[other])
        frame.payload[:] = bytes(size)
        for block in range(2):
            view = mesh.receive({other: size}, block=block, plan=PLAN)[other]
            assert bytes(view[:500]) == pattern(other, block, 500)
            assert view[-1] == block + 1

    as_ranks(make(2), work)


def test_stats_count_payload_and_framing(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        before = mesh.stats
        all_to_all(mesh, 10, 320)
        mesh.send(b"token", block=0xFF00, plan=PLAN, to=[other])
        mesh.receive({other: 5}, block=0xFF00, plan=PLAN)
        mesh.flush()  # behind a link, what was sent may not have left yet
        spent = mesh.stats - before
        assert (spent.messages_sent, spent.messages_received) == (11, 11)
        assert (spent.bytes_sent_payload, spent.bytes_received_payload) == (3200, 3200)
        assert (spent.bytes_sent_control, spent.bytes_received_control) == (5, 5)
        assert spent.bytes_sent_total == spent.bytes_received_total == 3205 + 11 * 16
        assert mesh.peer_stats[other].messages_sent == 11

    as_ranks(make(2), work)


def test_agreement(make: Callable[..., list[Mesh]]) -> None:
    as_ranks(make(3), lambda mesh: mesh.agree({"model": "ab12", "codebook": "cd34"}))


def test_a_difference_is_named_on_every_side(make: Callable[..., list[Mesh]]) -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"model": "ab12", "codebook": "cd34" if mesh.rank < 2 else "ef56"})

    results = as_ranks(make(3), work, errors_too=True)
    assert all(isinstance(result, errors.HandshakeRefused) for result in results), results
    assert str(results[0]) == "rank 2 has codebook ef56, rank 0 has cd34"
    assert str(results[1]) == "rank 2 has codebook ef56, rank 1 has cd34"
    assert str(results[2]) == "rank 0 has codebook cd34, rank 2 has ef56"


def test_a_missing_fact_is_a_difference() -> None:
    def work(mesh: Mesh) -> None:
        mesh.agree({"plan": "1"} if mesh.rank else {})

    results = as_ranks(local_mesh(2), work, errors_too=True)
    assert str(results[0]) == "rank 1 has plan 1, rank 0 has none"
    assert str(results[1]) == "rank 0 has no plan, rank 1 has 1"


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ((b"x" * 320, 4, PLAN), "expected 3, got 4"),
        ((b"x" * 320, 3, 1), "rank 0 runs another plan: its tag is 0x00000001"),
        ((b"x" * 319, 3, PLAN), "wrong length: expected 320, got 319"),
        ((b"x" * 321, 3, PLAN), "wrong length: expected 320, got 321"),
    ],
)
def test_a_wrong_frame_is_refused(
    make: Callable[..., list[Mesh]], sent: tuple[bytes, int, int], words: str
) -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            payload, block, plan = sent
            mesh.send(payload, block=block, plan=plan, to=[1])
        else:
            mesh.receive({0: 320}, block=3, plan=PLAN)

    _, result = as_ranks(make(2), work, errors_too=True)
    assert isinstance(result, errors.WireError)
    assert words in str(result)


def test_a_silent_peer_meets_the_deadline(make: Callable[..., list[Mesh]]) -> None:
    meshes = make(2, timeout=0.4)
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        meshes[0].receive({1: 8}, block=6, plan=PLAN)
    assert 0.35 < time.monotonic() - start < 3
    assert (caught.value.rank, caught.value.block) == (1, 6)
    for mesh in meshes:
        mesh.close()


def test_wrong_use_is_refused(make: Callable[..., list[Mesh]]) -> None:
    meshes = make(2)
    with pytest.raises(ValueError, match=r"rank: expected one of \[1\], got 5"):
        meshes[0].receive({5: 8}, block=0, plan=PLAN)
    for mesh in meshes:
        mesh.close()
        mesh.close()
    with pytest.raises(errors.AstraError, match="closed"):
        meshes[0].send(b"x", block=0, plan=PLAN, to=[1])


# --- TCP: a raw socket plays the peer


@contextlib.contextmanager
def raw_peer(*, timeout: float = 5.0, world_size: int = 2) -> Iterator[tuple[TcpMesh, Any]]:
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


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", [0, 7, 16, 20])
def test_a_peer_that_dies_within_a_frame_is_lost(end: Callable[[Any], None], sent: int) -> None:
    with raw_peer() as (mesh, peer):
        peer.sendall(frame_bytes(b"12345678", 0, 0)[:sent])
        end(peer)
        start = time.monotonic()
        with pytest.raises(errors.PeerLost) as caught:
            mesh.receive({0: 8}, block=0, plan=PLAN)
        assert (caught.value.rank, caught.value.block) == (0, 0)
        assert time.monotonic() - start < 2


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


def test_a_rank_that_fails_looks_lost() -> None:
    meshes = local_mesh(2)
    with pytest.raises(ZeroDivisionError), meshes[0]:
        raise ZeroDivisionError
    with meshes[1], pytest.raises(errors.PeerLost, match="closed the connection"):
        meshes[1].receive({0: 1}, block=0, plan=PLAN)


def send_blocks(mesh: Mesh, payload: bytes, to: int) -> None:
    for block in range(100):
        mesh.send(payload, block=block, plan=PLAN, to=[to])
        time.sleep(0.005)


def test_sending_to_a_lost_peer_says_so() -> None:
    with raw_peer() as (mesh, peer):
        reset(peer)
        with pytest.raises(errors.PeerLost, match="rank 0 was lost at block"):
            send_blocks(mesh, b"x", to=0)


def test_one_byte_at_a_time_meets_the_deadline() -> None:
    with raw_peer(timeout=0.4) as (mesh, peer):
        stop = threading.Event()

        def trickle() -> None:
            for byte in frame_bytes(bytes(100), 0, 0):
                if stop.wait(0.02):
                    return
                peer.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            mesh.receive({0: 100}, block=0, plan=PLAN)
        assert time.monotonic() - start < 1.5
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
    def count() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = count()
    as_ranks(local_mesh(4), lambda mesh: all_to_all(mesh, 3, 100))
    as_ranks(paced_mesh(3), lambda mesh: all_to_all(mesh, 3, 100))
    assert count() == before


# --- joining


def free_ports(count: int) -> list[str]:
    """Addresses nobody listens at, below the range that the kernel hands to outgoing dials."""
    addresses: list[str] = []
    while len(addresses) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            addresses.append(f"127.0.0.1:{port}")
    return addresses


def dial(address: str) -> socket.socket:
    host, port = address.split(":")
    for _ in range(200):
        try:
            return socket.create_connection((host, int(port)), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def test_connect_and_agree() -> None:
    peers = free_ports(4)

    def rank(number: int) -> None:
        time.sleep(0.05 * (number % 2))  # peers come in any order
        with connect(number, 4, peers) as mesh:
            assert (mesh.rank, mesh.world_size) == (number, 4)
            mesh.agree({"model": "ab12"})
            all_to_all(mesh, 3, 320)
            assert mesh.stats.bytes_sent_total > 9 * 336

    together([lambda number=number: rank(number) for number in range(4)])


def test_a_world_of_one_needs_nobody() -> None:
    with connect(world_size=1) as mesh:
        mesh.agree({"model": "ab12"})
        mesh.send(b"", block=0, plan=PLAN, to=[])
        assert mesh.receive({}, block=0, plan=PLAN) == {}


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(errors.ConnectFailed, match=f"port {port} of 127.0.0.1 is in use"):
            connect(0, 2, [f"127.0.0.1:{port}", "127.0.0.1:1"])


def test_missing_peers_are_named() -> None:
    peers = free_ports(3)
    with pytest.raises(errors.ConnectFailed) as caught:
        connect(1, 3, peers, connect_timeout=0.3)
    assert caught.value.missing == (0, 2)
    assert f"rank 0 did not answer at {peers[0]} (ECONNREFUSED)" in str(caught.value)
    assert "rank 2 did not call" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"rank": 2, "world_size": 2, "peers": ["a:1", "b:2"]}, r"rank: expected 0\.\.1, got 2"),
        ({"rank": 0, "world_size": 2, "peers": ["a:1"]}, "peers: expected 2 addresses, got 1"),
        ({"rank": 0, "world_size": 2, "peers": ["a", "b:2"]}, "expected \"host:port\", got 'a'"),
        ({"rank": 0, "world_size": 2}, "peers: expected the address of every rank"),
        ({"rank": 0, "world_size": 1, "backend": "mpi"}, "backend: expected"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=words):
        connect(**arguments)


def test_another_world_size_is_refused_on_both_sides() -> None:
    peers = free_ports(3)
    results = together(
        [lambda: connect(0, 2, peers[:2]), lambda: connect(1, 3, peers)], errors_too=True
    )
    for result in results:
        assert isinstance(result, errors.HandshakeRefused)
        assert "rank 1 has world size 3, rank 0 has 2" in str(result)


def test_another_version_is_refused_on_both_sides() -> None:
    peers = free_ports(2)

    def newer() -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(2, 1, 0, version=7).encode())
            return read_all(sock)

    refused, reply = together([lambda: connect(0, 2, peers), newer], errors_too=True)
    reason = "protocol version 7 came, this rank speaks 1"
    assert isinstance(refused, errors.HandshakeRefused)
    assert reason in str(refused)
    assert reply[wire.HELLO_SIZE :].decode() == reason


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


def test_a_dialed_stranger_is_refused() -> None:
    address, own = free_ports(2)
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:

        def web_server() -> None:
            link, _ = server.accept()
            with link:
                link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        refused, _ = together([lambda: connect(1, 2, [address, own]), web_server], errors_too=True)
    assert isinstance(refused, errors.HandshakeRefused)
    assert "given as rank 0, does not speak ASTRA" in str(refused)


def test_addresses_in_another_order_are_refused_on_both_sides() -> None:
    peers = free_ports(3)
    swapped = [peers[1], peers[0], peers[2]]
    addresses = [peers, peers, swapped]
    results = together(
        [
            lambda rank=rank: connect(rank, 3, addresses[rank], connect_timeout=1)
            for rank in range(3)
        ],
        errors_too=True,
    )
    assert isinstance(results[2], errors.HandshakeRefused)
    assert "looks for rank" in str(results[2])
    assert any("rank 2 looks for rank" in str(result) for result in results[:2])
    assert all(isinstance(result, errors.AstraError) for result in results)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "this port speaks ASTRA"),
        (os.urandom(4096).replace(b"A", b"B"), "this port speaks ASTRA"),
        (Hello(2, 1, 0, bytes(range(16))).encode(), "rank 1 belongs to run 000102"),
        (Hello(2, 5, 0).encode(), "rank 5 is outside the world of 2 ranks"),
        (Hello(2, 0, 0).encode(), "rank 0 was claimed by two processes"),
        (Hello(2, 1, 3).encode(), "rank 1 looks for rank 3 where rank 0 is"),
        (b"ASTR\x01", "left before its HELLO was complete"),
    ],
    ids=["http", "garbage", "run", "rank", "own-rank", "place", "half"],
)
def test_strangers_are_refused_and_peers_still_join(
    hello: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    peers = free_ports(2)

    def stranger() -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(hello)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def late_peer() -> Mesh:
        time.sleep(0.3)
        return connect(1, 2, peers)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        first, reply, second = together([lambda: connect(0, 2, peers), stranger, late_peer])
    assert reason in caplog.text
    if reply:
        assert reason in reply[wire.HELLO_SIZE :].decode()
    as_ranks([first, second], lambda mesh: all_to_all(mesh, 2, 50))


def test_a_second_process_of_the_same_rank_is_refused() -> None:
    peers = free_ports(3)
    joined = threading.Event()

    def duplicate() -> Mesh:
        assert joined.wait(10)
        time.sleep(0.2)
        return connect(1, 3, [peers[0], free_ports(1)[0], peers[2]])

    def original() -> Mesh:
        joined.set()
        return connect(1, 3, peers)

    def last() -> Mesh:
        time.sleep(0.8)
        return connect(2, 3, peers)

    results = together([lambda: connect(0, 3, peers), original, last, duplicate], errors_too=True)
    assert isinstance(results[3], errors.HandshakeRefused)
    assert "rank 1 has joined already: two processes claim it" in str(results[3])
    as_ranks(results[:3], lambda mesh: all_to_all(mesh, 2, 50))


def test_silent_strangers_do_not_hold_up_peers() -> None:
    peers = free_ports(2)

    def late_peer(strangers: list[socket.socket]) -> Mesh:
        strangers += [dial(peers[0]) for _ in range(100)]
        return connect(1, 2, peers)

    strangers: list[socket.socket] = []
    start = time.monotonic()
    meshes = together([lambda: connect(0, 2, peers), lambda: late_peer(strangers)])
    assert time.monotonic() - start < 4  # below the deadline of a handshake
    as_ranks(meshes, lambda mesh: all_to_all(mesh, 2, 50))
    for sock in strangers:
        sock.close()


def test_a_peer_lost_while_others_are_awaited() -> None:
    peers = free_ports(3)

    def short_life() -> None:
        with dial(peers[0]) as sock:
            sock.sendall(Hello(3, 1, 0).encode())
            assert len(sock.recv(wire.HELLO_SIZE)) == wire.HELLO_SIZE

    lost, _ = together([lambda: connect(0, 3, peers), short_life], errors_too=True)
    assert isinstance(lost, errors.PeerLost)
    assert str(lost).startswith("rank 1 was lost while the ranks connected")


PEER = """
import sys, time
from astra_runtime.transport import connect
mesh = connect(1, 2, sys.argv[1:])
for block in range(3):
    mesh.send(b"12345678", block=block, plan=0x1234, to=[0])
time.sleep(60)
"""


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root / "python"), str(root)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_killed_process_is_lost_at_the_block_that_needs_it() -> None:
    peers = free_ports(2)
    process = subprocess.Popen([sys.executable, "-c", PEER, *peers], env=environment())
    try:
        with connect(0, 2, peers) as mesh:
            for block in range(3):
                assert bytes(mesh.receive({1: 8}, block=block, plan=PLAN)[1]) == b"12345678"
            process.send_signal(signal.SIGKILL)
            process.wait()
            start = time.monotonic()
            with pytest.raises(errors.PeerLost) as caught:
                mesh.receive({1: 8}, block=3, plan=PLAN)
            assert time.monotonic() - start < 1
            assert (caught.value.rank, caught.value.block) == (1, 3)
    finally:
        process.kill()
        process.wait()


TORCHRUN = """
import torch.distributed as dist
from astra_runtime.transport import connect, peers_of
from astra_runtime.transport.distributed import DistributedMesh

def work(mesh):
    others = peers_of(mesh)
    mesh.agree({"model": "ab12"})
    for block in range(4):
        mesh.send(bytes([mesh.rank, block]) * 50, block=block, plan=1, to=others)
        views = mesh.receive(dict.fromkeys(others, 100), block=block, plan=1)
        assert all(bytes(views[rank]) == bytes([rank, block]) * 50 for rank in others)

with connect() as mesh:
    work(mesh)
with connect(timeout=20) as mesh:
    work(mesh)
dist.init_process_group("gloo")
with connect(backend="gloo") as mesh:
    work(mesh)
with DistributedMesh(dist.group.WORLD, batched=True) as mesh:  # as NCCL needs it
    work(mesh)
dist.destroy_process_group()
with open(f"{__file__}.{mesh.rank}", "w") as done:
    done.write(f"rank {mesh.rank} of {mesh.world_size}")
"""


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", free_ports(1)[0].rpartition(":")[2], str(script)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr[-3000:]
    written = sorted(path.read_text() for path in tmp_path.glob("script.py.*"))
    assert written == ["rank 0 of 2", "rank 1 of 2"]


# --- the emulated link


@pytest.mark.parametrize(
    ("link", "payload", "seconds"),
    [
        (Link(10), 320, (320 + 16 + 52) * 8e-7),
        (Link(10), 1432, (1448 + 52) * 8e-7),
        (Link(10), 1433, (1449 + 104) * 8e-7),
        (Link(100, 5), 0, (16 + 52) * 8e-8),
        (Link(None, 5), 10**6, 0),
    ],
)
def test_time_on_the_link(link: Link, payload: int, seconds: float) -> None:
    assert link.seconds(payload) == pytest.approx(seconds)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (10, -1), (float("nan"),)])
def test_an_impossible_link_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mbit_per_s|delay_ms"):
        Link(*arguments)


def test_frames_cross_the_uplink_one_after_another_and_idle_time_saves_nothing_up() -> None:
    link, size = Link(10, delay_ms=5), 12_500
    each = link.seconds(size)
    began = {}

    def work(mesh: Mesh) -> list[float]:
        arrivals = []
        for block in range(3):
            if mesh.rank == 0:
                time.sleep(0.1)
                began[block] = time.monotonic()
                mesh.send(bytes(size), block=block, plan=PLAN, to=[1, 2])
                assert time.monotonic() - began[block] < each  # send does not wait for the link
            else:
                mesh.receive({0: size}, block=block, plan=PLAN)
                arrivals.append(time.monotonic() - began[block])
        return arrivals

    _, first, second = as_ranks(local_mesh(3, link=link), work)
    for taken, expected in [(first, each + 5e-3), (second, 2 * each + 5e-3)]:
        assert min(taken) >= expected
        assert min(taken) < expected + 0.05


def test_many_small_frames_take_their_bits_over_the_rate() -> None:
    link, blocks = Link(10), 200
    began = time.monotonic()

    def work(mesh: Mesh) -> float:
        for block in range(blocks):
            if mesh.rank == 0:
                mesh.send(bytes(320), block=block, plan=PLAN, to=[1])
            else:
                mesh.receive({0: 320}, block=block, plan=PLAN)
        return time.monotonic() - began

    _, taken = as_ranks(local_mesh(2, link=link), work)
    expected = blocks * link.seconds(320)
    assert expected <= taken < expected + 0.2


def test_a_failure_behind_the_link_reaches_the_caller() -> None:
    meshes = local_mesh(2, link=Link(100))
    with pytest.raises(ZeroDivisionError), meshes[1]:
        raise ZeroDivisionError
    with meshes[0], pytest.raises(errors.PeerLost):
        send_blocks(meshes[0], b"x", to=1)

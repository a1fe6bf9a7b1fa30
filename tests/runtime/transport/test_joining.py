"""Joining the mesh: who is refused and why, who is missing, torchrun."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from astra_runtime import errors, wire
from astra_runtime.transport import Link, Mesh, bootstrap, connect, pending
from astra_runtime.transport.acceptor import Acceptor
from astra_runtime.wire import Hello
from tests.processes import Fork

from ..ranks import (
    PLAN,
    Deadlines,
    all_to_all,
    as_ranks,
    dial,
    environment,
    free_ports,
    key_folder,
    met_by,
    read_all,
    together,
)


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
    reason = "protocol version 7 came, this rank speaks 2"
    assert isinstance(refused, errors.HandshakeRefused)
    assert reason in str(refused)
    assert reply[wire.HELLO_SIZE :].decode() == reason


def test_a_dialed_stranger_is_refused() -> None:
    refused, _ = met_by(lambda link: link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert isinstance(refused, errors.HandshakeRefused)
    assert "given as rank 0, does not speak ASTRA" in str(refused)
    assert "expected the same transport on all ranks" in str(refused)


def test_addresses_in_another_order_are_refused_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peers, deadlines = free_ports(3), Deadlines()
    monkeypatch.setattr(bootstrap, "time", deadlines)
    swapped = [peers[1], peers[0], peers[2]]

    def refused() -> None:
        try:
            connect(2, 3, swapped)
        finally:
            deadlines.over()  # the others wait on, since anybody could have called

    results = together(
        [lambda: connect(0, 3, peers), lambda: connect(1, 3, peers), refused], errors_too=True
    )
    assert isinstance(results[2], errors.HandshakeRefused)
    assert "looks for rank" in str(results[2])
    # the first of the others whose time is up is lost for the second
    assert "rank 2 looks for rank" in caplog.text
    assert all(isinstance(result, errors.AstraError) for result in results)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "this port speaks ASTRA"),
        (random.Random(0).randbytes(4096), "this port speaks ASTRA"),
        (
            b"\x00\xce\xf7\x85\x3c\x0e",
            "torch.distributed calls at a port that speaks ASTRA",
        ),
        (Hello(2, 1, 0, bytes(range(16))).encode(), "rank 1 belongs to run 000102"),
        (Hello(2, 5, 0).encode(), "rank 5 is outside the world of 2 ranks"),
        (Hello(2, 0, 0).encode(), "rank 0 was claimed by two processes"),
        (Hello(2, 1, 3).encode(), "rank 1 looks for rank 3 where rank 0 is"),
        (b"ASTR\x01", "left before its HELLO was complete"),
    ],
    ids=["http", "garbage", "store", "run", "rank", "own-rank", "place", "half"],
)
def test_strangers_are_refused_and_peers_still_join(
    hello: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    peers, refused = free_ports(2), threading.Event()

    def stranger() -> bytes:
        with dial(peers[0]) as sock:
            sock.sendall(hello)
            sock.shutdown(socket.SHUT_WR)
            reply = read_all(sock)
        refused.set()
        return reply

    def late_peer() -> Mesh:
        assert refused.wait(60)
        return connect(1, 2, peers)

    with caplog.at_level(logging.WARNING, "astra_runtime.transport"):
        first, reply, second = together([lambda: connect(0, 2, peers), stranger, late_peer])
    assert reason in caplog.text
    if reply:
        assert reason in reply[wire.HELLO_SIZE :].decode()
    as_ranks([first, second], lambda mesh: all_to_all(mesh, 2, 50))


def test_a_second_process_of_the_same_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = free_ports(3)
    joined, refused = threading.Event(), threading.Event()
    join = pending.Members.join

    def joining(members: pending.Members, rank: int, stream: Any) -> None:
        join(members, rank, stream)
        if (members.own.rank, rank) == (0, 1):
            joined.set()

    monkeypatch.setattr(pending.Members, "join", joining)

    def duplicate() -> Mesh:
        assert joined.wait(60)
        try:
            return connect(1, 3, [peers[0], free_ports(1)[0], peers[2]])
        finally:
            refused.set()

    def original() -> Mesh:
        return connect(1, 3, peers)

    def last() -> Mesh:
        assert refused.wait(60)
        return connect(2, 3, peers)

    results = together([lambda: connect(0, 3, peers), original, last, duplicate], errors_too=True)
    assert isinstance(results[3], errors.HandshakeRefused)
    assert "rank 1 has joined already: two processes claim it" in str(results[3])
    assert not [error for error in results[:3] if isinstance(error, BaseException)]
    as_ranks(results[:3], lambda mesh: all_to_all(mesh, 2, 50))


def test_nothing_more_is_heard_of_a_caller_that_was_dropped() -> None:
    """Although a fork still holds its connection: the next one may have its number."""
    members = pending.Members(Hello(2, 0, wire.NOBODY), None)
    acceptor = Acceptor(members)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            assert acceptor.accept(listener)
        ((number, _),) = members.watch.poll(60)
        held = os.dup(number)
        assert acceptor.serve(number)
        assert members.watch.poll(0) == []
        os.close(held)
    members.watch.close()


def test_silent_strangers_do_not_hold_up_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "HANDSHAKE_SECONDS", 50.0)
    peers = free_ports(2)

    def late_peer(strangers: list[socket.socket]) -> Mesh:
        strangers += [dial(peers[0]) for _ in range(100)]
        return connect(1, 2, peers)

    strangers: list[socket.socket] = []
    start = time.monotonic()
    meshes = together([lambda: connect(0, 2, peers), lambda: late_peer(strangers)])
    assert time.monotonic() - start < 45  # below the deadline of a handshake
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


def test_a_killed_process_is_lost_at_the_block_that_needs_it() -> None:
    peers = free_ports(2)
    process = subprocess.Popen([sys.executable, "-c", PEER, *peers], env=environment())
    try:
        with connect(0, 2, peers) as mesh:
            for block in range(3):
                assert bytes(mesh.receive({1: 8}, block=block, plan=PLAN)[1]) == b"12345678"
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(errors.PeerLost) as caught:
                mesh.receive({1: 8}, block=3, plan=PLAN)
            assert (caught.value.rank, caught.value.block) == (1, 3)
    finally:
        process.kill()
        process.wait()


TORCHRUN = """
import os
import random
import sys
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
    assert not mesh.encrypted
    work(mesh)
os.environ["ASTRA_KEYS"] = sys.argv[1]
with connect(timeout=20) as mesh:
    assert mesh.encrypted
    work(mesh)
dist.init_process_group("gloo")
with connect(backend="gloo", insecure=True) as mesh:
    work(mesh)
with DistributedMesh(dist.group.WORLD, batched=True, on_device=True) as mesh:  # as over NCCL
    work(mesh)
    frame, others = mesh.device_buffer(100), peers_of(mesh)
    for block in range(4):
        frame.payload.fill_(10 * mesh.rank + block)
        mesh.send(frame, block=block, plan=1, to=others)
        sizes = dict.fromkeys(others, 100)
        payloads = mesh.receive_on_device(sizes, block=block, plan=1)
        assert all((payloads[rank] == 10 * rank + block).all() for rank in others)
    mesh.check_received()
dist.destroy_process_group()
with open(f"{__file__}.{mesh.rank}", "w") as done:
    done.write(f"rank {mesh.rank} of {mesh.world_size}")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "--master-port",
        free_ports(1)[0].rpartition(":")[2],
        str(script),
        str(key_folder()),
    ]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr[-3000:]
    written = sorted(path.read_text() for path in tmp_path.glob("script.py.*"))
    assert written == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("link", [None, Link(1000, 0.1)])
def test_a_start_may_take_longer_than_a_call(link: Link | None) -> None:
    """A rank that loads its model for longer than any answer may take is waited for."""
    peers = free_ports(2)

    def join(rank: int) -> None:
        with connect(rank, 2, peers, timeout=0.1, link=link) as mesh:
            time.sleep(0.4 * rank)
            mesh.agree({"model": "a"})
            mesh.timeout = 60.0  # for what a link has not delivered yet

    together([lambda: join(0), lambda: join(1)])


def _gloo(rank: int, world_size: int, peers: list[str]) -> Mesh:
    return connect(rank, world_size, peers, backend="gloo", timeout=20, connect_timeout=20)


def test_gloo_names_another_number_of_ranks() -> None:
    peers = free_ports(3)

    def refused(rank: int) -> None:
        with pytest.raises(errors.HandshakeRefused) as caught:
            _gloo(rank, 2 + rank, peers[: 2 + rank])
        print(caught.value)

    forks = [Fork(partial(refused, rank)) for rank in range(2)]
    assert [fork.end().partition("got")[2].strip() for fork in forks] == [
        "2 here and 3 on rank 1",
        "3 here and 2 on rank 0",
    ]


def test_a_closed_gloo_mesh_leaves_its_port() -> None:
    """Though it lives on in a variable; the next `connect` needs the port."""
    peers = free_ports(2)

    def twice(rank: int) -> None:
        meshes = []
        for call in range(2):
            meshes.append(_gloo(rank, 2, peers))
            meshes[-1].agree({"call": str(call)})
            meshes[-1].close()

    for fork in [Fork(partial(twice, rank)) for rank in range(2)]:
        fork.end()

"""Codes as datagrams: whole and in order, repeated, beside lost peers and a full kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from astra_runtime import errors
from astra_runtime.transport.datagram import DatagramMesh
from astra_runtime.transport.fragments import (
    FEC_GROUP,
    FRAGMENT_SIZE,
)
from astra_runtime.transport.seals import (
    HEADER_SIZE,
    SEAL_SIZE,
)

from ..ranks import PLAN, all_to_all, as_ranks
from .datagrams import (
    EARLY,
    LONG,
    Lane,
    content,
    datagram_mesh,
    lane,
    told,
)


@pytest.mark.parametrize("fec_group", [0, FEC_GROUP])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 320, FRAGMENT_SIZE, FRAGMENT_SIZE + 1, 70_001])
def test_all_that_is_sent_comes(
    make_datagrams: Callable[..., list[DatagramMesh]], world_size: int, size: int, fec_group: int
) -> None:
    def work(mesh: DatagramMesh) -> None:
        all_to_all(mesh, 6, size)
        assert mesh.missing_ranges == {}
        mesh.agree({})  # who has all and leaves would refuse FEC fragments that are still to come
        assert mesh.datagrams.missing == mesh.datagrams.refused == mesh.datagrams.dropped == 0

    as_ranks(make_datagrams(world_size, fec_group=fec_group), work)


def test_control_messages_go_over_tcp(make_datagrams: Callable[..., list[DatagramMesh]]) -> None:
    def work(mesh: DatagramMesh) -> None:
        mesh.agree({"model": "the same"})
        sent = mesh.datagrams.sent
        mesh.send(b"token", block=0xFF00, plan=PLAN, to=[1 - mesh.rank])
        assert bytes(mesh.receive({1 - mesh.rank: 5}, block=0xFF00, plan=PLAN)[1 - mesh.rank]) == (
            b"token"
        )
        assert mesh.datagrams.sent == sent

    as_ranks(make_datagrams(2), work)


def test_a_rank_that_runs_ahead_is_heard_in_order(
    make_datagrams: Callable[..., list[DatagramMesh]],
) -> None:
    ahead = threading.Event()

    def work(mesh: DatagramMesh) -> None:
        if mesh.rank == 0:
            for block in range(40):
                mesh.send(content(0, block, 2000), block=block, plan=PLAN, to=[1])
            ahead.set()
        else:
            assert ahead.wait(LONG)
            for block in range(40):
                views = mesh.receive({0: 2000}, block=block, plan=PLAN, timeout=LONG, partial=True)
                assert bytes(views[0]) == content(0, block, 2000)
                assert not mesh.missing_ranges

    as_ranks(make_datagrams(2), work)


def test_views_survive_the_next_block(datagram_pair: list[DatagramMesh]) -> None:
    for block in (0, 1):
        datagram_pair[0].send(content(0, block, 3000), block=block, plan=PLAN, to=[1])
    held = [datagram_pair[1].receive({0: 3000}, block=block, plan=PLAN)[0] for block in (0, 1)]
    assert [bytes(view) for view in held] == [content(0, block, 3000) for block in (0, 1)]


def test_stats_count_payload_and_datagrams(
    make_datagrams: Callable[..., list[DatagramMesh]],
) -> None:
    size = 2 * FRAGMENT_SIZE + 1

    def work(mesh: DatagramMesh) -> tuple[int, int]:
        before = mesh.stats
        all_to_all(mesh, 5, size)
        spent = mesh.stats - before
        assert (spent.messages_sent, spent.messages_received) == (5, 5)
        assert spent.bytes_sent_payload == spent.bytes_received_payload == 5 * size
        assert spent.bytes_sent_total == 5 * (size + 3 * (HEADER_SIZE + SEAL_SIZE))
        assert mesh.peer_stats[1 - mesh.rank].messages_sent >= 5
        stats = mesh._peers[1 - mesh.rank].stats
        return stats.bytes_sent_total, stats.bytes_received_total

    (sent, received), (answered, heard) = as_ranks(make_datagrams(2), work)
    assert (sent, answered) == (heard, received)  # path probes and all


def test_reordered_and_repeated_parts(make_datagrams: Callable[..., list[DatagramMesh]]) -> None:
    def work(mesh: DatagramMesh) -> None:
        held: list[bytes] = []

        def swapping(datagram: bytes) -> list[bytes]:  # pairs change places, and come twice
            held.append(datagram)
            if len(held) < 2:
                return []
            pair = [held[1], held[0], held[0], held[1]]
            held.clear()
            return pair

        lane(mesh, 1 - mesh.rank, swapping)
        for block in range(4):
            found = told(mesh, block, 10 * FRAGMENT_SIZE, timeout=LONG, partial=True)
            assert found == {1 - mesh.rank: content(1 - mesh.rank, block, 10 * FRAGMENT_SIZE)}
            assert not mesh.missing_ranges
        assert mesh.datagrams.repeated >= 30

    as_ranks(make_datagrams(2), work)


def test_a_lost_peer_ends_the_wait(make_datagrams: Callable[..., list[DatagramMesh]]) -> None:
    meshes = make_datagrams(3)

    def work(mesh: DatagramMesh) -> None:
        if mesh.rank == 1:
            mesh.send(bytes(10), block=5, plan=PLAN, to=[0, 2])
            raise RuntimeError("the fault")
        with pytest.raises(errors.PeerLost, match="the fault") as caught:
            mesh.receive({2 - mesh.rank: 10}, block=6, plan=PLAN)
        assert (caught.value.rank, caught.value.block) == (1, 5)

    found = as_ranks(meshes, work, errors_too=True)
    assert isinstance(found[1], RuntimeError)
    assert found[0] is found[2] is None


def test_a_lost_peer_is_left_out_of_a_partial_wait() -> None:
    meshes = datagram_mesh(3)

    def work(mesh: DatagramMesh) -> None:
        if mesh.rank == 1:
            raise RuntimeError("the fault")
        for block in range(3):
            start = time.monotonic()
            found = told(mesh, block, 5000, timeout=LONG, partial=True)
            assert found == {2 - mesh.rank: content(2 - mesh.rank, block, 5000)}
            assert time.monotonic() - start < EARLY
        assert "the fault" in str(mesh.lost[1])

    found = as_ranks(meshes, work, errors_too=True)
    assert found[0] is None
    assert found[2] is None


def test_send_never_waits(datagram_pair: list[DatagramMesh]) -> None:
    payload = bytes(1 << 20)
    start = time.monotonic()
    for block in range(16):  # nobody reads
        datagram_pair[0].send(payload, block=block, plan=PLAN, to=[1])
    assert time.monotonic() - start < LONG / 2


def test_a_kernel_without_room_delays_and_then_loses(datagram_pair: list[DatagramMesh]) -> None:
    full = True

    class Full(Lane):
        def sendmsg(self, pieces: Sequence[bytes]) -> int:
            if full:
                raise BlockingIOError
            return super().sendmsg(pieces)

    peer = datagram_pair[0]._peers[1]
    peer.sock = Full(peer.sock, lambda datagram: [datagram])  # type: ignore[assignment]
    datagram_pair[0].send(content(0, 0, 5000), block=0, plan=PLAN, to=[1])
    assert datagram_pair[1].receive({0: 5000}, block=0, plan=PLAN, timeout=0.1, partial=True) == {}
    full = False
    datagram_pair[0].send(content(0, 1, 5000), block=1, plan=PLAN, to=[1])
    found = datagram_pair[1].receive({0: 5000}, block=1, plan=PLAN, timeout=LONG, partial=True)
    assert bytes(found[0]) == content(0, 1, 5000)
    assert datagram_pair[1].datagrams.late == 5
    full = True
    datagram_pair[0].send(bytes(2 << 20), block=2, plan=PLAN, to=[1])
    assert datagram_pair[0].datagrams.dropped > 0
    full = False
    datagram_pair[0].flush()
    assert not peer.unsent

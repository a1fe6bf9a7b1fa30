"""Codes as datagrams: whole, in part, forged, replayed, too early, too late, and never a hang."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from astra_runtime import errors
from astra_runtime.transport import Mesh, datagram, local_mesh
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.datagram import DatagramMesh, connect_datagrams
from astra_runtime.transport.fragments import (
    FEC_GROUP,
    FRAGMENT_SIZE,
    Outbox,
    fragment_layout,
    num_fec_fragments,
)
from astra_runtime.transport.reassembly import Inbox
from astra_runtime.transport.seals import (
    HEADER_SIZE,
    SEAL_SIZE,
    PlainSeal,
)

from ..ranks import PLAN, all_to_all, as_ranks, free_ports, key_folder, together
from .datagrams import (
    EARLY,
    LONG,
    SECRET,
    Fate,
    Lane,
    content,
    datagram_mesh,
    dropping,
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


def test_gaps_are_the_parts_that_were_lost(
    make_datagrams: Callable[..., list[DatagramMesh]],
) -> None:
    size = 10 * FRAGMENT_SIZE
    count, step = fragment_layout(size)
    lost, sent = [0, 4, 5, 9], threading.Barrier(2, timeout=LONG)

    def work(mesh: DatagramMesh) -> None:
        lane(mesh, 1 - mesh.rank, dropping(*lost))
        found = told(mesh, 0, size, sent, timeout=0.4, partial=True)
        want = bytearray(content(1 - mesh.rank, 0, size))
        for index in lost:
            want[index * step : (index + 1) * step] = bytes(step)
        assert found == {1 - mesh.rank: bytes(want)}
        gaps = [(0, step), (4 * step, 6 * step), (9 * step, 10 * step)]
        assert mesh.missing_ranges == {1 - mesh.rank: gaps}
        assert mesh.datagrams.missing == len(lost)
        again = told(mesh, 1, size, timeout=LONG, partial=True)
        assert again == {1 - mesh.rank: content(1 - mesh.rank, 1, size)}
        assert mesh.missing_ranges == {}

    assert count == 10
    as_ranks(make_datagrams(2), work)


def test_a_rank_of_which_nothing_came_is_absent() -> None:
    sent = threading.Barrier(3, timeout=LONG)

    def work(mesh: DatagramMesh) -> None:
        if mesh.rank == 1:
            lane(mesh, 0, lambda _: [])
        found = told(mesh, 0, 3000, sent, timeout=0.3, partial=True)
        others = {0, 1, 2} - {mesh.rank} - ({1} if mesh.rank == 0 else set())
        assert found == {rank: content(rank, 0, 3000) for rank in others}

    as_ranks(datagram_mesh(3), work)


def test_the_wait_ends_early_when_later_parts_have_come(datagram_pair: list[DatagramMesh]) -> None:
    lane(datagram_pair[0], 1, dropping(1))
    datagram_pair[0].send(content(0, 0, 10_000), block=0, plan=PLAN, to=[1])
    start = time.monotonic()
    view = datagram_pair[1].receive({0: 10_000}, block=0, plan=PLAN, timeout=LONG, partial=True)[0]
    assert time.monotonic() - start < EARLY
    _, step = fragment_layout(10_000)
    assert datagram_pair[1].missing_ranges == {0: [(step, 2 * step)]}
    assert bytes(view[2 * step :]) == content(0, 0, 10_000)[2 * step :]


def test_the_wait_ends_early_when_a_later_frame_has_come(datagram_pair: list[DatagramMesh]) -> None:
    _, step = fragment_layout(10_000)
    lane(datagram_pair[0], 1, dropping(8))  # the last part: nothing of this frame follows

    def later() -> None:
        time.sleep(0.1)
        datagram_pair[0].send(content(0, 1, 10_000), block=1, plan=PLAN, to=[1])

    datagram_pair[0].send(content(0, 0, 10_000), block=0, plan=PLAN, to=[1])
    sender = threading.Thread(target=later)
    sender.start()
    start = time.monotonic()
    datagram_pair[1].receive({0: 10_000}, block=0, plan=PLAN, timeout=LONG, partial=True)
    assert time.monotonic() - start < EARLY
    assert datagram_pair[1].missing_ranges == {0: [(8 * step, 10_000)]}
    sender.join()
    views = datagram_pair[1].receive({0: 10_000}, block=1, plan=PLAN, timeout=LONG, partial=True)
    assert bytes(views[0]) == content(0, 1, 10_000)
    assert not datagram_pair[1].missing_ranges


def test_a_lost_part_is_a_deadline_where_all_is_wanted(datagram_pair: list[DatagramMesh]) -> None:
    lane(datagram_pair[0], 1, dropping(1))
    datagram_pair[0].send(content(0, 3, 10_000), block=3, plan=PLAN, to=[1])
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        datagram_pair[1].receive({0: 10_000}, block=3, plan=PLAN, timeout=0.3)
    assert 0.29 < time.monotonic() - start < LONG
    assert (caught.value.rank, caught.value.block) == (0, 3)


def test_deadline_of_a_silent_rank(datagram_pair: list[DatagramMesh]) -> None:
    start = time.monotonic()
    assert datagram_pair[1].receive({0: 10}, block=0, plan=PLAN, timeout=0.2, partial=True) == {}
    assert 0.19 < time.monotonic() - start < LONG


def test_the_wait_for_an_overtaken_part_is_short(datagram_pair: list[DatagramMesh]) -> None:
    lane(datagram_pair[0], 1, dropping(7))  # of nine: one part more follows
    datagram_pair[0].send(content(0, 0, 10_000), block=0, plan=PLAN, to=[1])
    start = time.monotonic()
    datagram_pair[1].receive({0: 10_000}, block=0, plan=PLAN, timeout=LONG, partial=True)
    assert time.monotonic() - start < EARLY
    assert len(datagram_pair[1].missing_ranges[0]) == 1


def test_the_wait_for_the_end_of_a_frame_is_a_quarter(
    datagram_pair: list[DatagramMesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert datagram.PAUSE == 0.25
    monkeypatch.setattr(datagram, "PAUSE", 0.3 / LONG)
    lane(datagram_pair[0], 1, dropping(8))  # the last one
    datagram_pair[0].send(content(0, 0, 10_000), block=0, plan=PLAN, to=[1])
    start = time.monotonic()
    datagram_pair[1].receive({0: 10_000}, block=0, plan=PLAN, timeout=LONG, partial=True)
    assert 0.29 < time.monotonic() - start < LONG
    assert len(datagram_pair[1].missing_ranges[0]) == 1


def test_late_parts_are_of_no_use_and_do_no_harm(datagram_pair: list[DatagramMesh]) -> None:
    kept: list[bytes] = []

    def fate(datagram: bytes) -> list[bytes]:
        if len(kept) < 2:
            kept.append(datagram)
            return []
        return [datagram]

    wire = lane(datagram_pair[0], 1, fate)
    datagram_pair[0].send(content(0, 0, 10_000), block=0, plan=PLAN, to=[1])
    view = datagram_pair[1].receive({0: 10_000}, block=0, plan=PLAN, timeout=LONG, partial=True)[0]
    before = bytes(view)
    for each in kept:
        wire.sock.send(each)
    datagram_pair[0].send(content(0, 1, 100), block=1, plan=PLAN, to=[1])
    found = datagram_pair[1].receive({0: 100}, block=1, plan=PLAN, timeout=LONG, partial=True)
    assert bytes(found[0]) == content(0, 1, 100)
    assert bytes(view) == before
    assert datagram_pair[1].datagrams.late == 2


@pytest.mark.parametrize("fec_group", [1, 2, 8, 255])
@pytest.mark.parametrize("size", [1, FRAGMENT_SIZE + 1, 9 * FRAGMENT_SIZE - 5, 20 * FRAGMENT_SIZE])
def test_fec_recovers_one_loss_in_each_group(fec_group: int, size: int) -> None:
    count, step = fragment_layout(size)
    groups = num_fec_fragments(count, fec_group)
    chance = random.Random(size * fec_group)
    payload = content(0, 0, size)
    for _ in range(40):
        inbox = Inbox(0, PlainSeal(SECRET), fec_group)
        inbox.expect(size, 0, PLAN)
        parts = Outbox(0, PlainSeal(SECRET), fec_group).frame(memoryview(payload), 0, PLAN)
        assert len(parts) == count + groups
        lost = {index for index in range(len(parts)) if chance.random() < 0.15}
        came = [b"".join(part) for index, part in enumerate(parts) if index not in lost]
        chance.shuffle(came)
        for each in came:
            inbox.take(memoryview(each))
        group_of = [n % groups for n in range(count)] + list(range(groups))
        losses = [sum(group_of[n] == group for n in lost) for group in range(groups)]
        missing = {n for n in lost if n < count and losses[group_of[n]] > 1}
        assert inbox.whole == (not missing)
        found = inbox.finish()
        if len(missing) == count:
            assert found is None
            continue
        assert found is not None
        want = bytearray(payload)
        for n in missing:
            want[n * step : (n + 1) * step] = bytes(len(want[n * step : (n + 1) * step]))
        assert found[0] == want
        assert sum(stop - start for start, stop in found[1]) == sum(
            len(payload[n * step : (n + 1) * step]) for n in missing
        )
        assert inbox.stats.recovered >= sum(n < count for n in lost) - len(missing)


def test_a_loss_that_fec_recovers_delays_nothing(
    make_datagrams: Callable[..., list[DatagramMesh]],
) -> None:
    size = 5000

    def work(mesh: DatagramMesh) -> None:
        per_frame = fragment_layout(size)[0] + 1
        for block in range(per_frame):
            lane(mesh, 1 - mesh.rank, dropping(block))
            start = time.monotonic()
            found = told(mesh, block, size, timeout=LONG, partial=True)
            assert time.monotonic() - start < EARLY
            assert found == {1 - mesh.rank: content(1 - mesh.rank, block, size)}
            assert not mesh.missing_ranges
        assert mesh.datagrams.recovered == per_frame - 1

    as_ranks(make_datagrams(2, fec_group=FEC_GROUP), work)


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


def test_a_way_that_datagrams_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram._Peer, "transmit", lambda self, pieces: None)
    meshes = local_mesh(2)

    def join(mesh: Mesh) -> None:
        with pytest.raises(errors.ConnectFailed, match="firewall") as caught:
            connect_datagrams(mesh, connect_timeout=0.2)
        assert caught.value.missing == (1 - mesh.rank,)

    together([lambda mesh=mesh: join(mesh) for mesh in meshes])
    together([mesh.close for mesh in meshes])


@pytest.mark.skipif(not can_make_keys(), reason="no cryptography")
def test_connect_and_connect_again() -> None:
    from astra_runtime.transport import connect

    peers, keys = free_ports(2), key_folder()

    def join(rank: int) -> Mesh:
        return connect(rank, 2, peers, backend="datagram", keys=keys, timeout=LONG)

    meshes = together([lambda rank=rank: join(rank) for rank in range(2)])
    assert all(mesh.encrypted and mesh.lossy and mesh.partial for mesh in meshes)
    assert all(found == {1 - rank: content(1 - rank, 0, 5000)} for rank, found in exchange(meshes))
    again = together([lambda mesh=mesh: mesh.reconnect() for mesh in meshes])
    assert all(found == {1 - rank: content(1 - rank, 0, 5000)} for rank, found in exchange(again))
    together([mesh.close for mesh in again])


def exchange(meshes: list[DatagramMesh]) -> Any:
    return enumerate(together([lambda mesh=mesh: told(mesh, 0, 5000) for mesh in meshes]))


def test_an_emulated_link_is_refused() -> None:
    from astra_runtime.transport import Link, connect

    with pytest.raises(ValueError, match="datagram"):
        connect(0, 1, backend="datagram", link=Link(10, 1))


def test_a_peer_that_sends_no_datagrams() -> None:
    meshes = local_mesh(2)

    def other() -> None:
        with pytest.raises(errors.AstraError, match="datagrams|block"), meshes[1]:
            meshes[1].agree({"model": "the same"})

    def ours() -> None:
        with pytest.raises(errors.HandshakeRefused, match="rank 1 sends no datagrams"), meshes[0]:
            connect_datagrams(meshes[0])

    together([ours, other])


@pytest.mark.parametrize("datagrams", [0, 1])
def test_a_transport_that_differs_is_named_on_both_sides(datagrams: int) -> None:
    """Whoever sees it first: the other one gets the same words."""
    meshes = local_mesh(2, timeout=LONG)

    def join(mesh: Mesh) -> None:
        with mesh:
            if mesh.rank == datagrams:
                connect_datagrams(mesh)  # type: ignore[arg-type]
            else:
                mesh.agree({"model": "a"})

    for error in together([lambda mesh=mesh: join(mesh) for mesh in meshes], errors_too=True):
        assert isinstance(error, errors.HandshakeRefused)
        assert f"rank {1 - datagrams}" in str(error)
        assert f"rank {datagrams}" in str(error)
        assert "--transport" in str(error)


@pytest.mark.parametrize("end", ["silent", "finished"])
def test_a_rank_that_is_content_with_tcp(end: str) -> None:
    """It has connected, and no more is to come of it."""
    sending, other = local_mesh(2, timeout=0.1)
    if end == "finished":
        other.close()
    words = "within 0.1 s" if end == "silent" else "before it finished and said BYE"
    with pytest.raises(errors.HandshakeRefused) as refused:
        connect_datagrams(sending, connect_timeout=0.1)  # type: ignore[arg-type]
    assert f"rank 1 sends no datagrams {words}, rank 0 does: " in str(refused.value)
    assert "same transport on all ranks (backend of connect, --transport)" in str(refused.value)
    if end == "silent":
        words = "rank 0 sends datagrams, rank 1 does not"
        with pytest.raises(errors.HandshakeRefused, match=words):
            other.agree({"model": "a"})
        other.close()


def test_many_lossy_exchanges_end() -> None:
    """A tenth of all datagrams is lost, some come twice. What is missing is what was lost."""
    blocks, size = 150, 5000
    count, step = fragment_layout(size)
    sent = threading.Barrier(3, timeout=LONG)
    lost: set[tuple[int, int, int, int]] = set()  # sender, receiver, block, fragment

    def fate(sender: int, receiver: int) -> Fate:
        chance, numbers = random.Random(3 * sender + receiver), itertools.count()

        def decide(datagram: bytes) -> list[bytes]:
            block, index = divmod(next(numbers), count)
            drawn = chance.random()
            if drawn < 0.1:
                lost.add((sender, receiver, block, index))
                return []
            return [datagram] * (2 if drawn > 0.95 else 1)

        return decide

    def work(mesh: DatagramMesh) -> int:
        for peer in mesh._peers:
            lane(mesh, peer, fate(mesh.rank, peer))
        whole = 0
        for block in range(blocks):
            found = told(mesh, block, size, sent, timeout=0.05, partial=True)
            for rank in mesh._peers:
                missing = [n for n in range(count) if (rank, mesh.rank, block, n) in lost]
                want = bytearray(content(rank, block, size))
                for n in missing:
                    want[n * step : (n + 1) * step] = bytes(step)
                assert found.get(rank, want) == want
                assert (rank in found) == (len(missing) < count)
                assert (rank in mesh.missing_ranges) == (0 < len(missing) < count)
                whole += not missing
            sent.wait()
        return whole

    wholes = as_ranks(datagram_mesh(3), work)
    assert 0.06 < len(lost) / (6 * blocks * count) < 0.14
    assert all(blocks < whole < 2 * blocks for whole in wholes)

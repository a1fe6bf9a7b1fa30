"""Datagrams that are lost or late: what is missing, what FEC recovers, and when a wait ends."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from astra_runtime import errors
from astra_runtime.transport import datagram
from astra_runtime.transport.datagram import DatagramMesh
from astra_runtime.transport.fragments import (
    FEC_GROUP,
    FRAGMENT_SIZE,
    Outbox,
    fragment_layout,
    num_fec_fragments,
)
from astra_runtime.transport.reassembly import Inbox
from astra_runtime.transport.seals import (
    PlainSeal,
)

from ..ranks import PLAN, as_ranks
from .datagrams import (
    EARLY,
    LONG,
    SECRET,
    Fate,
    content,
    datagram_mesh,
    dropping,
    lane,
    told,
)


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

"""Datagrams that no peer has sealed, that repeat, or that no frame has."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from astra_runtime import errors
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.datagram import DatagramMesh
from astra_runtime.transport.fragments import (
    DATAGRAM_SIZE,
    FRAGMENT_SIZE,
    Outbox,
)
from astra_runtime.transport.reassembly import EARLY_BYTES, Inbox
from astra_runtime.transport.seals import (
    EncryptedSeal,
    PlainSeal,
    Seal,
)

from ..ranks import PLAN, all_to_all, as_ranks, together
from .datagrams import (
    LONG,
    SECRET,
    content,
    lane,
    tls_datagram_mesh,
)


def test_a_recorded_frame_cannot_be_replayed(
    make_datagrams: Callable[..., list[DatagramMesh]],
) -> None:
    recorded: list[bytes] = []

    def recording(datagram: bytes) -> list[bytes]:
        recorded.append(datagram)
        return [datagram]

    meshes = make_datagrams(2)
    wire = lane(meshes[0], 1, recording)
    meshes[0].send(content(0, 0, 3000), block=0, plan=PLAN, to=[1])
    assert meshes[1].receive({0: 3000}, block=0, plan=PLAN)
    for each in recorded:
        wire.sock.send(each)
    assert meshes[1].receive({0: 3000}, block=0, plan=PLAN, timeout=0.2, partial=True) == {}
    assert meshes[1].datagrams.repeated == len(recorded)
    together([mesh.close for mesh in meshes])


def forgeries(datagram: bytes) -> list[bytes]:
    """Datagrams that are nearly right."""
    flipped = [
        datagram[:at] + bytes([datagram[at] ^ 1]) + datagram[at + 1 :]
        for at in range(len(datagram))
    ]
    short = [datagram[:length] for length in range(len(datagram))]
    fresh = [struct.pack("<Q", 10**6 + i) + datagram[8:] for i in range(3)]
    longer = [datagram + bytes(extra) for extra in (1, DATAGRAM_SIZE - len(datagram), 20_000)]
    return flipped + short + fresh + longer


@pytest.mark.skipif(not can_make_keys(), reason="no cryptography")
def test_nothing_but_what_the_peer_sealed_is_taken() -> None:
    meshes = tls_datagram_mesh(2)
    seen: list[bytes] = []

    def only_forged(datagram: bytes) -> list[bytes]:
        seen.extend(forgeries(datagram))
        return []

    wire = lane(meshes[0], 1, only_forged)
    meshes[0].send(content(0, 0, 90), block=0, plan=PLAN, to=[1])
    for forged in seen:
        wire.sock.send(forged)
        meshes[1]._peers[0].collect()
    assert meshes[1].receive({0: 90}, block=0, plan=PLAN, timeout=0.1, partial=True) == {}
    found = meshes[1].datagrams
    assert found.refused + found.repeated == len(seen) > 250
    together([mesh.close for mesh in meshes])


def test_a_stranger_is_not_answered(make_datagrams: Callable[..., list[DatagramMesh]]) -> None:
    meshes = make_datagrams(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.1", 0))
        for mesh in meshes:
            for peer in mesh._peers.values():
                stranger.sendto(bytes(100), peer.sock.getsockname())
        as_ranks(meshes, lambda mesh: all_to_all(mesh, 3, 500))
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(1)


@pytest.mark.parametrize("seal", [EncryptedSeal, PlainSeal])
def test_another_secret_is_refused(seal: type[Seal]) -> None:
    if seal is EncryptedSeal and not can_make_keys():
        pytest.skip("no cryptography")
    outbox, inbox = Outbox(0, seal(SECRET)), Inbox(0, seal(bytes(32)))  # type: ignore[call-arg]
    inbox.expect(10, 0, PLAN)
    for each in outbox.frame(memoryview(bytes(10)), 0, PLAN):
        inbox.take(memoryview(b"".join(each)))
    assert not inbox.whole
    assert inbox.stats.refused == 1


@pytest.mark.parametrize(
    ("field", "sent", "wanted"),
    [
        ("plan", (10, 0, PLAN), (10, 0, PLAN + 1)),
        ("block", (10, 2, PLAN), (10, 4, PLAN)),
        ("length", (11, 0, PLAN), (10, 0, PLAN)),
        ("length", (0, 0, PLAN), (10, 0, PLAN)),
        ("length", (10, 0, PLAN), (0, 0, PLAN)),
    ],
)
def test_a_frame_that_had_not_to_come(
    datagram_pair: list[DatagramMesh], field: str, sent: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    datagram_pair[0].send(bytes(sent[0]), block=sent[1], plan=sent[2], to=[1])
    with pytest.raises(errors.WireError) as caught:
        datagram_pair[1].receive(
            {0: wanted[0]}, block=wanted[1], plan=wanted[2], timeout=1, partial=True
        )
    assert (caught.value.field, caught.value.rank) == (field, 0)


def test_a_part_that_no_frame_has() -> None:
    size = 3 * FRAGMENT_SIZE
    outbox, inbox = Outbox(0, PlainSeal(SECRET)), Inbox(0, PlainSeal(SECRET))
    inbox.expect(size, 0, PLAN)
    outbox._frames = 1
    for offset, length in (
        (1, FRAGMENT_SIZE),
        (0, FRAGMENT_SIZE - 1),
        (size, FRAGMENT_SIZE),
        (2**32 - 1, 0),
    ):
        part = outbox._sealed(1, PLAN, 0, size, offset, memoryview(bytes(length)))
        with pytest.raises(errors.WireError, match="fragment"):
            inbox.take(memoryview(b"".join(part)))


def test_parts_that_come_early_are_kept_within_bounds(datagram_pair: list[DatagramMesh]) -> None:
    payload = bytes(100 * FRAGMENT_SIZE)
    frames = 2 * EARLY_BYTES // len(payload)
    inbox = datagram_pair[1]._peers[0].inbox
    for block in range(frames):
        datagram_pair[0].send(payload, block=block, plan=PLAN, to=[1])
        datagram_pair[1]._peers[0].collect()
    assert EARLY_BYTES - 2 * DATAGRAM_SIZE < inbox._early_bytes <= EARLY_BYTES
    assert inbox.stats.dropped > 0
    for block in range(frames):
        datagram_pair[1].receive(
            {0: len(payload)}, block=block, plan=PLAN, timeout=0.2, partial=True
        )
    assert inbox._early_bytes == 0
    assert not inbox._early
    datagram_pair[0].send(payload, block=0, plan=PLAN, to=[1])
    assert datagram_pair[1].receive(
        {0: len(payload)}, block=0, plan=PLAN, timeout=LONG, partial=True
    )
    assert not datagram_pair[1].missing_ranges

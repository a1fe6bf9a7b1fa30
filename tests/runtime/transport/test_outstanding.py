"""Partial waits: late frames stay outstanding, are read and checked, and dropped."""

from __future__ import annotations

import threading
import time

import pytest

from astra_runtime import errors
from astra_runtime.wire import HEADER_SIZE

from ..ranks import PLAN
from .test_tcp import frame_bytes, raw_peer


def test_owed_frames_are_read_checked_and_dropped() -> None:
    with raw_peer() as (mesh, peer):
        first = frame_bytes(b"12345678", 0, 0)
        peer.sendall(first[:20])  # in the middle of its payload
        found = mesh.receive({0: 8}, block=0, plan=PLAN, timeout=0.05, partial=True)
        assert found == {}
        assert mesh.receive({0: 3}, block=1, plan=PLAN, timeout=0.05, partial=True) == {}
        peer.sendall(first[20:] + frame_bytes(b"abc", 1, 1) + frame_bytes(b"now", 2, 2))
        views = mesh.receive({0: 3}, block=2, plan=PLAN, timeout=30, partial=True)
        assert bytes(views[0]) == b"now"
        peer.sendall(frame_bytes(b"next", 3, 3))
        assert bytes(mesh.receive({0: 4}, block=3, plan=PLAN)[0]) == b"next"


def test_an_owed_frame_that_is_wrong_is_an_error() -> None:
    with raw_peer() as (mesh, peer):
        mesh.receive({0: 8}, block=0, plan=PLAN, timeout=0.01, partial=True)
        peer.sendall(frame_bytes(b"123456789", 0, 0))
        with pytest.raises(errors.WireError, match="length: expected 8, got 9"):
            mesh.receive({0: 8}, block=1, plan=PLAN, timeout=30, partial=True)


def test_who_came_is_given_and_who_was_late_is_back() -> None:
    with raw_peer(world_size=3, timeout=60) as (mesh, (zero, two)):
        zero.sendall(frame_bytes(b"a", 0, 0))
        sizes, start = {0: 1, 2: 1}, time.monotonic()
        assert set(mesh.receive(sizes, block=0, plan=PLAN, timeout=0.1, partial=True)) == {0}
        assert 0.09 < time.monotonic() - start < 30
        zero.sendall(frame_bytes(b"b", 1, 1))
        both = frame_bytes(b"c", 0, 0, 2) + frame_bytes(b"d", 1, 1, 2)
        threading.Timer(0.05, two.sendall, [both]).start()
        views = mesh.receive(sizes, block=1, plan=PLAN, timeout=30, partial=True)
        assert {n: bytes(view) for n, view in views.items()} == {0: b"b", 2: b"d"}


def test_a_peer_that_left_is_found_when_its_frames_are_used_up() -> None:
    with raw_peer(world_size=3, timeout=60) as (mesh, (zero, two)):
        two.sendall(frame_bytes(b"kept", 0, 0, 2))
        two.close()
        zero.sendall(frame_bytes(b"x", 0, 0))
        assert set(mesh.receive({0: 1}, block=0, plan=PLAN, partial=True)) == {0}
        assert bytes(mesh.receive({2: 4}, block=0, plan=PLAN, partial=True)[2]) == b"kept"
        start = time.monotonic()
        assert mesh.receive({2: 4}, block=1, plan=PLAN, partial=True) == {}
        assert time.monotonic() - start < 30
        assert set(mesh.lost) == {2}
        for block in range(5):
            mesh.send(b"to nobody", block=block, plan=PLAN, to=[0, 2], partial=True)
        assert len(zero.recv(1000)) == 5 * (HEADER_SIZE + len(b"to nobody"))
        with pytest.raises(errors.PeerLost, match="rank 2"):
            mesh.receive({2: 4}, block=2, plan=PLAN)


def test_a_peer_far_behind_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astra_runtime.transport.tcp.MAX_OUTSTANDING", 3)
    with raw_peer() as (mesh, _peer):
        for block in range(4):
            assert not mesh.lost
            mesh.receive({0: 1}, block=block, plan=PLAN, timeout=0.001, partial=True)
        assert isinstance(mesh.lost[0], errors.DeadlineExceeded)


def test_a_peer_that_never_reads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astra_runtime.transport.tcp.MAX_UNSENT", 1 << 20)
    with raw_peer(timeout=120) as (mesh, _peer):
        start = time.monotonic()
        for block in range(20):
            mesh.send(bytes(4 << 20), block=block, plan=PLAN, to=[0], partial=True)
        assert time.monotonic() - start < 60

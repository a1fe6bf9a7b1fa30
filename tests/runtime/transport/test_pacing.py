"""The emulated link: bits over the rate, one frame after another, no credit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from astra_runtime import errors
from astra_runtime.transport import Link, Mesh, local_mesh, pacing

from ..ranks import (
    PLAN,
    as_ranks,
    send_blocks,
)


@pytest.mark.parametrize(
    ("link", "payload", "seconds"),
    [
        (Link(10), 320, (320 + 28 + 52) * 8e-7),
        (Link(10), 1420, (1448 + 52) * 8e-7),
        (Link(10), 1421, (1449 + 104) * 8e-7),
        (Link(100, 5), 0, (28 + 52) * 8e-8),
        (Link(None, 5), 10**6, 0),
    ],
)
def test_time_on_the_link(link: Link, payload: int, seconds: float) -> None:
    assert link.seconds(payload) == pytest.approx(seconds)


def test_tls_takes_time_on_the_link_too() -> None:
    link = Link(10)
    assert link.seconds(320, encrypted=True) == pytest.approx((348 + 22 + 52) * 8e-7)
    frame = 28 + 20_000 + 2 * 22  # two records
    assert link.seconds(20_000, encrypted=True) == pytest.approx((frame + 14 * 52) * 8e-7)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (10, -1), (float("nan"),)])
def test_an_impossible_link_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mbit_per_s|delay_ms"):
        Link(*arguments)


class Clock:
    """In place of `time` behind the link: it stands still but for the link's thread, which sleeps
    through its time at once, when it may."""

    def __init__(self) -> None:
        self.now = 100.0
        self.may = threading.Event()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert self.may.wait(60)
        self.now += seconds


def test_frames_cross_the_uplink_one_after_another_and_idle_time_saves_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link, size, clock = Link(0.2, delay_ms=5), 12_500, Clock()
    each = link.seconds(size)  # half a second
    monkeypatch.setattr(pacing, "time", clock)
    meshes = local_mesh(3, link=link)
    below: Any = meshes[0]._mesh  # type: ignore[attr-defined]
    deliver, crossed, expected = below.send, [], []

    def send(frame: Any, *, block: int, to: Sequence[int], **place: Any) -> None:
        crossed.append((block, *to, clock.now))
        deliver(frame, block=block, to=to, **place)

    monkeypatch.setattr(below, "send", send)
    for block in range(2):
        clock.now += 1000.0  # for so long the link was idle
        clock.may.clear()
        expected += [(block, n, pytest.approx(clock.now + n * each + 5e-3)) for n in (1, 2)]
        meshes[0].send(bytes(size), block=block, plan=PLAN, to=[1, 2])
        assert len(crossed) == 2 * block  # send does not wait for the link
        clock.may.set()
        for mesh in meshes[1:]:
            mesh.receive({0: size}, block=block, plan=PLAN)
    assert crossed == expected
    for mesh in meshes:
        mesh.close()


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
    assert expected <= taken < expected + 60


def test_a_failure_behind_the_link_reaches_the_caller() -> None:
    meshes = local_mesh(2, link=Link(100))
    with pytest.raises(ZeroDivisionError), meshes[1]:
        raise ZeroDivisionError
    with meshes[0], pytest.raises(errors.PeerLost):
        send_blocks(meshes[0], b"x", to=1)

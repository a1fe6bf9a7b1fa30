"""A mesh ends once: by any thread, signal handler or fork, whatever it does at the moment."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from astra_runtime.errors import AstraError, PeerLost
from astra_runtime.transport import Mesh, local_mesh, tcp
from astra_runtime.transport.buffers import BufferPool
from astra_runtime.transport.lifetime import WriteTurn

from ..ranks import (
    MAKERS,
    PLAN,
    as_ranks,
    open_files,
    together,
    wait_for,
)
from .datagrams import datagram_mesh

GIVEN_UP = TimeoutError("the request was given up")
LONG = 60.0  # of a wait that nothing but the mesh's end can end: longer than a test may take
WAITS: dict[str, Callable[[Mesh], object]] = {
    "receive": lambda mesh: mesh.receive({1: 8}, block=0, plan=PLAN, timeout=LONG),
    "control": lambda mesh: mesh.receive({1: 8}, block=0xFF00, plan=PLAN, timeout=LONG),
    "send": lambda mesh: [
        mesh.send(bytes(8 << 20), block=n, plan=PLAN, to=[1]) for n in range(100)
    ],
}


def makers() -> dict[str, Callable[..., list[Mesh]]]:
    return {**MAKERS, "datagram": datagram_mesh}


def asleep(thread: threading.Thread) -> None:
    """Until a thread has slept for a while and nothing has woken it, so in its wait.

    One that waits for the interpreter or for a core stays in one place, too; but that wakes every
    few milliseconds, and this one can run.
    """
    before: list[str] = []
    while thread.is_alive():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            now = re.findall(r"^(?:State|voluntary_ctxt_switches):\s*(\S+)", status, re.M)
            if now == before and now[0] == "S":
                return
            before = now
        time.sleep(0.1)


@pytest.mark.parametrize("end", ["abort", "close"])
@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("maker", ["tcp", "gloo", "paced", "datagram"])
def test_another_thread_ends_every_wait(maker: str, wait: str, end: str) -> None:
    if wait == "send" and maker == "datagram":
        pytest.skip("datagrams wait for nobody")
    mesh, other = makers()[maker](2, timeout=LONG)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            WAITS[wait](mesh)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    asleep(thread)
    mesh.timeout = other.timeout = 1.0
    mesh.abort(GIVEN_UP) if end == "abort" else mesh.close()
    thread.join(60)
    assert not thread.is_alive()
    words = "the request was given up" if end == "abort" else "the mesh is closed"
    assert isinstance(errors[0], AstraError)
    assert words in str(errors[0])
    assert mesh.ended is not None
    with pytest.raises(AstraError, match=words):
        mesh.send(b"", block=0, plan=PLAN, to=[1])
    other.close()


@pytest.mark.parametrize("maker", ["tcp", "gloo", "paced", "datagram"])
def test_a_call_that_is_ended_before_or_behind_its_mesh_says_so(maker: str) -> None:
    """`Engine.cancel` ends the call, which ends a mesh of datagrams; a timer may come behind it."""
    mesh, other = makers()[maker](2)
    mesh.begin()
    mesh.interrupt("it took too long", mesh.call)
    mesh.abort(GIVEN_UP)
    mesh.interrupt("it took too long", mesh.call)
    mesh.begin()
    with pytest.raises(AstraError, match="the request was given up"):
        mesh.receive({1: 8}, block=0, plan=PLAN)
    other.close()


def send_for_ever(mesh: Mesh, to: int) -> None:
    for block in range(1 << 16):
        mesh.send(bytes(2_000_000), block=block & 1, plan=PLAN, to=[to])


@pytest.mark.parametrize("maker", [name for name in ("tcp", "tls", "paced") if name in MAKERS])
@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_signal_handler_ends_the_mesh_wherever_it_comes(
    maker: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large frames, so that the signal comes while one is being written; of those that wait before
    the abort there are many."""
    monkeypatch.setattr(tcp, "ABORT_SECONDS", LONG)
    for n in range(4):
        here, there = MAKERS[maker](2, timeout=LONG)
        received: list[BaseException] = []

        def listen(
            here: Mesh = here, there: Mesh = there, received: list[BaseException] = received
        ) -> None:
            try:
                for block in range(1 << 16):
                    there.receive({here.rank: 2_000_000}, block=block & 1, plan=PLAN)
            except BaseException as error:
                received.append(error)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        finish = here.close if end == "close" else functools.partial(here.abort, GIVEN_UP)
        previous = signal.signal(signal.SIGALRM, lambda *_, finish=finish: finish())
        signal.setitimer(signal.ITIMER_REAL, 0.1 + 0.013 * n)
        try:
            words = "given up" if end == "abort" else "is closed"
            with pytest.raises(AstraError, match=words):
                send_for_ever(here, there.rank)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        thread.join(60)
        assert isinstance(received[0], PeerLost)
        words = "TimeoutError: the request was given up" if end == "abort" else "said BYE"
        assert maker == "paced" or words in str(received[0])
        there.close()


def test_a_handler_that_interrupts_a_writer_leaves_its_work_to_it() -> None:
    turn, order = WriteTurn(), []
    assert not turn.defer(lambda: order.append("too early"))
    with turn:
        assert turn.defer(lambda: order.append("deferred"))
        order.append("written")
    assert order == ["written", "deferred"]
    with turn.within(1.0) as taken:
        assert taken


def test_a_turn_is_not_waited_for_longer_than_asked() -> None:
    turn = WriteTurn()
    with turn:
        taken = together([lambda: turn.within(0.01).__enter__()])
    assert taken == [False]


def test_a_frame_cut_short_by_an_exception_is_no_other_frame() -> None:
    """Otherwise what is sent last would fill up the frame that the peer is reading."""
    here, there = local_mesh(2, timeout=5)
    connection = here.connections[1]  # type: ignore[attr-defined]

    class Interrupted(BaseException):
        pass

    class Cut:
        """A socket that sends a part, and then the program is interrupted."""

        def __getattr__(self, name: str) -> object:
            return getattr(connection.stream.sock, name)

        def send(self, data: memoryview) -> int:
            connection.stream.sock.send(data[:100])
            raise Interrupted

    connection.sock = Cut()
    with pytest.raises(Interrupted):
        here.send(bytes(4000), block=0, plan=PLAN, to=[1])
    here.abort(Interrupted())
    with pytest.raises(PeerLost):
        there.receive({0: 4000}, block=0, plan=PLAN)
    there.close()


def test_an_abort_hastens_a_close_that_waits() -> None:
    mesh, other = local_mesh(2, timeout=LONG)
    for block in range(8):  # more than the kernels hold
        mesh.send(bytes(8 << 20), block=block, plan=PLAN, to=[1])
    thread = threading.Thread(target=mesh.close, daemon=True)
    thread.start()
    wait_for(lambda: mesh.ended)
    mesh.abort(GIVEN_UP)
    thread.join(LONG / 2)
    assert not thread.is_alive()
    other.close()


@pytest.mark.parametrize("maker", ["tcp", "paced", "datagram"])
def test_an_end_gives_back_all_descriptors(maker: str) -> None:
    before = open_files()
    meshes = makers()[maker](3)
    opened = open_files() - before
    assert len(opened) > len(meshes)
    together([mesh.close for mesh in meshes])
    assert not open_files() & opened


@pytest.mark.parametrize("made", range(6))
def test_descriptors_that_run_out_leave_none_open(
    made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three ranks has two of this kind beside its connections."""
    before, eventfd, numbers = open_files(), os.eventfd, itertools.count()

    def running_out(*arguments: int) -> int:
        if next(numbers) == made:
            raise OSError(errno.EMFILE, "Too many open files")
        return eventfd(*arguments)

    monkeypatch.setattr(os, "eventfd", running_out)
    with pytest.raises(OSError, match="Too many open files"):
        local_mesh(3)
    assert not open_files() - before


def test_a_pool_keeps_a_bounded_number_of_bytes() -> None:
    pool = BufferPool(bytearray, max_free=1000)
    buffers = [pool.take(100) for _ in range(4)]
    for buffer in buffers:
        pool.give(buffer, 100)
    assert pool.take(100) is buffers[-1]
    for size in range(200, 400, 10):
        pool.give(pool.take(size), size)
        assert pool.free_bytes <= 1000
    again = pool.take(100)
    assert not any(again is buffer for buffer in buffers)
    pool.give(bytearray(2000), 2000)
    assert pool.free_bytes == 0


@pytest.mark.parametrize("maker", ["gloo", "paced"])
def test_nothing_is_kept_of_what_was_sent(maker: str) -> None:
    """Of other sizes each time, as prompts have them."""

    def work(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        for block in range(60):
            size = (1 << 20) + block
            mesh.send(bytes(size), block=block, plan=PLAN, to=[other])
            mesh.receive({other: size}, block=block, plan=PLAN)
        mesh.flush()
        if maker == "gloo":
            assert not mesh._sending  # type: ignore[attr-defined]
        assert mesh._pool.free_bytes <= 8 << 20  # type: ignore[attr-defined]

    as_ranks(MAKERS[maker](2), work)


@pytest.mark.parametrize("maker", [*MAKERS, "datagram"])
def test_who_is_alive(maker: str) -> None:
    meshes = makers()[maker](3)
    assert [mesh.alive() for mesh in meshes] == [[0, 1, 2]] * 3
    assert [mesh.disconnected() for mesh in meshes] == [[]] * 3
    together([meshes[1].close])
    assert meshes[1].alive() == [1]
    if maker != "gloo":  # which shows a loss only to a call
        wait_for(lambda: (meshes[0].alive(), meshes[0].disconnected()) == ([0, 2], [1]))
    for mesh in (meshes[0], meshes[2]):
        mesh.abort(GIVEN_UP)
        assert mesh.alive() == [mesh.rank]
        assert mesh.disconnected() == sorted({0, 1, 2} - {mesh.rank})


def test_alive_can_be_asked_during_a_call() -> None:
    mesh, other = local_mesh(2, timeout=LONG)
    thread = threading.Thread(target=WAITS["receive"], args=(mesh,), daemon=True)
    thread.start()
    asleep(thread)
    assert mesh.alive() == [0, 1]
    other.send(bytes(8), block=0, plan=PLAN, to=[0])
    thread.join(60)
    assert not thread.is_alive()
    together([mesh.close, other.close])


@pytest.mark.parametrize("seconds", [1e9, 1e12, float("inf")])
@pytest.mark.parametrize("maker", ["tcp", "gloo", "datagram"])
def test_a_deadline_that_means_never(maker: str, seconds: float) -> None:
    """More milliseconds than an int has."""
    mesh, other = makers()[maker](2)
    answer = threading.Timer(0.2, other.send, [bytes(8)], {"block": 0, "plan": PLAN, "to": [0]})
    answer.start()
    views = mesh.receive({1: 8}, block=0, plan=PLAN, timeout=seconds, partial=mesh.partial)
    assert bytes(views[1]) == bytes(8)
    answer.join()
    together([mesh.close, other.close])
